import importlib
import sys
from importlib import metadata

import pytest

import jbn


def test_version_is_that_of_the_installed_package():
    assert jbn.__version__ == metadata.version("jbn")


@pytest.mark.parametrize("name", ["jbn.linen", "jbn.nnx"])
def test_a_flax_layer_without_flax_says_what_to_install(name, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "flax", None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf'{name} needs Flax.*pip install "jbn\[flax\]"'):
        importlib.import_module(name)
