"""A job in this process, from its first step to its last checkpoint."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.helpers.jobs import final_state, fit, results
from train.errors import RunFailed, UserError
from train.runs import checkpoints, directory
from train.runs.summary import Summary
from train.training import job, loop, prepare, steps
from train.training.trained import evaluation
from train.training.trained.evaluation import TrainedNetwork, load_best


def test_job_reports_what_it_reached_and_leaves_its_files(finished):
    config, summary, _ = finished
    run_dir, lines = Path(config.run_dir), results(config.run_dir)
    assert [(line["step"], line["split"]) for line in lines] == [
        (step, split) for step in (12, 24, 30) for split in ("train", "validation", "test")
    ]
    tests = {line["step"]: line for line in lines if line["split"] == "test"}
    quality = lambda line: (line["accuracy"], -line["loss"])
    best = max((line for line in lines if line["split"] == "validation"), key=quality)["step"]
    assert Summary(**json.loads((run_dir / "summary.json").read_text())) == summary
    assert (summary.status, summary.step, summary.best_step) == ("finished", 30, best)
    assert (summary.test_accuracy, summary.test_loss) == (tests[best]["accuracy"], tests[best]["loss"])
    assert summary.best_test_accuracy == max(line["accuracy"] for line in tests.values())
    assert 0 < summary.wall_seconds < 120 and summary.examples_per_second > 128 / 120
    assert 10e6 < summary.peak_host_bytes < 100e9
    assert summary.peak_device_bytes is None or jax.default_backend() != "cpu"
    names = "checkpoints config.json data.json environment.json metrics.jsonl summary.json tensorboard"
    assert sorted(path.name for path in run_dir.iterdir()) == names.split()
    # And it has learnt, beyond guessing.
    assert summary.best_test_accuracy > 0.7


def test_heading_says_what_is_trained_on_what(finished, make_config):
    _, _, printed = finished
    kind = jax.devices()[0].device_kind
    assert printed.splitlines()[:3] == [
        "data   digits: 1,293 train, 144 validation, 360 test examples",
        f"model  mlp: {64 * 16 + 2 * 16 + 16 * 10 + 10:,} parameters, norm batch",
        f"run    30 steps of 128 on {kind}",
    ]
    built = prepare(make_config())
    several = SimpleNamespace(total_steps=30, mesh=SimpleNamespace(size=4))
    heading = loop._heading(built._replace(step_config=several), 1200)
    assert heading.endswith(f" on 4 x {kind}, going on from step 1,200")


@pytest.mark.slow
def test_seeds_of_a_job_share_all_their_programs_and_have_their_own_orders(
    make_config, tmp_path, monkeypatch, caplog
):
    first = make_config(seed=2, run_dir=str(tmp_path / "first"))
    fit(first)
    orders, order = [], loop.data.order
    monkeypatch.setattr(loop.data, "order", lambda *given: orders.append(given) or order(*given))
    programs = (job.create, steps._many_steps, evaluation.eval_step)
    sizes = [program._cache_size() for program in programs]
    seeded = make_config(seed=3)
    with jax.log_compiles():
        fit(seeded)
    assert "Compiling" not in caplog.text
    assert [program._cache_size() for program in programs] == sizes
    assert results(seeded.run_dir) != results(first.run_dir)
    assert list(dict.fromkeys(orders)) == [(3, epoch, 1293) for epoch in range(3)]


def test_processes_with_other_data_are_refused_before_anything_is_written(finished, make_config, monkeypatch):
    """As if this were one of several processes; how they compare is in tests/train/runs/test_processes.py."""
    compared = []

    def refuse(values):
        compared.append(values)
        raise UserError("other data elsewhere")

    monkeypatch.setattr(loop.processes, "check_equal", lambda values: "seed" in values or refuse(values))
    with pytest.raises(UserError, match="other data elsewhere"):
        fit(make_config())
    assert [set(values.values()) for values in compared] == [{prepare(make_config()).data.fingerprint}]
    assert not Path(make_config().run_dir).exists()


@pytest.mark.slow
def test_processes_that_start_from_other_weights_are_refused_too(finished, make_config, monkeypatch):
    compared, (source, *_) = [], finished
    monkeypatch.setattr(loop.processes, "check_equal", compared.append)
    for seed in (0, 1):  # the weights are those of the file, whatever the seed
        config = make_config(init_from=source.run_dir, seed=seed)
        expected = checkpoints.digest(prepare(config).initial.variables)
        assert fit(config, stop_after=1).step is not None
        assert compared.pop() == {"the weights of init_from": expected}
        shutil.rmtree(config.run_dir)
    fit(make_config(), stop_after=1)
    assert "the weights of init_from" not in compared.pop()


def test_train_lines_are_means_since_the_line_before(finished, make_config):
    assert int(final_state(finished[0]).sums["examples"]) == 0
    config = make_config()
    fit(config, stop_after=1)
    state = final_state(config)
    assert int(state.sums["examples"]) == 128 * int(state.step) > 0


@pytest.mark.slow
def test_best_step_is_by_validation_and_not_by_test(make_config, monkeypatch, capsys):
    found = iter([0.2, 0.1, 0.9, 0.3, 0.5, 0.8])  # validation and test after steps 12, 24 and 30
    evaluate = lambda *_: {"loss": 2e6, "accuracy": next(found)}
    monkeypatch.setattr(TrainedNetwork, "evaluate", evaluate)
    summary = fit(make_config())
    assert (summary.best_step, summary.test_accuracy, summary.best_test_accuracy) == (24, 0.3, 0.8)
    assert load_best(Path(make_config().run_dir)).step == 24
    assert capsys.readouterr().out.count("warning: the validation loss is 2.0e+06") == 1


@pytest.mark.slow
def test_early_stopping_ends_a_job_whose_validation_no_longer_gets_better(make_config, monkeypatch):
    config = make_config(eval_every=6, early_stopping=2)
    accuracies = [0.1, 0.5, 0.4, 0.3, 0.9]
    found = iter(np.repeat(accuracies, 2).tolist())  # validation and test alike
    monkeypatch.setattr(TrainedNetwork, "evaluate", lambda *_: {"loss": 1.0, "accuracy": next(found)})
    summary = fit(config)
    assert (summary.status, summary.step, summary.test_accuracy) == ("finished", 24, 0.5)
    # Where its end was not noted, it is found again, without another step.
    (Path(config.run_dir) / "summary.json").unlink()
    assert fit(config).step == 24

    built = prepare(make_config(eval_every=6, early_stopping=2))
    for best, step, finished in (
        (None, 6, False),
        (6, 12, False),
        (6, 18, True),
        (12, 23, False),
        (30, 30, True),
    ):
        assert loop._is_finished(built, SimpleNamespace(best_step=best), step) == finished, (best, step)
    endless = prepare(make_config(eval_every=6))
    assert not loop._is_finished(endless, SimpleNamespace(best_step=6), 29)


def test_evaluation_far_from_what_training_saw_is_warned_of(finished):
    printed = []
    log = SimpleNamespace(print_once=printed.append)
    near, far = {"loss": 900.0, "accuracy": 0.5}, {"loss": 1100.0, "accuracy": 0.5}
    for norm, loss, test in (("batch", 0.1, near), ("batch", 2.0, far), ("layer", 0.1, far)):
        results = {"train": {"loss": loss, "accuracy": 1.0}, "validation": near, "test": test}
        loop._warn_if_far(norm, results, log)
    assert printed == [] and "warning" not in finished[2]
    loop._warn_if_far(
        "batch", {"train": {"loss": 0.1, "accuracy": 1.0}, "validation": near, "test": far}, log
    )
    (warning,) = printed
    assert warning.startswith(
        "warning: the test loss is 1.1e+03, in training it was 1.0e-01. Running statistics"
    )
    assert warning.endswith("Use larger batches, or scale the data.")


@pytest.fixture
def dispatched(monkeypatch):
    """Note where in its epoch each dispatch starts and how many steps it takes."""
    spans, train_steps = [], steps.train_steps

    def spy(config, state, inputs, order, start, count, *, loop):
        spans.append((start // config.batch_size, count))
        return train_steps(config, state, inputs, order, start, count, loop=loop)

    monkeypatch.setattr(steps, "train_steps", spy)
    return spans


@pytest.mark.slow
def test_steps_of_one_dispatch_stay_inside_their_epoch_and_evaluation(make_config, monkeypatch, dispatched):
    monkeypatch.setattr(loop, "SECONDS_PER_DISPATCH", 1e9)
    fit(make_config())
    # Doubling, up to the ends of the epochs (10, 20, 30) and the evaluations (12, 24, 30).
    assert dispatched == [(0, 1), (1, 2), (3, 4), (7, 3), (0, 2), (2, 8), (0, 4), (4, 6)]


@pytest.mark.slow
def test_steps_of_one_dispatch_are_those_that_the_processes_agree_on(make_config, monkeypatch, dispatched):
    monkeypatch.setattr(loop, "SECONDS_PER_DISPATCH", 1e9)
    monkeypatch.setattr(loop.processes, "agree", lambda steps, stop: (2, 0))  # another process is slower
    fit(make_config(steps=5))
    assert dispatched == [(0, 1), (1, 2), (3, 2)]


@pytest.mark.slow
def test_rate_is_of_training_alone_without_the_dispatch_that_compiles(make_config, monkeypatch):
    """With a clock that advances by a second whenever it is read."""
    seconds = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(loop.time, "perf_counter", lambda: next(seconds))
        patch.setattr(loop, "SECONDS_PER_DISPATCH", 0)  # one step each
        summary = fit(make_config(), stop_after=7)
    assert summary.examples_per_second == 128 and summary.wall_seconds > 7
    assert fit(make_config(run_dir=f"{make_config().run_dir}2"), stop_after=1).examples_per_second is None


def test_as_many_steps_are_traced_as_asked_for_after_the_dispatch_that_compiles(
    make_config, monkeypatch, dispatched
):
    at = []

    class Trace:
        def __init__(self, path):
            assert Path(path).name == "profile"

        def __enter__(self):
            at.append(len(dispatched))

        def __exit__(self, *_):
            at.append(len(dispatched))

    monkeypatch.setattr(jax.profiler, "trace", Trace)
    fit(make_config(profile=5), stop_after=5)
    started, stopped = at
    assert dispatched[:started] == [(0, 1)]
    assert sum(count for _, count in dispatched[started:stopped]) == 5 and len(dispatched) > stopped
    # A process that does not write takes the same steps.
    spans = dispatched[:stopped]
    dispatched.clear()
    monkeypatch.setattr(loop.processes, "is_primary", lambda: False)
    config = make_config(run_dir=f"{make_config().run_dir}2", profile=5)
    Path(config.run_dir).mkdir()
    fit(config, stop_after=5)
    assert at == [started, stopped] and dispatched[:stopped] == spans


@pytest.mark.slow
def test_trace_of_a_job_that_fails_is_ended_and_written(make_config):
    # The first step goes nowhere, the second one away.
    broken = {"learning_rate": 1e38, "warmup_steps": 30}
    config = make_config(model={"norm": "none", "widths": (16,)}, optimizer=broken, profile=20)
    with pytest.raises(RunFailed, match="not finite"):
        fit(config)
    (trace,) = Path(config.run_dir).glob("profile/**/*.xplane.pb")
    assert b"many_steps" in trace.read_bytes()


@pytest.mark.slow
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
    broken = {"learning_rate": 1e38, "warmup_steps": 30}
    config = make_config(model={"norm": "none", "widths": (16,)}, optimizer=broken, eval_every=every)
    with pytest.raises(RunFailed, match=message):
        fit(config)
    summary = json.loads((Path(config.run_dir) / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("failed", saved)
    if saved:
        for leaf in jax.tree.leaves(final_state(config).variables):
            assert np.isfinite(leaf).all()


@pytest.mark.slow
def test_job_without_validation_ends_with_its_last_step(make_config):
    config = make_config(data={"validation": 0.0})
    summary = fit(config)
    assert summary.best_step == 30 and summary.test_accuracy is not None
    assert {line["split"] for line in results(config.run_dir)} == {"train", "test"}


def test_job_that_another_one_overtakes_while_it_is_prepared_writes_nothing(make_config, monkeypatch):
    prepared = prepare(make_config())
    for other, length, message in (
        (make_config(seed=1), 30, "holds another job: seed = 1, now 0"),
        (make_config(steps=60), 60, "steps: expected at least the 60 steps that"),
    ):
        run_dir = Path(other.run_dir)

        def overtaken(config, dataset, other=other, length=length, run_dir=run_dir):
            with directory.created_and_locked(run_dir):
                directory.begin(other, prepared.data)
            (run_dir / "summary.json").write_text(json.dumps({"status": "finished", "step": length}))
            return prepared

        monkeypatch.setattr(loop, "prepare", overtaken)
        with pytest.raises(UserError, match=message):
            fit(make_config())
        assert directory.read_config(run_dir) == other and (run_dir / "summary.json").exists()
        shutil.rmtree(run_dir)
