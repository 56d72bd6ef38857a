"""What is installed, and what importing it imports."""

import subprocess
import sys
import tomllib
import zipfile

import pytest
from hatchling.builders.wheel import WheelBuilder

import jbn
from tests.helpers.command import ROOT
from train.runs.summary import peak_host_bytes


def test_public_names_are_those_of_the_interface():
    names = "Moments OneValueWarning Params as_affine batch_norm batch_renorm blend cumulative ema fold"
    names += " from_torch init keep merge merge_trees moments normalize pooled renorm_limits to_torch"
    assert sorted(jbn.__all__) == names.split()


def test_versions_are_the_same_wherever_they_stand():
    read = lambda name: (ROOT / name).read_text()
    assert f"\nversion: {jbn.__version__}\n" in read("CITATION.cff")
    assert jbn.__version__ in read("CHANGELOG.md").partition("###")[0]
    project = tomllib.loads(read("pyproject.toml"))["project"]
    (jax,) = (bound for bound in project["dependencies"] if bound.startswith("jax>="))
    assert f"JAX {jax.removeprefix('jax>=')} or newer" in read("docs/usage/get_started.md")


@pytest.mark.slow
def test_help_imports_no_jax_and_the_library_neither_flax_nor_the_program_and_memory_is_counted():
    code = """
import contextlib, io, sys

def imported(*packages):
    return [name for name in sys.modules if name.partition(".")[0] in packages]

from train.__main__ import main
for arguments in (["--help"], ["configs/digits_mlp.toml", "--help"], ["sweep", "--help"]):
    try:
        main(arguments)
    except SystemExit as exit:
        assert exit.code == 0, arguments
with contextlib.redirect_stderr(io.StringIO()) as complaint:
    assert main(["configs/nothing.toml"]) == 2 and "does not exist" in complaint.getvalue()
assert not imported("jax"), "by --help"
for name in imported("train"):
    del sys.modules[name]
import jbn
assert imported("jax") and not imported("flax", "optax", "orbax", "train"), "by jbn"
from train.runs.summary import peak_host_bytes
print(peak_host_bytes())
"""
    held = bytearray(b"1") * 300_000_000
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    # The peak of memory is that of the process, and not of the one that started it, which getrusage counts.
    peak = int(done.stdout.splitlines()[-1])
    assert peak > 100e6 and (sys.platform != "linux" or peak < peak_host_bytes() - len(held) // 2)
    assert "usage: python -m train CONFIG.toml" in done.stdout and "--optimizer.learning-rate" in done.stdout


def test_wheel_holds_the_typed_library_alone(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert {name.partition("/")[0] for name in files if ".dist-info/" not in name} == {"jbn"}
    assert {"jbn/py.typed", "jbn/__init__.py", "jbn/linen/__init__.py", "jbn/nnx/__init__.py"} <= set(files)
    (metadata,) = (text.splitlines() for name, text in files.items() if name.endswith("METADATA"))
    assert f"Version: {jbn.__version__}" in metadata
    required = [
        line.split()[1] for line in metadata if line.startswith("Requires-Dist: ") and "extra" not in line
    ]
    assert [name.partition(">")[0] for name in required] == ["jax", "numpy"]
