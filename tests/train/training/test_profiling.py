from pathlib import Path

import jax
import pytest

from train.errors import RunFailed
from train.runs.stopping import StopRequests
from train.training import loop
from train.training.profiling import Profiler


@pytest.fixture
def traced(monkeypatch):
    """Notes when a trace starts and stops, instead of making one."""
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: events.append(f"start {Path(path).name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    return events


def test_as_many_steps_are_traced_as_asked_for(tmp_path, traced):
    with Profiler(tmp_path, 5, writes=True) as profiler:
        for wanted, steps in ((3, 3), (4, 2), (4, 4)):
            assert profiler.before(wanted) == steps
            profiler.after(steps)
            traced.append(steps)
    assert traced == ["start profile", 3, "stop", 2, 4]


@pytest.mark.parametrize("steps, events", [(0, []), (9, ["start profile", "stop"])])
def test_job_that_ends_before_ends_its_trace(tmp_path, traced, steps, events):
    with Profiler(tmp_path, steps, writes=True) as profiler:
        assert profiler.before(3) == 3
        profiler.after(3)
    assert traced == events


def test_job_that_fails_ends_its_trace(tmp_path, traced):
    with pytest.raises(ZeroDivisionError), Profiler(tmp_path, 5, writes=True) as profiler:
        profiler.before(3)
        raise ZeroDivisionError
    assert traced == ["start profile", "stop"]


def test_job_whose_loss_is_not_finite_ends_its_trace(make_config, monkeypatch, traced):
    monkeypatch.setattr(loop.curves, "draw", lambda run_dir: None)
    broken = {"learning_rate": 1e38, "warmup_steps": 30}  # the first step goes nowhere, the second one away
    config = make_config(model={"norm": "none", "widths": (16,)}, optimizer=broken, profile=20)
    with pytest.raises(RunFailed, match="not finite"):
        loop.fit(config, StopRequests())
    assert traced == ["start profile", "stop"]


def test_processes_that_write_nothing_take_the_same_steps(tmp_path, traced):
    with Profiler(tmp_path, 5, writes=False) as profiler:
        assert (profiler.before(9), profiler.after(5), profiler.before(9)) == (5, None, 9)
    assert traced == []


def test_job_leaves_a_trace_of_steps_after_the_one_that_compiles(make_config, monkeypatch):
    taken, train_steps = [], loop.states.train_steps

    def spy(recipe, state, source, order, start, steps, loop):
        taken.append(steps)
        return train_steps(recipe, state, source, order, start, steps, loop=loop)

    def noted(name):
        do = getattr(jax.profiler, name)
        return lambda *arguments: (taken.append(name), do(*arguments))

    monkeypatch.setattr(loop.curves, "draw", lambda run_dir: None)
    monkeypatch.setattr(loop.states, "train_steps", spy)
    monkeypatch.setattr(jax.profiler, "start_trace", noted("start_trace"))
    monkeypatch.setattr(jax.profiler, "stop_trace", noted("stop_trace"))
    config = make_config(profile=5)
    assert loop.fit(config, StopRequests())["step"] == 30
    start, stop = taken.index("start_trace"), taken.index("stop_trace")
    assert taken[:start] == [1] and sum(taken[start + 1 : stop]) == 5
    (trace,) = Path(config.run_dir).glob("profile/**/*.xplane.pb")
    assert b"many_steps" in trace.read_bytes()
