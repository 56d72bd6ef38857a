"""The command when something goes wrong: a short message with the fix, an exit code, and nothing lost.

Disks are filled, memory is limited and files are broken for real. Where a process of its own would prove
nothing more, the command runs in this one.
"""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command import JOB, assert_short
from tests.helpers.jobs import results

pytestmark = pytest.mark.slow

# A full disk.

LIMIT_FILES = """
import jax, resource
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1000)  # leaves the tests' own cache whole
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""


@pytest.mark.parametrize("size, what", [(200, "File too large"), (4000, "step 5 could not be saved")])
def test_job_that_finds_no_room_says_so_and_resumes_to_the_same_result(
    tmp_path, forks, command, finished, size, what
):
    """By a limit on the size of a file, at which the system sends SIGXFSZ too, which Python ignores."""
    job = [*JOB, "--run-dir", tmp_path / "run"]
    done = forks.run(*job, before=LIMIT_FILES.format(size=size))
    assert done.returncode == 1
    assert_short(done.stderr, "failed: ", what, "File too large", "make room, and start again")
    saved = (tmp_path / "run" / "checkpoints").iterdir()
    assert not any(path.name.isdigit() for path in saved)
    assert done.stderr.count("\n") == 1
    assert command(*job)[0] == 0
    assert results(tmp_path / "run") == results(finished)


def test_file_that_finds_the_disk_full_ends_the_run_which_resumes_to_the_same_result(
    command, finished, run_dir
):
    job = [*JOB, "--run-dir", run_dir]
    for name in (".config.json.tmp", ".metrics.jsonl.tmp", ".summary.json.tmp"):
        # As it was before its last evaluation, when it was killed.
        (run_dir / "summary.json").unlink()
        shutil.rmtree(run_dir / "checkpoints" / "20")
        (run_dir / name).symlink_to("/dev/full")
        code, _, complaint = command(*job)
        assert code == 1, name
        assert_short(complaint, "failed: No space left on device", "make room, and start again")
        (run_dir / name).unlink()
        assert command(*job)[0] == 0
        assert results(run_dir) == results(finished)
        assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"


def test_run_directory_that_cannot_be_made_is_named(command):
    for place, reason in (
        ("/dev/null/run", "Not a directory"),
        ("/proc/run", "No such file"),
        ("a" * 300, "File name too long"),
    ):
        code, _, complaint = command(*JOB, "--run-dir", place)
        assert code == 2
        assert_short(complaint, "error: run_dir = '", reason, "Give another --run_dir")


def test_run_directory_that_may_only_be_read_is_named_and_still_evaluated(
    command, finished, run_dir, monkeypatch
):
    """Simulated, for permissions do not bind everyone: whoever writes a file is refused."""
    (run_dir / "summary.json").unlink()  # or there would be nothing to do

    def refused(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refused)
        code, _, complaint = command(*JOB, "--run-dir", run_dir)
        assert code == 2
        assert_short(complaint, f"error: run_dir = '{run_dir}' cannot be used", "Read-only file system")
        code, _, complaint = command("eval", run_dir)
        assert (code, complaint) == (0, "")
    assert results(run_dir) == results(finished)


# Memory.

LIMIT_MEMORY = """
import re, resource
from pathlib import Path
now = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30,) * 2)
"""


def test_network_or_batch_that_memory_does_not_hold_is_refused_with_what_helps(tmp_path, forks):
    network = forks.run(*JOB, "--model.widths", 10**9, "--run-dir", tmp_path / "network", before=LIMIT_MEMORY)
    flags = ["--model.widths", 160_000, "--batch-size", 1290, "--run-dir", tmp_path / "batch"]
    batch = forks.run(*JOB, *flags, before=LIMIT_MEMORY)
    for done in (network, batch):
        assert done.returncode == 1, done
        assert_short(done.stderr, "failed: out of memory (", "GiB more)", "smaller batch_size")
    # The network was still to be made when memory ran out; the other one was being trained.
    assert not (tmp_path / "network").exists()
    assert json.loads((tmp_path / "batch" / "summary.json").read_text())["status"] == "failed"


# A loss that is not finite.


def test_diverged_job_keeps_its_last_good_checkpoint_and_says_what_to_change(tmp_path, command):
    job = [*JOB, "--optimizer.schedule", "constant", "--run-dir", tmp_path / "run"]
    # Nothing is learnt at first, and then far too much.
    diverging = [
        *job,
        "--model.norm",
        "none",
        "--optimizer.learning-rate",
        "1e38",
        "--optimizer.warmup-steps",
        "20",
    ]
    code, _, complaint = command(*diverging, "--eval-every", "1")
    assert code == 1
    assert_short(
        complaint, "failed: the ", "is not finite", "Step 1 is saved", "lower optimizer.learning_rate"
    )
    assert command(*diverging, "--eval-every", "1")[::2] == (1, complaint)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"

    mended = [*diverging, "--eval-every", "1", "--optimizer.learning-rate", "0.01"]
    code, _, complaint = command(*mended)
    assert code == 2
    assert_short(complaint, "learning_rate = 1e+38, now 0.01", "Give another --run_dir")


# Configs, data and devices.


def test_config_that_makes_no_sense_is_refused_in_a_line_that_names_the_mistake(tmp_path, command):
    path = tmp_path / "job.toml"
    for content, expected in (
        (b"", "expected either steps or epochs"),
        (bytes(range(256)), "cannot be read as TOML"),
        ("seed = 1".encode("utf-16"), "cannot be read as TOML"),
        (b"steps = ", "cannot be read as TOML"),
        (b"steps = 1\nsteps = 2", "cannot be read as TOML"),
        (b"steps = 1\nepochs = 1", "expected either steps or epochs"),
        (b"steps = -1", "steps: expected a number >= 1, got -1"),
        (b"steps = 99999999999999999999", "steps: expected"),
        (b"epochs = inf", "epochs: expected"),
        (b"steps = 1\noptimizer.learning_rate = nan", "optimizer.learning_rate: expected"),
        (
            b"steps = 1\noptimizer.accumulate = 3",
            "batch_size: expected a multiple of optimizer.accumulate = 3",
        ),
        (b"steps = 1\nmodel.norm = 'group'\nmodel.norm_groups = 7", "model.norm_groups: expected a divisor"),
        (b"base = 'job.toml'", "inherits from itself"),
        (b"base = '.'", "it is a folder, a pipe or a device"),
        (b"base = 'nothing.toml'", "nothing.toml does not exist"),
        (b"epocs = 1", "epocs is not a key; perhaps you meant epochs"),
        (b"steps = 1\n[optimiser]\nname = 'sgd'", "perhaps you meant optimizer"),
        (b"steps = 1\nmodel = 3", "model: expected"),
        (b"steps = 1\nseed = 'zero'", "seed: expected"),
        (b"steps = 1\nseed = [1, 2]", "seed: expected"),
        (b"steps = 1\nseed = 2020-01-01", "seed: expected"),
        ("steps = 1\nmodel.name = 'mlp☃'".encode(), "model.name: expected 'mlp'"),
        ("steps = 1\n'☃' = 1".encode(), "☃ is not a key"),
    ):
        path.write_bytes(content)
        code, _, complaint = command(path, "--num-processes", "1", "--run-dir", tmp_path / "run")
        assert code == 2, content
        assert_short(complaint, "error: ", expected)
    assert not (tmp_path / "run").exists()


def npz(labels=40):
    images, classes, file = np.zeros((40, 4, 4), np.uint8), np.arange(labels) % 3, io.BytesIO()
    np.savez(file, x_train=images, y_train=classes, x_test=images, y_test=classes)
    return file.getvalue()


def test_data_that_cannot_be_used_are_named(tmp_path, command):
    for number, (make, expected) in enumerate(
        (
            (lambda path: None, "does not exist; expected an .npz file with x_train"),
            (lambda path: path.mkdir(), "expected an .npz file with x_train"),
            (lambda path: path.write_bytes(b""), "cannot be read"),
            (lambda path: path.write_bytes(npz(labels=39)), "expected one label in y_train for each"),
        )
    ):
        path = tmp_path / f"data{number}"
        make(path)
        data = ["--data.name", "npz", "--data.path", path]
        code, _, complaint = command(*JOB, *data, "--run-dir", tmp_path / "run")
        assert code == 2
        assert_short(complaint, "error: ", str(path), expected)
    assert not (tmp_path / "run").exists()


def test_batches_and_devices_that_do_not_fit_are_refused_with_what_does(tmp_path, command):
    for flags, expected in (
        ("--batch-size 1294", "batch_size: expected at most the 1293 training examples, got 1294"),
        ("--devices 99", "devices: expected at most 1, the number of devices here, got 99"),
    ):
        code, _, complaint = command(*JOB, "--run-dir", tmp_path / "run", *flags.split())
        assert code == 2
        assert_short(complaint, "error: ", expected)
    assert not (tmp_path / "run").exists()
