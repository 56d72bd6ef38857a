"""Every code block of the README and of the pages in docs/ runs, as a stranger would run it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command import ENVIRONMENT, ROOT
from train.config import load, total_steps
from train.runs.summary import Summary
from train.studies import runner
from train.training import job

WHOLE = (ROOT / "README.md").read_text()
OWN_DATA = WHOLE.partition("\n### Your own data\n")[2].partition("\n#")[0]
README = WHOLE.replace(OWN_DATA, "")
INDENTED = re.findall(r"^    (.+)$", README.split("\n## ")[0], re.M)


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.slow
def test_python_blocks_run_one_after_the_other():
    """In a process that compiles them quickly: they are hundreds of programs that run once."""
    assert len(blocks("python")) >= 11
    code = "\n".join([*blocks("python"), "assert isinstance(running, jbn.Moments)"])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_python_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page}
    for block in blocks("python", (ROOT / "docs" / page).read_text()):
        exec(compile(block, page, "exec"), namespace)


def test_first_lines_are_the_two_of_a_fresh_machine():
    assert INDENTED == [
        "pip install -e '.[train]' && python -m train configs/digits_mlp.toml",
        "pip install -e '.[test]' && pytest",
    ]


@pytest.fixture
def checkout(tmp_path):
    """Go to a folder with the configs and a stand-in for MNIST, where runs may be written."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rng = np.random.RandomState(0)
    images, labels = rng.randint(0, 256, (600, 28, 28)).astype(np.uint8), rng.randint(0, 10, 600)
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:50], "y_test": labels[:50]}
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path


@pytest.mark.slow
def test_shell_lines_run_in_their_order(checkout, command, monkeypatch):
    """Their jobs take ten steps at most; those of compare and sweep none: tests/train/studies has them."""
    monkeypatch.setattr(job, "total_steps", lambda *given: min(10, total_steps(*given)))
    monkeypatch.setattr(runner, "fit", lambda config, stop: Summary("finished", step=0))
    monkeypatch.chdir(checkout)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 14
    for line in lines:
        program, *words = shlex.split(line)
        assert (program, words[:2]) == ("python", ["-m", "train"])
        code, printed, complaint = command(*words[2:])
        assert (code, complaint) == (0, ""), line
        assert printed
    for study in ("digits_mlp-sweep", "deep_sigmoid-comparison", "rates", "batches", "momenta"):
        assert (checkout / "runs" / study / "report.html").exists()


@pytest.mark.slow
def test_own_data_are_trained_on_predicted_and_exported_as_the_section_says(checkout, command, monkeypatch):
    monkeypatch.setattr(job, "total_steps", lambda *given: min(40, total_steps(*given)))
    monkeypatch.chdir(checkout)
    make, use = blocks("python", OWN_DATA)
    namespace = {}
    exec(make, namespace)
    (lines,) = blocks("sh", OWN_DATA)
    printed = {}
    for line in lines.splitlines():
        code, out, complaint = command(*shlex.split(line)[3:])
        said = "" if printed else "decoding 500 images, once, into runs/data-cache\n"
        assert (code, complaint) == (0, said), line
        printed[line.split()[3], line.split()[4]] = out
    images, patients = printed["predict", "runs/my_images"], printed["predict", "runs/my_table"]
    assert json.loads(images)["class"] in namespace["names"]
    values = [json.loads(line)["value"] for line in patients.splitlines()]
    assert np.corrcoef(values, namespace["patients"].target)[0, 1] > 0.5
    exec(use, namespace)
    expected = list(json.loads(images)["probabilities"].values())
    np.testing.assert_allclose(namespace["probabilities"][0], expected, rtol=1e-5)
    inputs = json.loads(Path("runs/my_images/data.json").read_text())["inputs"]
    assert inputs in " ".join(OWN_DATA.split())


@pytest.mark.parametrize("language, processes", [("bash", None), ("yaml", "2")])
def test_lines_for_clusters_are_a_job_that_loads(language, processes):
    (block,) = blocks(language)
    # One command over several lines, up to one that begins something else.
    command = re.search(r"python -m train ((?:.*\n)(?: +--.*\n)*)", block)[1]
    config, *flags = shlex.split(command.replace("$JOB_COMPLETION_INDEX", "1"))
    loaded = load(ROOT / config, flags)
    assert loaded.run_dir == "/shared/runs/cifar10" and str(loaded.num_processes or None) == str(processes)


def test_every_config_that_is_named_exists():
    configs = re.findall(r"configs/\w+\.toml", WHOLE)
    assert len(configs) >= 6 and all((ROOT / config).is_file() for config in configs)
    assert (ROOT / "LICENSE").exists()
