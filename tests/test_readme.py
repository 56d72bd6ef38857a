"""Every code block of the README runs, as a stranger would run it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.parsing import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
INDENTED = re.findall(r"^    (.+)$", README.split("\n## ")[0], re.M)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_python_blocks_run_one_after_the_other(standard_promotion):
    names = {}
    assert len(blocks("python")) == 11
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["running"], names["jbn"].Moments)


def test_first_lines_are_the_two_of_a_fresh_machine():
    assert INDENTED == [
        "pip install -e '.[train]' && python -m train configs/digits_mlp.toml",
        "pip install -e '.[test]' && pytest",
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the program, the configs and a stand-in for MNIST, where runs may be written."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train", "jbn", "configs"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.RandomState(0)
    images, labels = rng.randint(0, 256, (300, 28, 28)).astype(np.uint8), rng.randint(0, 10, 300)
    np.savez(folder / "mnist.npz", x_train=images, y_train=labels, x_test=images[:50], y_test=labels[:50])
    return folder


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines()])
def test_shell_lines_run_in_their_order(checkout, line):
    program, *arguments = shlex.split(line)
    assert program == "python"
    done = subprocess.run([sys.executable, *arguments], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("language, processes", [("bash", None), ("yaml", "2")])
def test_lines_for_clusters_are_a_job_that_loads(language, processes):
    (block,) = blocks(language)
    # One command over several lines, up to one that begins something else.
    command = re.search(r"python -m train ((?:.*\n)(?: +--.*\n)*)", block)[1]
    config, *flags = shlex.split(command.replace("$JOB_COMPLETION_INDEX", "1"))
    loaded = load(ROOT / config, flags)
    assert loaded.run_dir == "/shared/runs/cifar10" and str(loaded.num_processes or None) == str(processes)


def test_every_command_of_the_results_table_names_a_config_that_exists():
    configs = re.findall(r"configs/\w+\.toml", README)
    assert len(configs) >= 6 and all((ROOT / config).is_file() for config in configs)
    assert os.path.exists(ROOT / "LICENSE")
