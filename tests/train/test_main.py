"""The command itself, as a user runs it: a subprocess in the checkout."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from train.logs import read_metrics

ROOT = Path(__file__).parents[2]


def start(*arguments, **environment):
    command = [sys.executable, "-m", "train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=os.environ | environment, **pipes)


def run(*arguments, **environment):
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.mark.parametrize("name, reached", [("digits_mlp", 0.97), ("digits_cnn", 0.985)])
def test_digits_jobs_reach_their_accuracy_say_so_and_are_done_the_second_time(tmp_path, name, reached):
    run_dir = tmp_path / name
    first = run(f"configs/{name}.toml", "--run-dir", run_dir)
    assert (first.returncode, first.stderr) == (0, "")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["test_accuracy"] >= reached
    lines = first.stdout.splitlines()
    assert lines[-1] == (
        f"Finished at step {summary['step']}: test accuracy {summary['test_accuracy']:.4f} at its best step "
        f"{summary['best_step']}. Files: {run_dir}. Evaluate: python -m train eval {run_dir}"
    )
    steps = [line["step"] for line in read_metrics(run_dir) if line["split"] == "test"]
    assert [int(line.split()[0]) for line in lines[5:-1]] == steps  # the table

    second = run(f"configs/{name}.toml", "--run-dir", run_dir)
    assert (second.returncode, second.stdout.splitlines()) == (0, lines[-1:])

    evaluated = run("eval", run_dir)
    assert evaluated.returncode == 0 and evaluated.stdout.count("\n") == 1
    result = json.loads(evaluated.stdout)
    assert (result["accuracy"], result["loss"]) == (summary["test_accuracy"], summary["test_loss"])


def test_terminal_shows_the_progress_and_keeps_the_table(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "train", "configs/digits_mlp.toml", "--run-dir", str(tmp_path / "run")]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that its program has ended
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    text = shown.decode()
    assert process.wait() == 0, text
    assert "steps/s" in text and "500" in text
    assert "Finished at step 500" in text.splitlines()[-1] and "Traceback" not in text


def test_mnist_job_takes_its_file_from_the_environment(tmp_path):
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 10, 600)
    images = (rng.rand(600, 28, 28) * 100 + 10 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])
    done = run("configs/mnist_mlp.toml", "--steps", 20, "--run_dir", tmp_path / "run", JBN_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "mnist: 540 train, 60 validation, 100 test examples" in done.stdout


@pytest.mark.skipif("JBN_DATA" not in os.environ, reason="needs MNIST in $JBN_DATA")
def test_mnist_job_reaches_its_accuracy_on_real_mnist(tmp_path):
    assert run("configs/mnist_mlp.toml", "--run_dir", tmp_path / "run").returncode == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] >= 0.98


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["configs/digits_mlp.toml", "--epocs", "3"], "--epochs"),
        (["configs/digits_mlp.toml", "--seed", "zero"], "--seed"),
        (["configs/digits_mlp.toml", "--seed", "-1"], "seed = -1"),
        (["configs/digits_lmp.toml"], "configs/digits_lmp.toml does not exist"),
        (
            ["configs/mnist_mlp.toml", "--data.path", "/no/such.npz"],
            "/no/such.npz does not exist; wanted an .npz",
        ),
        (["eval", "/no/such/run"], "'/no/such/run' is not a run directory"),
        (["trian", "configs/digits_mlp.toml"], "is no command"),
        ([], "usage: python -m train"),
    ],
)
def test_bad_input_exits_2_with_a_message_and_no_traceback(arguments, named):
    done = run(*arguments)
    printed = done.stdout + done.stderr
    assert done.returncode == 2
    assert named in printed and "Traceback" not in printed


def test_diverging_job_exits_1_with_a_message_and_no_traceback(tmp_path):
    flags = ["--model.norm", "none", "--optimizer.learning-rate", "1e30", "--run-dir", tmp_path / "run"]
    done = run("configs/digits_mlp.toml", *flags)
    assert done.returncode == 1
    assert "failed: the loss of step" in done.stderr and "Traceback" not in done.stderr


def test_list_shows_every_config_in_a_line():
    lines = run("list").stdout.splitlines()
    names = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.toml"))
    assert [line.split()[0] for line in lines] == names
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("arguments", [["--help"], ["configs/digits_mlp.toml", "--help"]])
def test_help_answers_without_importing_jax(arguments):
    code = (
        "import sys; from train.__main__ import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--" in done.stdout, done.stderr


def test_ctrl_c_while_it_compiles_exits_130_without_a_traceback(tmp_path):
    process = start("configs/digits_mlp.toml", "--steps", 200000, "--run-dir", tmp_path / "run")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "a second signal ends it at once" in err and "Traceback" not in err
    assert out.splitlines()[-1].startswith("Stopped at step ")


def test_second_process_is_kept_out_of_a_run_directory_in_use(tmp_path):
    job = ["configs/digits_mlp.toml", "--steps", 200000, "--run-dir", tmp_path / "run"]
    first = start(*job)
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.01)
    second = run(*job)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 143
    assert second.returncode == 2 and "is in use by another process" in second.stderr


JOB = ["configs/digits_mlp.toml", "--steps", 20000, "--eval-every", 2000]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(*JOB, "--run-dir", run_dir).returncode == 0
    return run_dir


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_job_ended_by_a_signal_resumes_to_the_same_result(tmp_path, uninterrupted, number, code):
    run_dir = tmp_path / "run"
    process = start(*JOB, "--run-dir", run_dir)
    deadline = time.monotonic() + 120
    # The second evaluation follows the first checkpoint.
    while len(read_metrics(run_dir)) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    if number != signal.SIGKILL:
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["status"] == "stopped" and 0 < summary["step"] < 20000
        assert out.splitlines()[-1].startswith(f"Stopped at step {summary['step']}: ")

    resumed = run(*JOB, "--run-dir", run_dir)
    assert resumed.returncode == 0 and ", going on from step " in resumed.stdout
    # Every loss after the signal is the same to the last digit.
    without_time = [
        [{**line, "seconds": None} for line in read_metrics(path)] for path in (run_dir, uninterrupted)
    ]
    assert without_time[0] == without_time[1]
