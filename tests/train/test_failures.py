"""The command when something goes wrong: a short message with the fix, an exit code, and nothing lost.

Disks are filled, memory is limited and files are broken for real. Where a process of its own would add
nothing, the command runs in this one.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT, finish

from train.__main__ import main
from train.runs.log import read_metrics

CONFIG = "configs/digits_mlp.toml"
JOB = [CONFIG, "--steps", "20", "--eval-every", "5", "--model.widths", "16", "--devices", "1"]
JOB += ["--num-processes", "1"]  # asks no cluster, which in a process that has computed already it cannot
# The tests' cache of compiled programs, which several processes or one that may not write would tear.
ONLY_READ = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}


@pytest.fixture
def command(capfd, monkeypatch):
    """Runs the command in this process: returns its exit code, and what it printed and complained of."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # how tyro ends
            code = exit.code
        return code, *capfd.readouterr()

    return run


def start(*arguments, limits=(), wrapper=(), **environment):
    """Starts the command in a process with limits on its resources."""
    code = "import resource, runpy, sys\n"
    for limit, value in limits:
        code += f"resource.setrlimit(resource.{limit}, ({value}, {value}))\n"
    code += "sys.argv[0] = 'train'; runpy.run_module('train', run_name='__main__', alter_sys=True)"
    command = [*wrapper, sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=os.environ | environment, **pipes)


def assert_short(complaint, *wanted):
    """Asserts that it is a line or two, in plain words, which has all of these in it."""
    assert len(complaint.strip().splitlines()) <= 2 and len(complaint) < 1000, complaint
    assert "Traceback" not in complaint and "RESOURCE_EXHAUSTED" not in complaint
    for text in wanted:
        assert text in complaint


