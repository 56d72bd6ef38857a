import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from train.errors import RunFailed, UserError
from train.runs import processes
from train.runs.checkpoints import Checkpoints

NAN = float("nan")


def items(step, devices=1):
    """Make items like those of a training state, on so many devices."""
    rng = np.random.RandomState(step)
    host = {
        "model": {"params": {"kernel": rng.randn(3, 2).astype(np.float32)}, "batch_stats": {}},
        "optimizer": {"trace": rng.randn(2).astype(jnp.bfloat16), "count": np.int32(step)},
        "meta": {"step": np.int32(step), "seed": np.uint32(2**32 - 1)},
    }
    return processes.replicate(processes.mesh_of(jax.devices()[:devices]), host)


def metrics(accuracy, loss=1.0):
    return {"accuracy": accuracy, "loss": loss}


@pytest.mark.parametrize("save_on, restore_on", [(1, 1), (1, 4), (4, 2)])
def test_restore_gives_back_every_bit_on_any_number_of_devices(tmp_path, save_on, restore_on):
    saved = items(7, save_on)
    like = jax.tree.map(jnp.zeros_like, items(0, restore_on))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, saved, metrics(0.5))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 7
        restored = checkpoints.restore(7, like)
        part = checkpoints.restore(7, {"model": like["model"]})
    for ours, theirs in ((restored, saved), (part, {"model": saved["model"]})):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(lambda a, b: assert_array_equal(a, b, strict=True), ours, theirs)
        for leaf in jax.tree.leaves(ours):
            assert len(leaf.sharding.device_set) == restore_on


@pytest.mark.parametrize(
    "ranked, best, kept",
    [
        ([metrics(a) for a in (0.1, 0.9, 0.2, 0.3, 0.4)], 2, {2, 4, 5}),
        ([metrics(a) for a in (0.1, 0.2, 0.3, 0.4, 0.5)], 5, {4, 5}),
        ([metrics(0.9, NAN), metrics(0.5), metrics(0.9, NAN), metrics(NAN, NAN), metrics(0.1)], 2, {2, 4, 5}),
        ([metrics(0.5, 0.3), metrics(0.5, 0.2), metrics(0.5, 0.3), None, None], 2, {2, 4, 5}),
        ([{"loss": loss} for loss in (0.3, 0.2, 0.3, 0.4, 0.5)], 2, {2, 4, 5}),
        ([None] * 5, 5, {4, 5}),
    ],
)
def test_newest_two_and_the_best_are_kept_whatever_the_metrics(tmp_path, ranked, best, kept):
    item = {"meta": {"step": np.int32(0)}}
    with Checkpoints(tmp_path) as checkpoints:
        for step, values in enumerate(ranked, start=1):
            checkpoints.save(step, item, values)
        assert (checkpoints.latest_step, checkpoints.best_step) == (5, best)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == kept


def test_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
        checkpoints.save(3, items(3), metrics(0.5))
        checkpoints.save(3, items(3), None)
        assert checkpoints.best_step == 3
        with pytest.raises(RuntimeError, match="declined to save step 2 after step 3"):
            checkpoints.save(2, items(2), None)


