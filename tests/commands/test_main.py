"""What commands print, leave behind and return."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command import ROOT
from train import __main__ as program
from train import data
from train.config import load
from train.errors import Stopped, UserError
from train.runs import processes


@pytest.mark.slow
@pytest.mark.parametrize("name, epochs, reached", [("digits_mlp_nnx", 20, 0.96), ("digits_cnn", 3, 0.9)])
def test_digits_jobs_learn(tmp_path, command, name, epochs, reached):
    """Those of configs/digits_mlp.toml do in test_signals.py."""
    flags = ["--epochs", epochs, "--run-dir", tmp_path]
    code, _, complaint = command(f"configs/{name}.toml", *flags)
    assert (code, complaint) == (0, "")
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] >= reached


def test_mnist_job_takes_its_file_from_the_environment(tmp_path, monkeypatch):
    images, labels = np.zeros((600, 28, 28), np.uint8), np.arange(600) % 10
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:100], "y_test": labels[:100]}
    np.savez(tmp_path / "mnist.npz", **arrays)
    monkeypatch.setenv("JBN_DATA", str(tmp_path))
    loaded = data.load(load(ROOT / "configs" / "mnist_mlp.toml", []).data)
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [540, 60, 100]


@pytest.mark.slow
@pytest.mark.skipif("JBN_DATA" not in os.environ, reason="needs MNIST in $JBN_DATA")
def test_mnist_job_reaches_its_accuracy_on_real_mnist(tmp_path, command):
    assert command("configs/mnist_mlp.toml", "--run_dir", tmp_path)[0] == 0
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] >= 0.98


def test_bad_input_exits_2_with_a_message_and_no_traceback(command):
    for arguments, named in (
        (["configs/digits_mlp.toml", "--epocs", "3"], "--epochs"),
        (["configs/digits_mlp.toml", "--seed", "zero"], "--seed"),
        (["configs/digits_mlp.toml", "--seed", "-1"], "seed: expected a number >= 0"),
        (["configs/nothing.toml"], "configs/nothing.toml does not exist; `python -m train list` shows"),
        (
            ["configs/mnist_mlp.toml", "--data.path", "/no/such.npz"],
            "'/no/such.npz' does not exist; expected an .npz",
        ),
        (["eval", "/no/such/run"], "'/no/such/run' does not exist; expected a run directory"),
        (["eval"], "Missing from python -m train eval"),
        (["predict", "/no/such/run"], "images: expected one file or more, got none"),
        (
            ["compare", "configs/digits_mlp.toml"],
            "compare: expected two configs or more, the baseline first, got configs/digits_mlp.toml.\n",
        ),
        (["sweep", "configs/digits_mlp.toml", "--seeds", "0"], "--seeds"),
    ):
        code, printed, complaint = command(*arguments)
        assert code == 2, arguments
        assert printed == "" and named in complaint and "Traceback" not in complaint, (arguments, complaint)


def test_line_that_begins_with_nothing_known_is_told_what_it_was_probably_meant_to_be(
    command, monkeypatch, tmp_path
):
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").touch()
    job = "configs/digits_mlp.toml"
    for line, said, meant in (
        ("digits_mlp --seed 3", "'digits_mlp' is neither a config nor a command", f"{job} --seed 3"),
        ("digits_mlp.toml", "digits_mlp.toml does not exist", job),
        ("configs/digit_mlp.toml --seed 3", "configs/digit_mlp.toml does not exist", f"{job} --seed 3"),
        ("Configs/Digits_MLP.TOML", "'Configs/Digits_MLP.TOML' is neither a config nor a command", job),
        ("evla runs/x", "'evla' is neither a config nor a command", "eval runs/x"),
        (f"Swep {job} --seeds 3", "'Swep' is neither a config nor a command", f"sweep {job} --seeds 3"),
        (f"trian {job} --seed 1", "'trian' is neither a config nor a command", f"{job} --seed 1"),
        (f"--seed 3 {job}", "expected a config or a command first, got '--seed'", f"{job} --seed 3"),
        (f"{tmp_path}", f"'{tmp_path}' is neither a config nor a command", f"eval {tmp_path}"),
    ):
        code, printed, complaint = command(*line.split())
        assert (code, printed) == (2, ""), line
        assert complaint == f"error: {said}; did you mean `python -m train {meant}`?\n"
    code, _, complaint = command("nothing", "like", "it")
    assert code == 2 and "'nothing' is neither a config nor a command.\nusage: python -m train" in complaint


def test_processes_compare_what_they_were_asked_for_before_they_write(tmp_path, command, monkeypatch):
    """As if this were one of several processes; how they compare is in tests/train/runs/test_processes.py."""
    compared = []

    def refuse(values):
        compared.append(list(values.values()))
        raise UserError("another command elsewhere")

    monkeypatch.setattr(processes, "check_equal", refuse)
    config, out = "configs/digits_mlp.toml", tmp_path / "out"
    assert command(config, "--run-dir", out)[0] == 2
    assert command("sweep", config, "--seed", "1,2", "--out", out)[0] == 2
    assert command("compare", config, "configs/digits_cnn.toml", "--seeds", "3", "--out", out)[0] == 2
    assert compared == [["train", None, 1], ["sweep", str(out), 2], ["compare", str(out), 6]]
    assert not out.exists()


def test_usage_is_printed_and_asking_for_it_is_no_mistake(command):
    for arguments, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        ended, printed, _ = command(*arguments)
        assert ended == code and printed.startswith("usage: python -m train")
        for name in ("eval", "predict", "export", "recalibrate", "diagnose", "compare", "sweep", "list"):
            assert f"\n  {name} " in printed


def test_list_shows_every_config_in_a_line(command):
    code, printed, _ = command("list")
    names = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.toml"))
    assert code == 0 and [line.split()[0] for line in printed.splitlines()] == names
    assert all(len(line.split()) > 4 for line in printed.splitlines())


def test_uncaught_exception_exits_1_with_its_traceback_alone_where_there_are_others(command, monkeypatch):
    def broken(_):
        raise ZeroDivisionError("of the program")

    alone = []
    monkeypatch.setattr(program.os, "_exit", alone.append)
    monkeypatch.setitem(program.COMMANDS, "list", lambda: broken(0))
    code, _, complaint = command("list")
    assert (
        code == 1 and "Traceback" in complaint and complaint.endswith("ZeroDivisionError: of the program\n")
    )
    assert alone == []
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    command("list")
    assert alone == [1]


def test_what_interrupts_the_program_before_a_job_begins_is_in_its_exit_code(command, monkeypatch):
    for error, code, said in (
        (KeyboardInterrupt(), 130, ""),
        (Stopped(15), 143, "stopped before the first step\n"),
    ):

        def interrupted(*_, error=error):
            raise error

        monkeypatch.setattr(program, "load", interrupted)
        assert command("configs/digits_mlp.toml") == (code, "", said)


def test_programs_are_cached_in_a_folder_of_this_program_and_a_users_setting_stays(tmp_path, monkeypatch):
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XDG_"))}
    cache = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"

    def used(**variables):
        monkeypatch.setattr(os, "environ", ours | variables)
        program._use_compilation_cache()
        return [os.environ.get(name) for name in cache]

    folder, size = used(XDG_CACHE_HOME=str(tmp_path / "caches"))
    assert Path(folder).parent == tmp_path / "caches" / "jbn" and Path(folder).is_dir()
    assert size == str(2**30)  # a limit, without which JAX does not lock the folder
    folder, _ = used(HOME=str(tmp_path / "home"))
    assert Path(folder).parent == tmp_path / "home" / ".cache" / "jbn"
    home = {"XDG_CACHE_HOME": str(tmp_path / "other")}
    assert used(**home, JAX_COMPILATION_CACHE_MAX_SIZE="5")[1] == "5"
    assert (
        used(JAX_COMPILATION_CACHE_DIR="elsewhere") == ["elsewhere", None] and not Path("elsewhere").exists()
    )
    (tmp_path / "file").touch()
    assert used(XDG_CACHE_HOME=str(tmp_path / "file")) == [None, None]
