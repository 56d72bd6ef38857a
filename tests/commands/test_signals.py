"""One job as a user runs it, stopped by signals, killed at chosen moments, resumed, and evaluated."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time

import jax
import pytest
from numpy.testing import assert_array_equal

from tests.helpers.command import ENVIRONMENT, ROOT, finish, run, start
from tests.helpers.jobs import final_state, results
from train.runs import directory, processes
from train.training import steps

pytestmark = pytest.mark.slow

JOB = ["configs/digits_mlp.toml", "--epochs", "30", "--eval-every", "50", "--devices", "1"]


def wait(process, until):
    """Wait for a condition that comes before the process ends."""
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("signals")


@pytest.fixture
def uninterrupted(folder, command):
    """Train the job in one go, once for all tests; return its run directory."""
    if not (folder / "uninterrupted").exists():
        code, _, complaint = command(*JOB, "--run-dir", folder / "uninterrupted")
        assert (code, complaint) == (0, "")
    return folder / "uninterrupted"


def assert_same_bits(run_dir, expected):
    """Compare every loss and accuracy, and every number of the last checkpoint."""
    assert results(run_dir) == results(expected)
    states = [final_state(directory.read_config(path)) for path in (run_dir, expected)]
    jax.tree.map(assert_array_equal, *states)


def test_job_that_signals_stop_resumes_to_the_same_bits_in_a_terminal_and_is_evaluated(
    folder, command, uninterrupted
):
    run_dir = folder / "run"
    job = [*JOB, "--run-dir", run_dir]

    # Ctrl-C while it compiles.
    process = start(*job)
    wait(process, until=run_dir.exists)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130, done
    assert "a second signal ends it at once" in done.stderr and "Traceback" not in done.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped" and 0 < summary["step"] < 50
    assert done.stdout.splitlines()[-1].startswith(f"Stopped at step {summary['step']}: no evaluation yet.")

    # SIGTERM while it trains, after another process was kept out of its run directory.
    process = start(*job)
    wait(process, until=lambda: results(run_dir))
    process.send_signal(signal.SIGSTOP)
    code, _, complaint = command(*job)
    assert code == 2 and "is in use by another process" in complaint
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    done = finish(process)
    assert done.returncode == 143, done
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped" and 50 <= summary["step"] < 300
    assert done.stdout.splitlines()[-1].startswith(f"Stopped at step {summary['step']}: test accuracy 0.")
    # It has saved where it was, and lost nothing.
    assert results(run_dir)[-1]["step"] == summary["step"] // 50 * 50

    code, shown = in_a_terminal(*job)
    assert code == 0, shown
    assert f"going on from step {summary['step']}" in shown
    assert "steps/s" in shown and "300" in shown
    # Its last line takes the place of the progress bar.
    last, summary = (
        shown.splitlines()[-1].rpartition("\x1b[2K")[2],
        json.loads((run_dir / "summary.json").read_text()),
    )
    assert last == (
        f"Finished at step 300: test accuracy {summary['test_accuracy']:.4f} at step "
        f"{summary['best_step']}, the best by validation. Files: {run_dir}. "
        f"Evaluate: python -m train eval {run_dir}"
    )
    assert summary["status"] == "finished" and summary["test_accuracy"] >= 0.97
    assert_same_bits(run_dir, uninterrupted)
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")

    done = run("eval", run_dir)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    evaluated = json.loads(done.stdout)
    assert (evaluated["accuracy"], evaluated["loss"]) == (summary["test_accuracy"], summary["test_loss"])

    code, printed, _ = command(*job)  # finished, it says so again
    assert (code, printed.splitlines()) == (0, [last])


def test_signal_is_noted_although_jax_has_taken_it_to_connect_processes(
    tmp_path, command, uninterrupted, monkeypatch
):
    def take_signals(config):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def send_signal(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_steps(*arguments, **options)

    train_steps = steps.train_steps
    monkeypatch.setattr(processes, "initialize", take_signals)
    monkeypatch.setattr(steps, "train_steps", send_signal)
    code, printed, _ = command(*JOB, "--run-dir", tmp_path / "run")
    assert code == 143 and printed.splitlines()[-1].startswith("Stopped at step 1: no evaluation yet.")


def test_job_outlasts_its_reader_also_where_names_of_files_are_said_to_be_ascii(tmp_path):
    run_dir = tmp_path / "l\u00e4uft"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    job = [JOB[0], "--steps", 20, "--eval-every", 5, "--devices", 1, "--run-dir", run_dir]
    with start(*job, **locale) as process:
        assert process.stdout.readline().startswith("data   digits")
        process.stdout.close()  # as `| head -n 1` does
        assert process.stderr.read() == "" and process.wait(120) == 0
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"
    assert directory.read_config(run_dir).run_dir == str(run_dir)


def in_a_terminal(*arguments):
    """Run the command in a terminal; return its exit code and what it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that its program has ended
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    return process.wait(), shown.decode()


# Kills the process when it is about to rename or remove a file or folder, which Python's audit events tell.
KILL = """
import os, re, signal, sys
def kill(event, arguments):
    if event == {event!r} and re.search({path!r}, str(arguments[0])):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
"""


def test_job_that_is_killed_at_the_worst_moments_resumes_to_the_same_bits(
    tmp_path, forks, command, uninterrupted
):
    job, folder = [*JOB, "--run-dir", tmp_path / "run"], tmp_path / "run" / "checkpoints"
    for event, path, left in (
        # The first checkpoint is being written; some of its parts are whole.
        ("os.rename", r"/50\.\S*tmp/model", {"50.orbax-checkpoint-tmp"}),
        # The first one is being deleted, after the third was saved.
        ("os.rmdir", "^model$", {"50", "100", "150"}),
        # The fourth one is written, but has not got its name.
        ("os.rename", r"/200\.[^/]*tmp$", {"50", "100", "150", "200.orbax-checkpoint-tmp"}),
    ):
        done = forks.run(*job, before=KILL.format(event=event, path=path))
        assert done.returncode == -signal.SIGKILL, done
        assert {entry.name for entry in folder.iterdir()} == left
    assert not (folder / "50" / "model" / "_METADATA").exists()
    code, printed, _ = command(*job)
    assert code == 0 and "going on from step 150" in printed
    assert_same_bits(tmp_path / "run", uninterrupted)
