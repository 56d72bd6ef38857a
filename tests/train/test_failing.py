"""The real command where something is broken: a short message with the fix, and nothing lost that was saved."""

import resource
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT, run

from train.logs import read_metrics

JOB = ["configs/digits_mlp.toml", "--steps", "40", "--eval-every", "10", "--model.widths", "256", "256"]


def run_limited(*arguments, limit, amount):
    """Runs the command in a process that may not have more of something."""
    return subprocess.run(
        [sys.executable, "-m", "train", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(limit, (amount, amount)),
    )


def assert_explained(done, code, *parts):
    assert done.returncode == code, done
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 4


def losses(run_dir):
    return [{**line, "seconds": None} for line in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(*JOB, "--run-dir", run_dir).returncode == 0
    return run_dir


@pytest.mark.parametrize("limit", [0, 2000, 100_000])  # nothing; up to small files; up to checkpoints
def test_disk_that_is_full_is_named_and_the_job_goes_on_once_there_is_room(tmp_path, uninterrupted, limit):
    run_dir = tmp_path / "run"
    assert run(*JOB[:1], "--steps", "20", *JOB[3:], "--run-dir", run_dir).returncode == 0
    done = run_limited(*JOB, "--run-dir", run_dir, limit=resource.RLIMIT_FSIZE, amount=limit)
    assert_explained(done, 1, "File too large", "What was saved before is kept", "make room")
    resumed = run(*JOB, "--run-dir", run_dir)
    assert resumed.returncode == 0, resumed
    assert [line["step"] for line in losses(run_dir)][::3] == [10, 20, 30, 40]


def test_network_that_memory_does_not_hold_is_said_to_be_too_large(tmp_path):
    job = [*JOB[:5], "--model.widths", 10**8, "--run-dir", tmp_path / "run"]
    done = run_limited(*job, limit=resource.RLIMIT_AS, amount=2**34)
    assert_explained(done, 1, "failed: out of memory", "smaller batch_size", "optimizer.accumulate")


def test_batch_that_devices_cannot_share_is_named_with_one_that_they_can(tmp_path):
    flags = ["--batch-size", 130, "--run-dir", tmp_path / "run"]
    done = run(*JOB, *flags, JAX_NUM_CPU_DEVICES="4")
    assert_explained(done, 2, "batch_size = 130 cannot be split evenly over 4 devices; wanted 132, say")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch-size", 5000], "batch_size = 5000, but there are 1293 training examples; wanted"),
        (["--run-dir", "/proc/run"], "run_dir = '/proc/run' cannot be used"),
        (["--data.name", "mnist", "--data.path", "{tmp}/cut.npz"], "cut.npz cannot be read"),
        (["--data.name", "cifar10", "--data.path", "{tmp}"], "has nothing of the kind; wanted"),
    ],
)
def test_what_the_user_can_mend_exits_2_and_leaves_nothing(tmp_path, flags, message):
    np.savez(tmp_path / "whole.npz", x_train=np.zeros((9, 2)), y_train=np.arange(9))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    flags = [str(flag).replace("{tmp}", str(tmp_path)) for flag in flags]
    assert_explained(run(*JOB, "--run-dir", tmp_path / "run", *flags), 2, message)
    assert not (tmp_path / "run").exists()
