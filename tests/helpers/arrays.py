"""Data as people bring them: in the Keras layout, in archives and folders."""

import os

import numpy as np
from numpy.testing import assert_array_equal

from train.data.formats.arrays import KEYS


def keras_arrays(n_train=20, n_test=8, shape=(4, 4), dtype=np.uint8):
    rng = np.random.RandomState(0)
    return {
        "x_train": rng.randint(0, 256, (n_train, *shape)).astype(dtype),
        "y_train": np.arange(n_train, dtype=np.uint8) % 3,
        "x_test": rng.randint(0, 256, (n_test, *shape)).astype(dtype),
        "y_test": np.arange(n_test, dtype=np.uint8) % 4,
    }


def save_npys(folder, arrays):
    """Write a folder of .npy files, which are read as memory maps."""
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


class Bomb:
    """What makes the folder "exploded" if somebody unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def assert_same(found, expected, case=""):
    assert list(found) == list(KEYS), case
    for key in KEYS:
        assert_array_equal(found[key], expected[key], err_msg=f"{case} {key}", strict=True)
