"""The command itself, as a user runs it: what it prints, leaves behind and exits with."""

import contextlib
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT, run

from train.runs.log import read_metrics


@pytest.mark.parametrize(
    "name, reached", [("digits_mlp", 0.97), ("digits_mlp_nnx", 0.97), ("digits_cnn", 0.985)]
)
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
        (["trian", "configs/digits_mlp.toml"], "is none of these"),
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
