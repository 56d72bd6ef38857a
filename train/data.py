"""Sources of data -> arrays; the order of the training data; fixed-size, masked evaluation batches."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.config import Data, UserError


class Split(NamedTuple):
    inputs: np.ndarray  # (n, height, width, channels) or (n, features), float32
    labels: np.ndarray  # (n,), int32


class Dataset(NamedTuple):
    train: Split
    validation: Split  # of length 0 where the job holds out none
    test: Split
    classes: int


class Batch(NamedTuple):
    inputs: np.ndarray  # (batch, ...)
    labels: np.ndarray  # (batch,)
    mask: np.ndarray  # (batch,), False for padding


def load(config: Data) -> Dataset:
    """Loads the data that a job names. Every split is a function of the files alone, and not of the seed.

    Raises:
      UserError: a file is missing or malformed.
    """
    train, test = _digits() if config.name == "digits" else _npz(_find(config))
    # Both count, for a class that only one of them has.
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    if classes > len(train.labels):
        raise UserError(
            f"data.name = {config.name!r} has labels up to {classes - 1} and {len(train.labels)} training "
            "examples; wanted labels from 0 to the number of classes - 1."
        )
    held_out = round(len(train.labels) * config.validation)
    if held_out == len(train.labels):
        raise UserError(f"data.validation = {config.validation} leaves no example to train on; wanted less.")
    shuffled = _permutation(0, len(train.labels))
    return Dataset(
        train=_take(train, np.sort(shuffled[held_out:])),
        validation=_take(train, np.sort(shuffled[:held_out])),
        test=test,
        classes=classes,
    )


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Returns the number of whole batches; the remainder is dropped, other rows each epoch."""
    if examples < batch_size:
        raise UserError(
            f"batch_size = {batch_size}, but there are {examples} training examples; wanted a batch_size of "
            f"{examples} or less."
        )
    return examples // batch_size


def order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Returns the order in which an epoch visits the training data: (examples,), int32."""
    return _permutation([seed, epoch], examples)


def eval_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Yields each example exactly once, in batches of one size, the last one padded with zeros and masked."""
    for start in range(0, len(split.labels), batch_size):
        rows = slice(start, start + batch_size)
        padding = batch_size - len(split.labels[rows])
        inputs, labels, mask = (
            np.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1))
            for a in (split.inputs[rows], split.labels[rows], np.ones(batch_size - padding, bool))
        )
        yield Batch(inputs, labels, mask)


def _digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    split = Split((images / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels.astype(np.int32))
    shuffled = _permutation(0, len(labels))
    return _take(split, np.sort(shuffled[360:])), _take(split, np.sort(shuffled[:360]))


def _find(config: Data) -> Path:
    given = config.path or os.environ.get("JBN_DATA")
    accepted = "an .npz file with x_train, y_train, x_test and y_test"
    if not given:
        raise UserError(
            f"data.name = {config.name!r} needs a file: give --data.path, or set $JBN_DATA, to {accepted}, "
            f"or to the folder that holds it as {config.name}.npz."
        )
    path = Path(given)
    path = path / f"{config.name}.npz" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist; wanted {accepted}, from --data.path or $JBN_DATA.")
    return path


def _npz(path: Path) -> tuple[Split, Split]:
    try:
        # A pickle could run code, so arrays of objects are refused.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from None
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise UserError(f"{path} has members that are no arrays; wanted an archive that np.savez wrote.")
    missing = {"x_train", "y_train", "x_test", "y_test"} - set(arrays)
    if missing:
        raise UserError(f"{path} has {sorted(arrays)}; wanted {sorted(missing)} too.")
    train, test = (_split(path, part, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise UserError(
            f"{path}: an example of x_train has shape {train.inputs.shape[1:]}, one of x_test "
            f"{test.inputs.shape[1:]}; wanted the same."
        )
    return train, test


def _split(path: Path, part: str, x: np.ndarray, y: np.ndarray) -> Split:
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
    require(
        x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating), f"x_{part} of uint8 or floating point"
    )
    with np.errstate(over="ignore"):
        inputs = x.astype(np.float32) / np.float32(255 if x.dtype == np.uint8 else 1)
    require(bool(np.isfinite(inputs).all()), f"finite numbers in x_{part}")
    return Split(inputs[..., None] if x.ndim == 3 else inputs, y.reshape(-1).astype(np.int32))


def _permutation(seed: int | list[int], n: int) -> np.ndarray:
    # RandomState is the one NumPy generator whose stream is promised never to change.
    return np.random.RandomState(seed).permutation(n).astype(np.int32)


def _take(split: Split, rows: np.ndarray) -> Split:
    return Split(split.inputs[rows], split.labels[rows])
