"""Data sets from arrays."""

import pytest

from train.config import Data
from train.data import load
from train.data.formats.readers import READERS, Reader
from train.data.formats.reading import Found


@pytest.fixture
def given(monkeypatch):
    """Have the data set "given" be arrays of a dict, by a line of the table of readers and no file."""

    def give(values):
        reader = Reader(lambda path, config: Found(values), "arrays", needs_path=False)
        monkeypatch.setitem(READERS, "given", reader)
        return lambda **options: load(Data(name="given", **options))

    return give