def test_step_that_cannot_be_saved_is_named_with_the_reason(tmp_path, monkeypatch):
    reasons = {
        "No space left on device. What was saved before is kept; make room": OSError(
            28, "No space left on device"
        ),
        "out of memory": MemoryError(),
        "a riddle. What was saved before is kept": ValueError("a riddle"),
    }
    with Checkpoints(tmp_path) as checkpoints:
        for reason, error in reasons.items():

            def fail(*_, error=error, **__):
                raise error

            monkeypatch.setattr(checkpoints._manager, "save", fail)
            with pytest.raises(RunFailed, match=f"step 3 could not be saved to .*checkpoints': {reason}"):
                checkpoints.save(3, items(3), None)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run with checkpoints of steps 3 and 4."""
    run_dir = tmp_path_factory.mktemp("run")
    with Checkpoints(run_dir) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, items(step), metrics(0.5))
    return run_dir


@pytest.fixture
def run_dir(two_steps, tmp_path):
    """A copy of that run, which may be broken."""
    return shutil.copytree(two_steps, tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoint_is_named_and_not_restored_and_the_one_before_is_there(run_dir):
    broken, kept = run_dir / "checkpoints" / "4", run_dir / "kept"
    shutil.copytree(broken, kept)
    for spoil in (
        *(lambda name=name: shutil.rmtree(broken / name) for name in ("model", "optimizer", "meta")),
        lambda: cut(broken / "model" / "manifest.ocdbt"),
        lambda: [cut(path) for path in (broken / "model").rglob("d/*")],
    ):
        shutil.rmtree(broken)
        shutil.copytree(kept, broken)
        spoil()
        with Checkpoints(run_dir) as checkpoints, pytest.raises(UserError) as raised:
            checkpoints.restore(4, items(0))
        assert f"'{broken}' is not a complete checkpoint" in str(raised.value)
        assert "Delete that folder to go on from the one before" in str(raised.value)
    shutil.rmtree(broken)
    with Checkpoints(run_dir) as checkpoints:
        assert int(checkpoints.restore(checkpoints.latest_step, items(0))["meta"]["step"]) == 3


def refused_or(expected, run_dir, restore):
    """Assert that a damaged run is refused with what to do, or restored as it was saved."""
    try:
        with Checkpoints(run_dir) as checkpoints:
            jax.tree.map(lambda a, b: assert_array_equal(a, b, strict=True), restore(checkpoints), expected)
    except UserError as error:
        assert str(run_dir) in str(error) and "elete" in str(error)
        return True
    return False


@pytest.mark.slow
def test_flipped_bits_and_missing_files_are_refused_or_change_nothing(run_dir):
    like, expected, rng = items(0), items(4), np.random.RandomState(0)
    refused = {"flipped": 0, "gone": 0}
    for path in [path for path in (run_dir / "checkpoints" / "4").rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for offset in rng.randint(0, len(whole), 3):
            flipped = bytearray(whole)
            flipped[offset] ^= 1 << rng.randint(8)
            path.write_bytes(flipped)
            refused["flipped"] += refused_or(expected, run_dir, lambda run: run.restore(4, like))
        path.unlink()
        refused["gone"] += refused_or(expected, run_dir, lambda run: run.restore(4, like))
        path.write_bytes(whole)
    assert refused["flipped"] > 20 and refused["gone"] >= 7


def test_value_that_orbax_reads_otherwise_than_it_was_saved_is_refused(run_dir, monkeypatch):
    with Checkpoints(run_dir) as checkpoints:
        restore = checkpoints._manager.restore
        for name, spoil in (
            ("model", lambda item: item["params"] | {"kernel": -item["params"]["kernel"]}),
            ("optimizer", lambda item: item | {"count": item["count"] + 1}),
            ("meta", lambda item: item | {"seed": item["seed"].view(np.int32)}),
        ):

            def spoilt(*arguments, name=name, spoil=spoil, **options):
                read = dict(restore(*arguments, **options).items())
                return read | {name: spoil(read[name])}

            monkeypatch.setattr(checkpoints._manager, "restore", spoilt)
            with pytest.raises(
                UserError, match=f"checkpoints/4' is damaged: its {name} is not what was saved"
            ):
                checkpoints.restore(4, items(0) if name != "model" else {"model": items(0)["model"]})


def test_metrics_that_are_others_or_gone_never_let_another_step_be_the_best(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(tmp_path) as checkpoints:
        for step, accuracy in (3, 0.9), (4, 0.5), (5, 0.5):
            measured = metrics(accuracy) | {"r2": -NAN}  # of another sign than when it is read
            checkpoints.save(step, {"meta": {"step": np.int32(step)}}, measured)
    for step, text in ((3, json.dumps(metrics(0.1))), (4, json.dumps(metrics(0.95))), (3, None)):
        path = folder / str(step) / "metrics" / "metrics"
        whole = path.read_text()
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(UserError, match=f"checkpoints/{step}' is damaged: its metrics is not what was"):
            Checkpoints(tmp_path)
        path.write_text(whole)
    shutil.rmtree(folder / "4" / "metrics")  # which are needed by nobody
    shutil.copytree(folder / "3", tmp_path / "kept")
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (5, 3)
    shutil.rmtree(folder / "3")  # as the message advises
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step == 5
    shutil.copytree(tmp_path / "kept", folder / "3")
    metadata = folder / "5" / "_CHECKPOINT_METADATA"
    for text in '{"custom_metadata": 1}', "[]", "":
        metadata.write_text(text)
        with pytest.raises(UserError, match="checkpoints/5' is|checkpoints' holds a damaged checkpoint"):
            Checkpoints(tmp_path)
    metadata.unlink()
    with pytest.raises(UserError, match="checkpoints/5' is not a complete checkpoint"):
        Checkpoints(tmp_path)


def test_checkpoint_of_an_earlier_version_which_recorded_nothing_is_restored(run_dir):
    for path in (run_dir / "checkpoints").glob("*/_CHECKPOINT_METADATA"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    with Checkpoints(run_dir) as checkpoints:
        restored = checkpoints.restore(checkpoints.best_step, items(0))
        jax.tree.map(lambda a, b: assert_array_equal(a, b, strict=True), restored, items(4))
        checkpoints.save(5, items(5), metrics(0.6))
    with Checkpoints(run_dir) as checkpoints:
        assert checkpoints.best_step == 5


def test_checkpoint_that_the_system_does_not_let_read_is_not_called_damaged(run_dir, monkeypatch):
    def refused(*_, **__):
        raise ValueError("status: PERMISSION_DENIED: Permission denied")

    with Checkpoints(run_dir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", refused)
        with pytest.raises(
            RunFailed, match="checkpoints/4' could not be read: Permission denied.*allow access"
        ):
            checkpoints.restore(4, items(0))


def test_metrics_that_cannot_be_ranked_are_named_when_the_run_is_opened(run_dir):
    path = run_dir / "checkpoints" / "4" / "metrics" / "metrics"
    for text in ("", "[]", "{}", '{"loss": "low"}', json.dumps(metrics(0.5))[:20]):
        path.write_text(text)
        with pytest.raises(UserError, match="checkpoints/4' is not a complete checkpoint"):
            Checkpoints(run_dir)


def test_file_in_the_place_of_the_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints' is not a folder. Move it away"):
        Checkpoints(tmp_path)
