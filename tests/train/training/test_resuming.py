"""A job that is stopped, killed, extended, or started again."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.helpers.jobs import final_state, fit, results
from train.errors import Stopped, UserError
from train.runs.stopping import StopRequests
from train.training import loop, losses, steps
from train.training.trained import serving


def killed(*_, **__):
    raise KeyboardInterrupt


def resume_to_the_end(config, *, stop_after):
    """Stop a job after so many dispatches, start it again, and return the steps that it reached."""
    reached = []
    while not reached or reached[-1] < config.steps:
        reached.append(fit(config, stop_after=stop_after).step)
        assert len(reached) < 100
    return reached


def assert_same(ours, theirs):
    jax.tree.map(assert_array_equal, final_state(ours), final_state(theirs))
    assert results(ours.run_dir) == results(theirs.run_dir)


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(finished, make_config, monkeypatch):
    monkeypatch.setattr(loop, "SECONDS_PER_DISPATCH", 1e9)
    config = make_config()
    # In an epoch of 10, at its end, at an evaluation, and beyond both.
    assert resume_to_the_end(config, stop_after=3) == [7, 12, 19, 24, 30]
    assert_same(config, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {
            "data": {"shift": 1},
            "optimizer": {"average": 0.9, "accumulate": 3},
            "devices": 4,
        },
        {
            "data": {"device_gib": 0.0, "crop": 2},
            "optimizer": {"name": "lamb", "learning_rate": 0.01},
            "model": {"name": "cnn", "norm": "none", "widths": (4,)},
        },
    ],
    ids=["averaged in parts on devices", "cnn with streamed data"],
)
def test_every_kind_of_job_is_resumed_bit_for_bit(make_config, tmp_path, monkeypatch, options):
    monkeypatch.setattr(loop, "SECONDS_PER_DISPATCH", 1e9)
    # Two steps an epoch.
    options = {"steps": 5, "eval_every": 2, "batch_size": 600} | options
    whole, parts = (make_config(run_dir=tmp_path / name, **options) for name in ("whole", "parts"))
    fit(whole)
    # In an epoch, and at the end of one, with its evaluation.
    assert [fit(parts, stop_after=dispatches).step for dispatches in (1, 2, None)] == [1, 4, 5]
    assert_same(parts, whole)


@pytest.mark.slow
def test_data_too_large_for_the_devices_are_streamed_to_the_same_result(finished, make_config):
    config = make_config(data={"device_gib": 0.0})
    fit(config)
    for ours, theirs in zip(results(config.run_dir), results(finished[0].run_dir), strict=True):
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.01)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_stop_writes_no_metrics_line_and_a_summary_that_says_so(make_config):
    config = make_config()
    summary = fit(config, stop_after=1)
    assert (summary.status, summary.test_accuracy, results(config.run_dir)) == ("stopped", None, [])
    assert 0 < summary.step < 12


def test_finished_job_is_left_as_it_is(finished):
    config, summary, _ = finished
    before = {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*")}
    assert fit(config) == summary
    assert {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*")} == before


@pytest.mark.slow
def test_finished_job_whose_data_were_replaced_is_not_finished(tmp_path, make_config):
    rng, path = np.random.RandomState(0), tmp_path / "data" / "npz.npz"
    path.parent.mkdir()
    x, y = rng.normal(size=(60, 5)).astype(np.float32), np.arange(60) % 3
    config = make_config(data={"name": "npz", "path": str(path)}, steps=2, batch_size=8)

    def save(x):
        np.savez(path, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])

    save(x)
    summary = fit(config)
    assert fit(config) == summary and serving.evaluate(Path(config.run_dir))["examples"] == 9
    for row in (1, 59):
        changed = x.copy()
        changed[row, 2] += 1
        save(changed)
        with pytest.raises(UserError, match="was trained on other data .* give another --run_dir"):
            fit(config)
        with pytest.raises(UserError, match="was trained on other data .* give --data.path to evaluate"):
            serving.evaluate(Path(config.run_dir))
    assert serving.evaluate(Path(config.run_dir), str(path))["examples"] == 9
    other = tmp_path / "moved.npz"
    save(x)
    path.rename(other)
    assert fit(config) == summary  # they are gone, and nothing else is in their place
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(other)))
    assert fit(moved) == summary


def test_request_to_stop_ends_the_look_at_the_data_of_a_finished_job(finished, monkeypatch):
    decoding = lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(loop.data, "fingerprint", decoding)
    with StopRequests() as stop, pytest.raises(Stopped):
        loop.fit(finished[0], stop)


@pytest.mark.slow
def test_run_that_an_earlier_version_began_goes_on_though_its_classes_are_uneven(
    tmp_path, make_config, monkeypatch
):
    x, y = np.random.RandomState(0).normal(size=(60, 5)).astype(np.float32), np.arange(60) % 4 // 3
    np.savez(tmp_path / "npz.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    data = {"name": "npz", "path": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(losses, "UNEVEN", len(y))  # nothing was reported by class
        fit(make_config(data=data, steps=2, batch_size=8))
    path = Path(make_config().run_dir) / "data.json"
    described = json.loads(path.read_text()) | {"classes": 2, "fingerprint": "0" * 16}
    del described["labels"]
    path.write_text(json.dumps(described))
    for more in (4, 6):
        assert fit(make_config(data=data, steps=more, batch_size=8)).step == more


@pytest.mark.slow
def test_more_steps_extend_a_finished_job_also_after_a_kill_and_fewer_are_refused(
    copied, make_config, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(steps, "train_steps", killed)
        fit(make_config(steps=40))
    summary = fit(make_config(steps=40))
    assert (summary.status, summary.step) == ("finished", 40)
    assert [line["step"] for line in results(make_config().run_dir)][::3] == [12, 24, 30, 36, 40]
    with pytest.raises(
        UserError, match="steps: expected at least the 40 steps that run_dir = .* holds, got 20"
    ):
        fit(make_config(steps=20))


def test_longer_job_whose_checkpoint_is_refused_leaves_the_run_as_it_was(copied, make_config):
    run_dir = Path(copied[0].run_dir)
    damaged = run_dir / "checkpoints" / "30" / "optimizer" / "manifest.ocdbt"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"damaged")
    before = {name: (run_dir / name).read_bytes() for name in ("config.json", "data.json", "summary.json")}
    with pytest.raises(UserError, match="checkpoints/30' is not a complete checkpoint"):
        fit(make_config(steps=40))
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    damaged.write_bytes(whole)
    assert fit(make_config()) == copied[1]


def test_job_whose_end_was_not_noted_is_finished_by_its_checkpoint(copied):
    config, summary = copied
    (Path(config.run_dir) / "summary.json").unlink()
    of_the_session = dict.fromkeys(("wall_seconds", "examples_per_second", "peak_host_bytes"))
    again = fit(config)
    assert dataclasses.replace(again, **of_the_session) == dataclasses.replace(summary, **of_the_session)


def test_job_whose_chart_finds_the_disk_full_is_not_noted_as_finished(copied, monkeypatch):
    config, _ = copied
    path = Path(config.run_dir) / "summary.json"
    path.unlink()

    def full(run_dir):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(loop.curves, "draw", full)
        fit(config)
    assert not path.exists()
    assert fit(config).finished and path.exists()


def test_run_whose_checkpoints_are_gone_does_not_begin_again_in_silence(copied, make_config):
    config, _ = copied
    shutil.rmtree(Path(config.run_dir) / "checkpoints")
    # What is known of it by its metrics, up to the last but one, and by its summary.
    for step, away, asked in ((24, "summary.json", 30), (30, "metrics.jsonl", 40)):
        path = Path(config.run_dir) / away
        path.rename(f"{path}.away")
        with pytest.raises(
            UserError, match=f"had reached step {step}, but its checkpoints are gone. Restore"
        ):
            fit(dataclasses.replace(config, steps=asked))
        Path(f"{path}.away").rename(path)


def test_bad_data_leave_no_run_directory_behind(make_config):
    with pytest.raises(UserError, match="batch_size: expected at most the 1293 training examples"):
        fit(make_config(batch_size=5000))
    assert not Path(make_config().run_dir).exists()
