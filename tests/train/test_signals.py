"""The command under real signals, and two of them at one run directory."""

import json
import signal
import time

import pytest
from command import run, start

from train.logs import read_metrics


def wait_while_running(process, until):
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None and time.monotonic() < deadline, process.poll()
        time.sleep(0.01)


def test_ctrl_c_while_it_compiles_exits_130_without_a_traceback(tmp_path):
    process = start("configs/digits_mlp.toml", "--steps", 200000, "--run-dir", tmp_path / "run")
    wait_while_running(process, until=(tmp_path / "run").exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "a second signal ends it at once" in err and "Traceback" not in err
    assert out.splitlines()[-1].startswith("Stopped at step ")


def test_second_process_is_kept_out_of_a_run_directory_in_use(tmp_path):
    job = ["configs/digits_mlp.toml", "--steps", 200000, "--run-dir", tmp_path / "run"]
    first = start(*job)
    wait_while_running(first, until=lambda: read_metrics(tmp_path / "run"))
    second = run(*job)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 143
    assert second.returncode == 2 and "is in use by another process" in second.stderr


JOB = ["configs/digits_mlp.toml", "--steps", 5000, "--eval-every", 500]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(*JOB, "--run-dir", run_dir).returncode == 0
    return run_dir


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_job_ended_by_a_signal_resumes_to_the_same_result(tmp_path, uninterrupted, number, code):
    run_dir = tmp_path / "run"
    process = start(*JOB, "--run-dir", run_dir)
    # The second evaluation follows the first checkpoint.
    wait_while_running(process, until=lambda: len(read_metrics(run_dir)) >= 6)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    if number != signal.SIGKILL:
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["status"] == "stopped" and 0 < summary["step"] < 5000
        assert out.splitlines()[-1].startswith(f"Stopped at step {summary['step']}: ")

    resumed = run(*JOB, "--run-dir", run_dir)
    assert resumed.returncode == 0 and ", going on from step " in resumed.stdout
    # Every loss after the signal is the same to the last digit.
    without_time = [
        [{**line, "seconds": None} for line in read_metrics(path)] for path in (run_dir, uninterrupted)
    ]
    assert without_time[0] == without_time[1]
