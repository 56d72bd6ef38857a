"""The data sets that a job may name, from one table.

A further data set is a reader, a line here, and a name in train/config/schema.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from train.config import Data, DataName
from train.data.formats import folders, tables
from train.data.formats.arrays import IDX_FILES, KEYS, cifar10, digits, mnist, npz
from train.data.formats.reading import Found


class Reader(NamedTuple):
    """How to read a data set."""

    read: Callable[[Path, Data], Found | None]
    accepts: str  # what a path may be
    needs_path: bool = True


ARRAYS = "an .npz file with {}, or a folder with these as {}.npz or as .npy files"
OWN = "x_train and y_train (and x_test and y_test)"
READERS: dict[DataName, Reader] = {
    "digits": Reader(
        lambda path, config: digits(path), "no path: they come with scikit-learn", needs_path=False
    ),
    "npz": Reader(lambda path, config: npz(path), ARRAYS.format(OWN, "npz")),
    "csv": Reader(tables.read, tables.ACCEPTS),
    "folder": Reader(folders.read, folders.ACCEPTS),
    "mnist": Reader(
        lambda path, config: mnist(path),
        f"{ARRAYS.format(', '.join(KEYS), 'mnist')}, or with {', '.join(IDX_FILES)}, each plain or .gz",
    ),
    "cifar10": Reader(
        lambda path, config: cifar10(path),
        f"{ARRAYS.format(', '.join(KEYS), 'cifar10')}, or with cifar-10-binary.tar.gz or its .bin files, or "
        "that .tar.gz file",
    ),
}
