"""The data that a job names -> raw arrays, checked: as they are in the files, large ones as memory maps."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.config import Data
from train.data.cifar import cifar10
from train.data.formats import idx, npz, reading
from train.errors import UserError

NPZ = "an .npz file with x_train, y_train, x_test and y_test"
ACCEPTED = {
    "npz": f"{NPZ}, or the folder that holds it as npz.npz",
    "mnist": f"{NPZ}, or the folder that holds it as mnist.npz or that holds MNIST's four IDX files "
    "(train-images-idx3-ubyte and so on, each as it is or as .gz)",
    "cifar10": f"{NPZ}, cifar-10-binary.tar.gz or cifar-10-python.tar.gz, or the folder that holds one of "
    "them, an .npz file as cifar10.npz, or what one of the archives has",
}
CHUNK = 2**26  # bytes


class Arrays(NamedTuple):
    inputs: np.ndarray  # (m, height, width, channels) or (m, features), uint8 or float32, maybe a memory map
    labels: np.ndarray  # (m,), int32


def read(config: Data) -> tuple[Arrays, Arrays]:
    """Reads the training and the test data that a job names. The files have to stay as they are meanwhile.

    Images get a channel axis where they have none. Floating point becomes float32; what is uint8 or float32
    and lies in its file uncompressed stays there, and is a memory map.

    Raises:
      UserError: a file is missing or malformed.
    """
    if config.name == "digits":
        return _digits()
    accepted = ACCEPTED[config.name]
    given = config.path or os.environ.get("JBN_DATA")
    if not given:
        raise UserError(
            f"data.name = {config.name!r} needs a file: give --data.path, or set $JBN_DATA, to {accepted}."
        )
    path = Path(given)
    with reading(path, accepted):
        found = _find(config.name, path)
    if not found:
        problem = "has nothing of the kind" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; wanted {accepted}, from --data.path or $JBN_DATA.")
    train, test = (_check(path, part, found[f"x_{part}"], found[f"y_{part}"]) for part in ("train", "test"))
    of_train, of_test = (f"{inputs.dtype} and {inputs.shape[1:]}" for inputs, _ in (train, test))
    if of_train != of_test:
        raise UserError(
            f"{path}: dtype and shape of an example of x_train are {of_train}, of x_test {of_test}; "
            "wanted the same."
        )
    return train, test


def chunks(examples: np.ndarray, count: int) -> Iterator[slice]:
    """Yields slices that cover `count` such examples, each of up to 64 MiB as float32 or of one."""
    size = max(1, CHUNK // (4 * examples[0].size))
    return (slice(start, start + size) for start in range(0, count, size))


def permutation(seed: int | list[int], n: int) -> np.ndarray:
    """Returns the numbers below n in an order that follows from the seed, on every machine: (n,), int32."""
    # RandomState is the one NumPy generator whose stream is promised never to change.
    return np.random.RandomState(seed).permutation(n).astype(np.int32)


def _digits() -> tuple[Arrays, Arrays]:
    # scikit-learn's file without scikit-learn, whose import takes longer than the job's training.
    (package,) = find_spec("sklearn").submodule_search_locations
    table = np.loadtxt(Path(package) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    inputs, labels = np.float32(table[:, :-1] / 16).reshape(-1, 8, 8, 1), np.int32(table[:, -1])
    shuffled = permutation(0, len(labels))
    train, test = np.sort(shuffled[360:]), np.sort(shuffled[:360])
    return Arrays(inputs[train], labels[train]), Arrays(inputs[test], labels[test])


def _find(name: str, path: Path) -> dict[str, np.ndarray]:
    archive = path / f"{name}.npz" if path.is_dir() else path
    if archive.is_file() and not (name == "cifar10" and archive.suffix in (".gz", ".tgz", ".tar")):
        return npz(archive)
    readers = {"mnist": idx, "cifar10": cifar10}
    return readers[name](path) if name in readers else {}


def _check(path: Path, part: str, x: np.ndarray, y: np.ndarray) -> Arrays:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(
                f"{path}: x_{part} is {x.dtype}{list(x.shape)}, y_{part} is {y.dtype}{list(y.shape)}; "
                f"wanted {what}."
            )

    require(x.ndim in (2, 3, 4), f"x_{part} of shape (n, features), (n, h, w) or (n, h, w, channels)")
    require(y.shape in ((len(x),), (len(x), 1)), f"one label in y_{part} for each of the {len(x)} examples")
    require(x.size > 0, "one example or more, of one number or more")
    in_range = np.issubdtype(y.dtype, np.integer) and y.min() >= 0 and y.max() < 2**31
    require(in_range, f"labels in y_{part} that are integers >= 0 and < 2**31")
    is_bytes = x.dtype == np.uint8
    require(is_bytes or np.issubdtype(x.dtype, np.floating), f"x_{part} of uint8 or floating point")
    if is_bytes or x.dtype == np.float32:
        inputs = x
    else:
        with np.errstate(over="ignore"):
            inputs = x.astype(np.float32, subok=False)
    finite = is_bytes or all(np.isfinite(inputs[rows]).all() for rows in chunks(inputs, len(inputs)))
    require(finite, f"finite numbers in x_{part}")
    labels = y.reshape(-1).astype(np.int32, subok=False)
    return Arrays(inputs[..., None] if x.ndim == 3 else inputs, labels)
