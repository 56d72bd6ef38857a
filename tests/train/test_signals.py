"""The command under real signals, and two of them at one run directory."""

import json
import random
import signal
import time

import jax
import pytest
from command import finish, run, start
from numpy.testing import assert_array_equal

from train.runs import directory as run_directory
from train.runs.checkpoints import Checkpoints
from train.runs.log import read_metrics
from train.training.job import Job


def wait_while_running(process, until):
    """Waits for a condition; returns whether it came before the process ended."""
    deadline = time.monotonic() + 120
    while not until():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return True


def test_ctrl_c_while_it_compiles_exits_130_without_a_traceback(tmp_path):
    process = start("configs/digits_mlp.toml", "--steps", 200000, "--run-dir", tmp_path / "run")
    assert wait_while_running(process, until=(tmp_path / "run").exists)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130, done
    assert "a second signal ends it at once" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("Stopped at step ")


def test_second_process_is_kept_out_of_a_run_directory_in_use(tmp_path):
    job = ["configs/digits_mlp.toml", "--steps", 200000, "--run-dir", tmp_path / "run"]
    first = start(*job)
    assert wait_while_running(first, until=lambda: read_metrics(tmp_path / "run"))
    second = run(*job)
    first.send_signal(signal.SIGTERM)
    assert finish(first).returncode == 143
    assert second.returncode == 2 and "is in use by another process" in second.stderr


# Most of its time goes into checkpoints, so that many of the kills come while one is being saved.
JOB = [
    *("configs/digits_mlp.toml", "--steps", 300, "--eval-every", 10, "--data.shift", 1),
    *("--optimizer.average", 0.9),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(*JOB, "--run-dir", run_dir).returncode == 0
    return run_dir


def assert_same_bits(run_dir, wanted):
    """Compares every loss and accuracy, and every number of the last checkpoint."""
    lines = [[{**line, "seconds": None} for line in read_metrics(path)] for path in (run_dir, wanted)]
    assert lines[0] == lines[1]
    states = []
    for path in (run_dir, wanted):
        with Checkpoints(path) as checkpoints:
            initial = Job(run_directory.read_config(path)).initial
            states.append(checkpoints.restore(checkpoints.latest_step, initial))
    jax.tree.map(assert_array_equal, *states)


def test_job_stopped_by_signals_resumes_to_the_same_bits(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process, before = start(*JOB, "--run-dir", run_dir), len(read_metrics(run_dir))
        assert wait_while_running(process, until=lambda at=before + 8: len(read_metrics(run_dir)) > at)
        process.send_signal(number)
        done = finish(process)
        assert done.returncode == code, done
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["status"] == "stopped" and 0 < summary["step"] < 300
        assert done.stdout.splitlines()[-1].startswith(f"Stopped at step {summary['step']}: ")
        # It saved where it was, and lost nothing.
        lines = read_metrics(run_dir)
        assert lines[-1]["step"] == summary["step"] // 10 * 10
    assert run(*JOB, "--run-dir", run_dir).returncode == 0
    assert_same_bits(run_dir, uninterrupted)


def test_job_killed_at_many_moments_resumes_to_the_same_bits(tmp_path, uninterrupted):
    run_dir, moments, saving = tmp_path / "run", random.Random(0), 0
    for kill in range(12):
        process, before = start(*JOB, "--run-dir", run_dir), len(read_metrics(run_dir))
        assert wait_while_running(process, until=lambda at=before: len(read_metrics(run_dir)) > at)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        assert finish(process).returncode == -signal.SIGKILL
        saving += any("tmp" in path.name for path in (run_dir / "checkpoints").iterdir())
        if kill >= 5 and saving:  # that is, some kills came in the middle of a checkpoint
            break
    assert saving
    done = run(*JOB, "--run-dir", run_dir)
    assert done.returncode == 0 and ", going on from step " in done.stdout
    assert_same_bits(run_dir, uninterrupted)
