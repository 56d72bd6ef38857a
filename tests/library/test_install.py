import importlib
import sys
from importlib import metadata

import pytest

import jbn


def test_version_is_that_of_the_installed_package():
    assert jbn.__version__ == metadata.version("jbn")


@pytest.mark.parametrize("name", ["jbn.linen", "jbn.nnx"])
def test_a_flax_layer_without_flax_says_what_to_install(name, monkeypatch):
    _forget(name, monkeypatch)
    monkeypatch.setitem(sys.modules, "flax", None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf'{name} needs Flax.*pip install "jbn\[flax\]"'):
        importlib.import_module(name)


@pytest.mark.parametrize("name", ["jbn.linen", "jbn.nnx"])
def test_a_package_that_flax_itself_lacks_is_named(name, monkeypatch):
    class Lacking:
        def find_spec(self, module, *_):
            if module == "flax.typing":
                raise ModuleNotFoundError("No module named 'msgpack'", name="msgpack")

    monkeypatch.setattr(sys, "meta_path", [Lacking(), *sys.meta_path])
    _forget(name, monkeypatch)
    monkeypatch.delitem(sys.modules, "flax.typing", raising=False)
    with pytest.raises(ModuleNotFoundError, match="msgpack"):
        importlib.import_module(name)


def _forget(package, monkeypatch):
    for module in [*sys.modules]:
        if module == package or module.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, module)