def results(run_dir):
    return [{**line, "seconds": None} for line in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of JOB that nothing interrupted, in a process of its own."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = finish(start(*JOB, "--run-dir", run_dir))
    assert (done.returncode, done.stderr) == (0, "")
    return run_dir


@pytest.fixture
def run_dir(tmp_path, finished):
    """A copy of that run, which may be broken."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def unfinished(run_dir):
    """A copy of that run as it was before its last evaluation, when it was killed."""
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "20")
    return run_dir


# A full disk.


def can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


ON_A_SMALL_DISK = """
size=$1 disk=$2 out=$3; shift 3
mount -t tmpfs -o "size=${size}k" none "$disk"
"$@" > "$out/full.out" 2> "$out/full.err"; echo $? > "$out/full.code"
mount -o remount,size=64m "$disk"
ls "$disk/run/checkpoints" > "$out/saved"
"$@" > "$out/resumed.out" 2> "$out/resumed.err"; echo $? > "$out/resumed.code"
cp "$disk/run/metrics.jsonl" "$disk/run/summary.json" "$out"
"""


@pytest.mark.skipif(not can_mount(), reason="needs leave to mount a small disk")
def test_job_on_a_disk_that_fills_at_any_moment_says_so_and_resumes_to_the_same_result(tmp_path, finished):
    processes = {}
    # KiB. Too few for the metrics; for the first checkpoint, here or there; for the second; for the third.
    for size in (16, 64, 140, 280, 430):
        disk, out = tmp_path / f"disk{size}", tmp_path / f"out{size}"
        disk.mkdir(), out.mkdir()
        shell = ["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", str(size), str(disk), str(out)]
        processes[size] = start(*JOB, "--run-dir", disk / "run", wrapper=shell, **ONLY_READ)
    done = {size: finish(process) for size, process in processes.items()}
    for size in processes:
        out = tmp_path / f"out{size}"
        complaint = (out / "full.err").read_text()
        assert (out / "full.code").read_text() == "1\n", (size, complaint, done[size])
        assert_short(complaint, "failed: ", "No space left on device", "make room, and start again")
        assert complaint.count("\n") == 1
        assert (out / "resumed.code").read_text() == "0\n", (out / "resumed.err").read_text()
        saved = [int(name) for name in (out / "saved").read_text().split() if name.isdigit()]
        if saved:
            assert f"going on from step {max(saved)}" in (out / "resumed.out").read_text()
        assert results(out) == results(finished)
    assert saved  # on the largest


@pytest.mark.parametrize("size, what", [(200, ".config.json.tmp"), (3000, "step 5 could not be saved")])
def test_job_that_may_write_no_larger_file_says_so_and_resumes_to_the_same_result(
    tmp_path, command, finished, size, what
):
    # The system sends SIGXFSZ too, at which a process would die that does not ignore it, as Python does.
    limits = [("RLIMIT_FSIZE", size)]
    done = finish(start(*JOB, "--run-dir", tmp_path / "run", limits=limits, **ONLY_READ))
    assert done.returncode == 1
    assert_short(done.stderr, "failed: ", "File too large", "make room, and start again")
    assert command(*JOB, "--run-dir", tmp_path / "run")[0] == 0
    assert results(tmp_path / "run") == results(finished)


@pytest.mark.parametrize(
    "name", [".config.json.tmp", ".metrics.jsonl.tmp", "curves.png", ".summary.json.tmp"]
)
def test_file_that_finds_the_disk_full_ends_the_run_which_resumes_to_the_same_result(
    command, finished, unfinished, name
):
    (unfinished / name).unlink(missing_ok=True)
    (unfinished / name).symlink_to("/dev/full")
    code, _, complaint = command(*JOB, "--run-dir", unfinished)
    assert code == 1
    assert_short(complaint, "failed: No space left on device", "make room, and start again")
    (unfinished / name).unlink()
    assert command(*JOB, "--run-dir", unfinished)[0] == 0
    assert results(unfinished) == results(finished)
    assert json.loads((unfinished / "summary.json").read_text())["status"] == "finished"


# A directory that cannot be used.


@pytest.mark.parametrize(
    "place, reason",
    [("/dev/null/run", "Not a directory"), ("/proc/run", "No such file"), ("a" * 300, "File name too long")],
)
def test_run_directory_that_cannot_be_made_is_named(command, place, reason):
    code, _, complaint = command(*JOB, "--run-dir", place)
    assert code == 2
    assert_short(complaint, "error: run_dir = '", reason, "give another --run_dir")


@pytest.mark.skipif(not can_mount(), reason="needs leave to mount a directory read-only")
def test_run_directory_that_may_only_be_read_is_named_and_still_evaluated(tmp_path, finished, run_dir):
    (run_dir / "summary.json").unlink()  # or there would be nothing to do
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    read_only = ["unshare", "-rm", "sh", "-c", script, str(run_dir)]
    trained = start(*JOB, "--run-dir", run_dir, wrapper=read_only)
    evaluated = finish(start("eval", run_dir, wrapper=read_only))
    trained = finish(trained)
    assert trained.returncode == 2
    assert_short(trained.stderr, f"error: run_dir = '{run_dir}' cannot be used", "Read-only file system")
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    assert results(run_dir) == results(finished)


# Memory.


def test_network_or_batch_that_memory_does_not_hold_is_refused_with_what_helps(tmp_path):
    limits = [("RLIMIT_AS", 6 * 2**30)]
    network = start(*JOB, "--model.widths", 10**9, "--run-dir", tmp_path / "network", limits=limits)
    batch = ["--model.widths", 10**6, "--batch-size", 1290, "--run-dir", tmp_path / "batch"]
    for process in (network, start(*JOB, *batch, limits=limits)):
        done = finish(process)
        assert done.returncode == 1, done.stderr
        assert_short(done.stderr, "failed: out of memory: ", "GiB more were wanted", "smaller batch_size")
    # The network was still to be made when memory ran out; the other one was being trained.
    assert not (tmp_path / "network").exists()
    assert json.loads((tmp_path / "batch" / "summary.json").read_text())["status"] == "failed"


# A loss that is no number.


def test_diverged_job_keeps_its_last_good_checkpoint_and_has_a_way_out(tmp_path, command):
    flags = ["--optimizer.warmup-steps", "20", "--model.norm", "none", "--optimizer.schedule", "constant"]
    diverging = [*JOB, *flags, "--optimizer.learning-rate", "1e9", "--run-dir", tmp_path / "run"]
    # Its first steps are small enough.
    gentle = [*diverging, "--optimizer.warmup-steps", "1000000000"]
    assert command(*gentle, "--steps", "5")[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["steps"], config["optimizer"]["warmup_steps"] = 20, 20
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "summary.json").unlink()

    complaints = set()
    for _ in range(2):
        code, _, complaint = command(*diverging)
        assert code == 1
        assert_short(
            complaint, "failed: the loss of step", "Step 5 is saved", "lower optimizer.learning_rate"
        )
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
        complaints.add(complaint)
    assert len(complaints) == 1

    code, _, complaint = command(*diverging, "--optimizer.learning-rate", "0.01")
    assert code == 2
    assert_short(complaint, "learning_rate = 1000000000.0, now 0.01", "Give another --run_dir")
    way_out = ["--run-dir", tmp_path / "new", "--init-from", tmp_path / "run"]
    assert command(*diverging, "--optimizer.learning-rate", "0.01", *way_out)[0] == 0


# Configs, data and devices.


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"", "wanted one of the two"),
        (bytes(range(256)), "cannot be read as TOML"),
        ("seed = 1".encode("utf-16"), "cannot be read as TOML"),
        (b"steps = ", "cannot be read as TOML"),
        (b"steps = 1\nsteps = 2", "cannot be read as TOML"),
        (b"steps = 1\nepochs = 1", "wanted one of the two"),
        (b"steps = -1", "steps = -1; wanted a number > 0"),
        (b"steps = 99999999999999999999", "wanted fewer than 2**31"),
        (b"epochs = inf", "epochs = inf; wanted a number > 0"),
        (b"steps = 1\noptimizer.learning_rate = nan", "learning_rate = nan; wanted a number > 0"),
        (b"steps = 1\noptimizer.accumulate = 3", "batch_size of 126, say"),
        (b"steps = 1\nmodel.norm = 'group'\nmodel.norm_groups = 7", "wanted one of 1, 2, 4, 8"),
        (b"base = 'job.toml'", "inherits from itself"),
        (b"base = '.'", "Is a directory"),
        (b"base = 'nothing.toml'", "nothing.toml does not exist"),
    ],
)
def test_config_that_makes_no_sense_is_refused_in_a_line(tmp_path, command, content, wanted):
    (tmp_path / "job.toml").write_bytes(content)
    code, _, complaint = command(tmp_path / "job.toml", "--num-processes", "1", "--run-dir", tmp_path / "run")
    assert code == 2
    assert_short(complaint, "error: ", wanted)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, named",
    [
        ("epocs = 1", "--epochs"),
        ("steps = 1\n[optimiser]\nname = 'sgd'", "--optimizer.name"),
        ("steps = 1\nmodel = 3", "Unrecognized options: --model"),
        ("steps = 1\nseed = 'zero'", "--seed"),
        ("steps = 1\nseed = [1, 2]", "Unrecognized options: 2"),
        ("steps = 1\nseed = 2020-01-01", "--seed"),
        ("steps = 1\nmodel.name = 'mlp☃'", "Expected one of ('mlp'"),
        ("steps = 1\n'☃' = 1", "Unrecognized options: --☃"),
    ],
)
def test_config_with_a_wrong_key_or_type_is_refused_with_the_key_and_the_file(
    tmp_path, command, content, named
):
    (tmp_path / "job.toml").write_text(content)
    code, _, complaint = command(tmp_path / "job.toml", "--num-processes", "1", "--run-dir", tmp_path / "run")
    assert code == 2 and named in complaint and "Traceback" not in complaint
    assert complaint.splitlines()[-1] == f"The mistake is in the file {tmp_path / 'job.toml'}."


def npz(labels=40):
    images, classes, file = np.zeros((40, 4, 4), np.uint8), np.arange(labels) % 3, io.BytesIO()
    np.savez(file, x_train=images, y_train=classes, x_test=images, y_test=classes)
    return file.getvalue()


@pytest.mark.parametrize(
    "make, wanted",
    [
        (lambda path: None, "does not exist; wanted an .npz file with x_train"),
        (lambda path: path.mkdir(), "has nothing of the kind; wanted an .npz file with x_train"),
        (lambda path: path.write_bytes(b""), "cannot be read: File is not a zip file"),
        (lambda path: path.write_bytes(npz()[:700]), "cannot be read: File is not a zip file"),
        (lambda path: path.write_bytes(npz(labels=39)), "wanted one label in y_train for each"),
    ],
)
def test_data_that_cannot_be_used_are_named(tmp_path, command, make, wanted):
    make(tmp_path / "data")
    data = ["--data.name", "npz", "--data.path", tmp_path / "data"]
    code, _, complaint = command(*JOB, *data, "--run-dir", tmp_path / "run")
    assert code == 2
    assert_short(complaint, f"error: {tmp_path / 'data'}", wanted)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, wanted, mended",
    [
        ("--batch-size 1294", "wanted a batch_size of 1293 or less", "--batch-size 1293"),
        ("--devices 99", "devices = 99; wanted at most 8", "--devices 8"),
        ("--devices 4 --batch-size 30", "over 4 devices; wanted 32, say", "--devices 4 --batch-size 32"),
    ],
)
def test_batches_and_devices_that_do_not_go_together_are_refused_with_what_does(
    tmp_path, command, flags, wanted, mended
):
    code, _, complaint = command(*JOB, "--run-dir", tmp_path / "run", *flags.split())
    assert code == 2
    assert_short(complaint, "error: ", wanted)
    assert command(*JOB, "--run-dir", tmp_path / "run", "--steps", "1", *mended.split())[0] == 0


# Run directories that were broken from outside.


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def append(path, text):
    path.write_text(path.read_text() + text)


def fill(path, text):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text(text)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: None,
        lambda run: cut(run / "summary.json"),
        lambda run: fill(run / "summary.json", "[]"),
        lambda run: fill(run / "summary.json", '{"status": "finished"}'),
        lambda run: fill(run / "summary.json", '{"status": "finished", "step": "x"}'),
        lambda run: (run / "data.json").unlink(),
        lambda run: (run / "environment.json").unlink(),
        lambda run: (run / "curves.png").unlink(),
        lambda run: shutil.rmtree(run / "tensorboard"),
        lambda run: append(run / "metrics.jsonl", 'garbage\n[]\n{}\n{"step": 5, "split": "tes'),
        lambda run: append(run / "metrics.jsonl", '{"step": "x", "split": "test"}\n'),
        lambda run: (run / "checkpoints" / "25.orbax-checkpoint-tmp" / "model").mkdir(parents=True),
        lambda run: (run / "checkpoints" / "notes.txt").touch(),
    ],
    ids=[
        "nothing",
        "summary cut",
        "summary is a list",
        "summary has a part",
        "summary has no step",
        "no data.json",
        "no environment",
        "no picture",
        "no TensorBoard",
        "metrics end in garbage",
        "metrics of a wrong type",
        "checkpoint half written",
        "a stray file",
    ],
)
def test_what_can_be_found_out_again_is_not_missed(command, finished, run_dir, spoil):
    spoil(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "20")
    code, printed, complaint = command(*JOB, "--run-dir", run_dir)
    assert (code, complaint) == (0, "")
    assert printed.splitlines()[-1].startswith("Finished at step 20: test accuracy 0.")
    assert results(run_dir) == results(finished)


@pytest.mark.parametrize(
    "spoil, wanted",
    [
        (lambda run: cut(run / "config.json"), "config.json' cannot be read: "),
        (lambda run: fill(run / "config.json", "[]"), "config.json' is not a job of this program"),
        (lambda run: fill(run / "config.json", "[" * 10**5), "config.json' cannot be read: "),
        (lambda run: (run / "config.json").unlink(), "give another --run_dir"),
        (lambda run: cut(run / "data.json"), "Without it, the job writes it anew"),
        (lambda run: fill(run / "data.json", "[]"), "Without it, the job writes it anew"),
        (lambda run: fill(run / "checkpoints", ""), "checkpoints' is no folder. Move it away"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "its checkpoints are gone. Bring them back"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "20" / "model"), "Delete that folder to go on"),
        (lambda run: cut(run / "checkpoints" / "20" / "metrics" / "metrics"), "Delete that folder to go on"),
    ],
    ids=[
        "config cut",
        "config is a list",
        "config nests too deep",
        "no config",
        "data.json cut",
        "data.json is a list",
        "checkpoints are a file",
        "no checkpoints",
        "a part of a checkpoint is missing",
        "the metrics of a checkpoint are cut",
    ],
)
def test_what_cannot_be_found_out_again_is_named_and_nothing_is_written(command, run_dir, spoil, wanted):
    (run_dir / "summary.json").unlink()  # or there would be nothing to do
    spoil(run_dir)
    before = results(run_dir)
    code, _, complaint = command(*JOB, "--run-dir", run_dir)
    assert code == 2
    assert_short(complaint, "error: ", str(run_dir), wanted)
    assert results(run_dir) == before


def test_following_the_advice_on_a_broken_checkpoint_ends_in_the_same_result(command, finished, run_dir):
    (run_dir / "summary.json").unlink()
    cut(run_dir / "checkpoints" / "20" / "model" / "manifest.ocdbt")
    code, _, complaint = command(*JOB, "--run-dir", run_dir)
    assert code == 2
    assert_short(complaint, f"'{run_dir}/checkpoints/20' is no whole checkpoint", "Delete that folder")
    shutil.rmtree(run_dir / "checkpoints" / "20")
    code, printed, _ = command(*JOB, "--run-dir", run_dir)
    assert code == 0 and "going on from step 15" in printed
    assert results(run_dir) == results(finished)
