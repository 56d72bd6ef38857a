import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jobs import final_state, fit
from numpy.testing import assert_array_equal

from train import serving
from train.errors import RunFailed, UserError
from train.runs.log import read_metrics
from train.training import job, loop
from train.training.job import Job


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Drawing takes longer than the jobs; the one test that looks for the picture has it drawn."""
    if "leaves_its_files" not in request.node.name:
        monkeypatch.setattr(loop.curves, "draw", lambda run_dir: None)


def metrics(config):
    return [{**line, "seconds": None} for line in read_metrics(Path(config.run_dir))]


def test_job_reports_what_it_reached_and_leaves_its_files(make_config):
    config = make_config()
    summary = fit(config)
    lines = metrics(config)
    assert [(line["step"], line["split"]) for line in lines] == [
        (step, split) for step in (12, 24, 30) for split in ("train", "validation", "test")
    ]
    tests = {line["step"]: line for line in lines if line["split"] == "test"}
    quality = lambda line: (line["accuracy"], -line["loss"])
    best = max((line for line in lines if line["split"] == "validation"), key=quality)["step"]
    assert json.loads((Path(config.run_dir) / "summary.json").read_text()) == summary
    assert 0 < summary.pop("wall_seconds") < 120
    assert summary.pop("examples_per_second") > 128 / 120
    assert 10e6 < summary.pop("peak_host_bytes") < 100e9
    assert summary.pop("peak_device_bytes") is None or jax.default_backend() != "cpu"
    assert summary == {
        "status": "finished",
        "step": 30,
        "best_step": best,
        "test_accuracy": tests[best]["accuracy"],
        "test_loss": tests[best]["loss"],
        "best_test_accuracy": max(line["accuracy"] for line in tests.values()),
    }
    names = (
        "checkpoints config.json curves.png data.json environment.json metrics.jsonl summary.json tensorboard"
    )
    assert sorted(path.name for path in Path(config.run_dir).iterdir()) == names.split()


def test_an_evaluation_far_from_what_training_saw_is_said_once(make_config, tmp_path, capsys):
    rng = np.random.RandomState(0)
    labels = np.arange(96) % 3
    inputs = np.float32(rng.normal(0, 1, (3, 8))[labels] + rng.normal(0, 0.3, (96, 8)))
    for scale, said in ((1e30, 1), (1.0, 0)):
        arrays = {"x_train": inputs * np.float32(scale), "y_train": labels}
        arrays |= {name.replace("train", "test"): values[:24] for name, values in arrays.items()}
        np.savez(tmp_path / "data.npz", **arrays)
        data = {"name": "npz", "path": str(tmp_path / "data.npz")}
        config = make_config(
            data=data, batch_size=24, steps=20, eval_every=5, run_dir=str(tmp_path / f"run{said}")
        )
        assert fit(config)["status"] == "finished"
        printed = capsys.readouterr().out
        assert printed.count("Running statistics of batch norm do not describe these inputs") == said
        assert printed.count("Scale the data") == said


def test_best_step_is_by_validation_and_not_by_test(make_config, monkeypatch):
    results = iter([0.2, 0.1, 0.9, 0.3, 0.5, 0.8])  # validation and test after steps 12, 24 and 30
    with monkeypatch.context() as patch:
        patch.setattr(Job, "evaluate", lambda *_: {"loss": 1.0, "accuracy": next(results)})
        summary = fit(make_config())
    assert (summary["best_step"], summary["test_accuracy"], summary["best_test_accuracy"]) == (24, 0.3, 0.8)
    assert serving.evaluate(Path(make_config().run_dir))["step"] == 24


def test_seed_decides_the_initial_weights_and_each_epoch_has_its_order(make_config, monkeypatch):
    orders, order = [], loop.data.order
    monkeypatch.setattr(loop.data, "order", lambda *arguments: orders.append(arguments) or order(*arguments))
    config = make_config(seed=3)
    fit(config, stop_after=1)
    fit(config)
    assert list(dict.fromkeys(orders)) == [(3, epoch, 1293) for epoch in range(3)]
    kernels = [Job(make_config(seed=seed)).initial.variables.params["Dense_0"]["kernel"] for seed in (3, 4)]
    assert (kernels[0] != kernels[1]).all()


def test_train_lines_are_means_since_the_line_before(make_config):
    config = make_config()
    fit(config)
    assert int(final_state(config).sums.examples) == 0
    longer = make_config(steps=35)
    fit(longer, stop_after=1)
    assert int(final_state(longer).sums.examples) == 128 * (int(final_state(longer).step) - 30) > 0


def test_features_are_scaled_alike_whatever_the_seed_and_the_job_and_steps_see_it(make_config):
    scales = {"feature_scales": (0.01, 100.0)}
    jobs = [
        Job(make_config(data=scales, seed=0)),
        Job(make_config(data=scales | {"validation": 0.3}, seed=1, model={"widths": (8,)}, batch_size=8)),
    ]
    for ours, theirs in zip(*(built.source.preprocessing for built in jobs)):
        assert_array_equal(ours, theirs)
    first, _ = jobs
    batch = first.source._replace(examples=first.data.train.take(slice(128)))
    state = loop.states.train_step(first.recipe, first.initial, batch, None)
    x = first.data.train.take(slice(128)).inputs.reshape(128, -1).astype(np.float64)
    # As digits are NumPy's floating point, all that is done to a pixel is its scale.
    scale = 0.01 * 10_000 ** np.random.RandomState(0).uniform(size=64)
    kernel = np.float64(first.initial.variables.params["Dense_0"]["kernel"])
    mean = state.variables.batch_stats["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, (x * scale @ kernel).mean(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_statistics_of_a_step_keep_their_initial_values_where_they_are_not_debiased(
    make_config, accumulate
):
    options = {"model": {"widths": (16,), "norm_debias": False}, "optimizer": {"accumulate": accumulate}}
    built = Job(make_config(**options))
    batch = built.source._replace(examples=built.data.train.take(slice(128)))
    state = loop.states.train_step(built.recipe, built.initial, batch, None)
    x = built.data.train.take(slice(128)).inputs.reshape(128, -1).astype(np.float64)
    x = x @ built.initial.variables.params["Dense_0"]["kernel"]
    found = state.variables.batch_stats["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], 0.1 * x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * x.var(0), rtol=1e-4)


@pytest.mark.parametrize("base, factor", [(0, 1), (32, 4), (256, 0.5)])
def test_steps_are_as_large_as_the_batch_size_asks_for(make_config, base, factor):
    config = make_config(optimizer={"base_batch_size": base, "momentum": 0.0}, batch_size=128)
    built = Job(config)
    params, ones = built.initial.variables.params, jax.tree.map(np.ones_like, built.initial.variables.params)
    updates, _ = built.recipe.optimizer.update(ones, built.initial.opt_state, params)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, np.full(update.shape, -0.1 * factor), rtol=1e-5)


def test_steps_of_one_dispatch_stay_inside_their_epoch_and_evaluation(make_config, monkeypatch):
    spans, train_steps = [], loop.states.train_steps

    def spy(recipe, state, source, order, start, steps, loop):
        spans.append((start // recipe.batch_size, steps))
        return train_steps(recipe, state, source, order, start, steps, loop=loop)

    monkeypatch.setattr(loop.states, "train_steps", spy)
    monkeypatch.setattr(loop, "SECONDS_PER_DISPATCH", 1e9)
    fit(make_config())
    # Doubling, up to the ends of the epochs (10, 20, 30) and the evaluations (12, 24, 30).
    assert spans == [(0, 1), (1, 2), (3, 4), (7, 3), (0, 2), (2, 8), (0, 4), (4, 6)]


def test_batch_normalization_makes_the_job_learn(make_config):
    assert fit(make_config(steps=60, eval_every=60))["test_accuracy"] > 0.93


@pytest.mark.parametrize(
    "options",
    [
        {"data": {"shift": 1}, "optimizer": {"average": 0.9, "accumulate": 3}},
        {"data": {"device_gib": 0.0, "crop": 2}, "optimizer": {"name": "lamb", "learning_rate": 0.01}},
        {"model": {"widths": (4,), "name": "cnn", "norm": "none"}},
        {"devices": 4},
    ],
    ids=["averaged", "streamed", "cnn", "devices"],
)
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(make_config, tmp_path, options):
    # Two steps an epoch; stops fall on steps with and without an evaluation.
    steps = {"steps": 5, "eval_every": 2, "batch_size": 600} | options
    whole, parts = (make_config(run_dir=str(tmp_path / name), **steps) for name in ("whole", "parts"))
    fit(whole)
    statuses = []
    while not statuses or statuses[-1] != "finished":
        statuses.append(fit(parts, stop_after=1)["status"])
        assert len(statuses) < 100
    assert statuses == 4 * ["stopped"] + ["finished"]
    jax.tree.map(assert_array_equal, final_state(parts), final_state(whole))
    assert metrics(parts) == metrics(whole)


def test_data_too_large_for_the_devices_are_streamed_to_the_same_result(make_config, tmp_path):
    options = {"data": {"normalize": True, "flip": True}}
    resident = make_config(run_dir=str(tmp_path / "resident"), **options)
    streamed = make_config(run_dir=str(tmp_path / "streamed"), data=options["data"] | {"device_gib": 0.0})
    assert not Job(streamed).on_device and Job(streamed).source.examples is None
    fit(resident), fit(streamed)
    for ours, theirs in zip(metrics(streamed), metrics(resident), strict=True):
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.01)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "accuracies, ends", [([0.1, 0.5, 0.4, 0.3, 0.9], 48), ([0.1, 0.2, 0.3, 0.4, 0.5], 60)]
)
def test_early_stopping_ends_a_job_whose_validation_no_longer_gets_better(
    make_config, monkeypatch, accuracies, ends
):
    config = make_config(steps=60, early_stopping=2)
    results = iter(np.repeat(accuracies, 2))  # validation and test alike
    monkeypatch.setattr(Job, "evaluate", lambda *_: {"loss": 1.0, "accuracy": float(next(results))})
    summary = fit(config)
    assert (summary["status"], summary["step"]) == ("finished", ends)
    assert summary["test_accuracy"] == max(accuracies[: ends // 12])
    # Where its end was not noted, it is found again, without another step.
    (Path(config.run_dir) / "summary.json").unlink()
    assert fit(config)["step"] == ends


def test_job_starts_from_the_best_parameters_and_statistics_of_another(make_config, tmp_path):
    first = make_config()
    best = fit(first)
    second = make_config(run_dir=str(tmp_path / "second"), init_from=first.run_dir, data={"validation": 0.2})
    job = Job(second)
    assert int(job.initial.step) == 0
    values = job.evaluate(job.initial.variables, job.data.test)
    assert (values["accuracy"], values["loss"]) == (best["test_accuracy"], best["test_loss"])
    assert fit(second)["status"] == "finished"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init_from": "/no/such/run"}, "'/no/such/run' is not a run directory"),
        ({"model": {"widths": (8,)}}, "holds the parameters of another network"),
        ({"model": {"norm": "none", "widths": (16,)}}, "holds the parameters of another network"),
    ],
)
def test_start_from_what_is_no_run_of_the_same_network_is_refused(make_config, tmp_path, change, message):
    fit(make_config(steps=1))
    options = {"init_from": make_config().run_dir} | change
    with pytest.raises(UserError, match=message):
        Job(make_config(run_dir=str(tmp_path / "second"), **options))


def test_run_whose_checkpoints_are_gone_does_not_begin_again_in_silence(make_config):
    config = make_config()
    fit(config, stop_after=1)
    shutil.rmtree(Path(config.run_dir) / "checkpoints")
    for _ in range(2):
        with pytest.raises(UserError, match="had reached step .*, but its checkpoints are gone"):
            fit(config)


def test_stop_writes_no_metrics_line_and_a_summary_that_says_so(make_config):
    config = make_config()
    summary = fit(config, stop_after=1)
    assert (summary["status"], summary["test_accuracy"], metrics(config)) == ("stopped", None, [])
    assert 0 < summary["step"] < 12


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True, "feature_scales": (0.01, 100.0)}], ids=["raw", "scaled"]
)
def test_evaluation_of_the_restored_best_is_that_of_the_live_one(make_config, options):
    config = make_config(data=options)
    summary = fit(config)
    result = serving.evaluate(Path(config.run_dir))
    assert result == {
        "split": "test",
        "step": summary["best_step"],
        "loss": summary["test_loss"],
        "accuracy": summary["test_accuracy"],
        "examples": 360,
    }


@pytest.mark.parametrize("batch", [7, 360, 500])
def test_evaluation_is_the_same_for_any_batch_size(make_config, monkeypatch, batch):
    built = Job(make_config())
    expected = built.evaluate(built.initial.variables, built.data.test)
    monkeypatch.setattr(job, "EVAL_BATCH", batch)
    actual = built.evaluate(built.initial.variables, built.data.test)
    assert actual["accuracy"] == expected["accuracy"]
    np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-6)


def test_finished_job_is_left_as_it_is(make_config):
    config = make_config()
    summary = fit(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*")}
    assert fit(config) == summary
    assert {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*")} == before


def test_more_steps_extend_a_finished_job_and_fewer_are_refused(make_config):
    fit(make_config())
    assert fit(make_config(steps=40))["step"] == 40
    assert [line["step"] for line in metrics(make_config())][::3] == [12, 24, 30, 36, 40]
    with pytest.raises(UserError, match="holds 40 steps of this job, now asked for 20"):
        fit(make_config(steps=20))


def test_job_that_was_killed_while_it_grew_goes_on_growing(make_config, monkeypatch):
    fit(make_config())

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.states, "train_steps", killed)
        fit(make_config(steps=40))
    assert fit(make_config(steps=40))["step"] == 40


def test_job_whose_end_was_not_noted_is_finished_by_its_checkpoint(make_config):
    config = make_config()
    summary = fit(config)
    (Path(config.run_dir) / "summary.json").unlink()
    again = fit(config)
    of_the_session = dict.fromkeys(("wall_seconds", "examples_per_second", "peak_host_bytes"))
    assert {**again, **of_the_session} == {**summary, **of_the_session}


def test_job_without_validation_ends_with_its_last_step(make_config):
    config = make_config(data={"validation": 0.0})
    summary = fit(config)
    assert summary["best_step"] == 30 and summary["test_accuracy"] is not None
    assert {line["split"] for line in metrics(config)} == {"train", "test"}


@pytest.mark.parametrize(
    "every, message, saved",
    [
        (1, "the validation loss after step 2 is not finite. Step 1 is saved. Try a lower", 1),
        (12, "the loss of step 3 is not finite. There is no checkpoint yet", None),
    ],
)
def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    make_config, every, message, saved
):
    # The first step goes nowhere, the second one away.
    broken = {"learning_rate": 1e38, "warmup_steps": 30}
    config = make_config(model={"norm": "none", "widths": (16,)}, optimizer=broken, eval_every=every)
    with pytest.raises(RunFailed, match=message):
        fit(config)
    summary = json.loads((Path(config.run_dir) / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("failed", saved)
    if saved:
        for leaf in jax.tree.leaves(final_state(config).variables):
            assert np.isfinite(leaf).all()


def test_bad_data_leaves_no_run_directory_behind(make_config):
    config = make_config(batch_size=5000)
    with pytest.raises(UserError, match="batch_size = 5000"):
        fit(config)
    assert not Path(config.run_dir).exists()
    fit(dataclasses.replace(config, batch_size=128))


def test_run_without_a_checkpoint_cannot_be_evaluated(make_config):
    from train.runs import directory as run_directory

    config = make_config()
    run_directory.create(config)
    run_directory.begin(config, Job(config).data)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        serving.evaluate(Path(config.run_dir))
