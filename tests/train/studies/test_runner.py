"""Jobs one after the other: each has its turn, whatever became of those before it."""

import signal
from pathlib import Path

import jax
import pytest

from tests.helpers.jobs import StopAfter
from train.errors import RunFailed, Stopped, UserError
from train.runs import processes
from train.runs.files import write_json
from train.runs.stopping import StopRequests
from train.runs.summary import Summary
from train.studies import runner
from train.training import steps

REFUSED, FAILED = UserError("no such data; give another --run_dir."), RunFailed("not finite.")
NO_MEMORY = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nand so on")


@pytest.fixture
def train(monkeypatch, tmp_path, make_config):
    """Returns a function that runs jobs that end like this: "finished", "stopped", or with an error."""

    def train(*ends, received=None, **keys):
        stop, seen, remaining = StopRequests(), [], iter(ends)
        stop.received = received

        def fit(config, stop):
            end = next(remaining)
            if isinstance(end, Stopped):
                stop.received = end.number
            if isinstance(end, BaseException):
                raise end
            stop.received = signal.SIGTERM if end == "stopped" else stop.received
            return Summary(end, step=7)

        monkeypatch.setattr(runner, "fit", fit)
        options = [dict(zip(keys, values)) for values in zip(*keys.values())] or [{}] * len(ends)
        jobs = [make_config(run_dir=str(tmp_path / f"{n}"), **each) for n, each in enumerate(options)]
        outcomes = runner.train_all(jobs, stop, lambda outcomes: seen.append(list(outcomes)))
        assert outcomes == seen[-1]
        return runner.exit_code(outcomes, len(jobs), stop), seen

    return train


def test_every_job_has_its_turn_and_the_exit_code_is_that_of_the_worst(train):
    alone = {"finished": 0, REFUSED: 2, FAILED: 1, NO_MEMORY: 1}
    for ends, code in (
        (["finished"], 0),
        (["finished", FAILED, "finished"], 1),
        ([REFUSED, "finished", FAILED], 2),
        ([NO_MEMORY, "finished"], 1),
    ):
        found, seen = train(*ends)
        codes = [[job.exit_code for job in outcomes] for outcomes in seen]
        assert found == code and codes == [[alone[e] for e in ends[: n + 1]] for n in range(len(ends))], ends
    with pytest.raises(ZeroDivisionError):  # a fault of the program is not passed over
        train("finished", ZeroDivisionError(), "finished")


def test_outcome_has_the_summary_and_the_error_and_is_printed(train, capsys, tmp_path):
    for n in (1, 2):
        (tmp_path / f"{n}").mkdir()
        write_json(tmp_path / f"{n}/summary.json", {"status": "failed", "step": 12})
    _, (*_, outcomes) = train("finished", REFUSED, FAILED, NO_MEMORY)
    assert [(outcome.status, outcome.summary, outcome.error) for outcome in outcomes[:3]] == [
        ("finished", Summary("finished", step=7), None),
        ("refused", None, "no such data; give another --out."),  # the directory may be another job's
        ("failed", Summary("failed", step=12), "not finite."),
    ]
    assert outcomes[3].summary is None and "Try a smaller batch_size" in outcomes[3].error
    assert capsys.readouterr().out.splitlines()[1:5] == [
        f"[2/4] {tmp_path}/1",
        "refused: no such data; give another --out.",
        f"[3/4] {tmp_path}/2",
        "failed: not finite.",
    ]


def test_stop_ends_all_with_its_signal_unless_nothing_is_left(train):
    for ends, received, code, begun in (
        (["stopped", "finished", "finished"], None, 143, 1),
        ([REFUSED, FAILED, "stopped", "finished"], None, 143, 3),
        (["finished", Stopped(signal.SIGINT), "finished"], None, 130, 2),  # while it read its data
        (["finished", "finished"], signal.SIGINT, 130, 1),  # came too late for the first
        ([FAILED, "finished"], signal.SIGINT, 130, 1),
        (["finished"], signal.SIGINT, 0, 1),
    ):
        found, seen = train(*ends, received=received)
        assert (found, len(seen[-1])) == (code, begun), ends


def test_stop_that_another_process_received_between_jobs_ends_all_here_too(train, monkeypatch):
    monkeypatch.setattr(processes, "max_over_processes", lambda steps, received: [steps, signal.SIGTERM])
    found, seen = train("finished", "finished")
    assert (found, len(seen[-1])) == (143, 1)


def test_programs_are_dropped_only_before_a_job_that_has_others(train, monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    rates = [{"learning_rate": rate} for rate in (0.1, 0.1, 0.1, 0.2, 0.2)]
    train(*["finished"] * 5, seed=[0, 1, 2, 0, 1], optimizer=rates)
    assert len(cleared) == 1
    for keys in ({"batch_size": [64, 128]}, {"steps": [30, 31]}, {"data": [{}, {"flip": True}]}):
        cleared.clear()
        train("finished", "finished", **keys)
        assert len(cleared) == 1, keys


@pytest.mark.slow
def test_jobs_that_differ_in_their_seed_share_their_compiled_programs(make_config, tmp_path):
    small, counts = dict(steps=1, model={"widths": (4,)}), []
    jobs = [make_config(run_dir=str(tmp_path / f"{seed}"), seed=seed, **small) for seed in (0, 1)]
    programs = (steps._one_step, steps._many_steps, steps.eval_step)
    runner.train_all(jobs, StopAfter(), lambda _: counts.append([f._cache_size() for f in programs]))
    assert counts[0] == counts[1] and sum(counts[0]) >= 2
    losses = [(Path(job.run_dir) / "metrics.jsonl").read_text() for job in jobs]
    assert losses[0] != losses[1] and all(losses)
