"""CIFAR-10, in its binary and its python form -> raw arrays. Nothing in a file is ever run."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from train.data.formats import KEYS, reading
from train.errors import UserError

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")


def cifar10(path: Path) -> dict[str, np.ndarray]:
    """Reads CIFAR-10's six batches, binary or pickled, from a folder or the .tar.gz that is distributed.

    Returns:
      Images of uint8 (n, 32, 32, 3), labels of uint8 (n,); an empty dict where there is none of the batches.

    Raises:
      UserError: a batch is missing or malformed, or a pickle has something else than NumPy arrays.
    """
    for place in (path, *(path / name for name in FOLDERS + ARCHIVES)):
        contents = _contents(place)
        if contents:
            break
    else:
        return {}
    ending = ".bin" if any(name.endswith(".bin") for name in contents) else ""
    missing = [name + ending for name in BATCHES if name + ending not in contents]
    if missing:
        raise UserError(f"{place} has {sorted(contents)}; wanted {missing} too.")
    batches = [_batch(place / (name + ending), contents.pop(name + ending)) for name in BATCHES]
    (x_train, x_test), (y_train, y_test) = (
        (np.concatenate(parts[:-1]), parts[-1]) for parts in zip(*batches)
    )
    return dict(zip(KEYS, (x_train, y_train, x_test, y_test)))


def _contents(place: Path) -> dict[str, bytes]:
    names = [name + ending for name in BATCHES for ending in (".bin", "")]
    if not place.is_file():
        return {name: (place / name).read_bytes() for name in names if (place / name).is_file()}
    with reading(place, "a .tar or .tar.gz file"), tarfile.open(place) as archive:
        members = ((Path(member.name).name, member) for member in archive if member.isfile())
        return {name: archive.extractfile(member).read() for name, member in members if name in names}


def _batch(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix == ".bin":
        with reading(path, "one record or more of a label, from 0 to 9, and 3072 pixels, a byte each"):
            records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)
            return _as_arrays(records[:, 1:], records[:, 0])
    with reading(path, "a pickled dict of b'data', uint8 (n, 3072), and b'labels', n numbers from 0 to 9"):
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        # Of all iterables bytes takes only those of whole numbers from 0 to 255.
        return _as_arrays(batch[b"data"].pixels(), np.frombuffer(bytes(batch[b"labels"]), np.uint8))


def _as_arrays(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not 0 < len(labels) == len(pixels):
        raise ValueError(f"it has {len(pixels)} images and {len(labels)} labels")
    if labels.max() > 9:
        raise ValueError(f"it has the label {labels.max()}")
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, name: Any, *_: Any):
        self.name = name

    def __setstate__(self, state: Any):
        """Byte order and alignment, which bytes have not."""


class _Array:
    """Stands in for numpy.ndarray, whose own way out of a pickle trusts what it finds there."""

    def __init__(self, *_: Any):
        """Takes what only NumPy needs."""

    def __setstate__(self, state: tuple):
        _, self.shape, self.dtype, self.fortran_order, self.content = state

    def pixels(self) -> np.ndarray:
        if self.dtype.name not in (b"u1", "u1") or self.shape[1:] != (3072,):
            raise ValueError(f"b'data' has dtype {self.dtype.name!r} and shape {self.shape}")
        order = "F" if self.fortran_order else "C"
        return np.frombuffer(self.content, np.uint8).reshape(self.shape, order=order)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays and nothing else; not even they reach NumPy's code."""

    admitted = {
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy._core.multiarray._reconstruct": _Array,
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
        # How Python 3 writes bytes where Python 2 is to read them.
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.admitted[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array") from None
