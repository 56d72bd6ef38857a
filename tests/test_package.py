import subprocess
import sys
import zipfile
from pathlib import Path

import jbn

ROOT = Path(__file__).parent.parent


def test_public_names_are_those_of_the_interface():
    names = "Moments OneValueWarning Params batch_norm cumulative ema init merge moments normalize pooled"
    assert sorted(jbn.__all__) == names.split()


def test_import_jbn_imports_neither_flax_nor_the_training_program():
    others = ("flax", "optax", "orbax", "train")
    code = f"import jbn, sys; print([name for name in sys.modules if name.split('.')[0] in {others}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_wheel_holds_the_typed_library_alone(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"jbn"}
    assert {"jbn/py.typed", "jbn/__init__.py", "jbn/linen/__init__.py", "jbn/nnx/__init__.py"} <= set(names)
