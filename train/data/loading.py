"""The data that a job names -> a `Dataset`."""

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import jbn
from train.config import Data
from train.data.dataset import Dataset, Examples, Labels, Preprocessing, Split
from train.data.formats import READERS, permutation, reading
from train.errors import UserError

CHUNK = 2**26  # bytes


def load(config: Data) -> Dataset:
    """Load the data that a job names. Every split is a function of the files alone, and not of the seed.

    Raises:
      UserError: a file is missing or malformed, or there is nothing to train on.
    """
    train, test = read(config)
    examples = len(train.labels)
    # Both count, for a class that only one of them has.
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    if classes > examples:
        raise UserError(
            f"data.name = {config.name!r}: expected labels from 0 to the number of classes - 1, got labels "
            f"up to {classes - 1} for {examples} training examples."
        )
    held_out = round(examples * config.validation)
    if held_out == examples:
        raise UserError(
            f"data.validation: expected a fraction that leaves some of {examples} examples to train on, "
            f"got {config.validation}."
        )
    shuffled = permutation(0, examples).astype(np.int64)
    training = Split(*train, np.sort(shuffled[held_out:]))
    return Dataset(
        train=training,
        validation=Split(*train, np.sort(shuffled[:held_out])),
        test=Split(*test, np.arange(len(test.labels))),
        labels=Labels(counts=tuple(np.bincount(train.labels[training.rows], minlength=classes).tolist())),
        preprocessing=_preprocessing(config, training),
        fingerprint=_fingerprint(train, test),
    )


def read(config: Data) -> tuple[Examples, Examples]:
    """Read the training and the test data that a job names. The files have to stay as they are meanwhile.

    Images get a channel axis where they have none. Floating point becomes float32; memory maps stay memory
    maps.

    Raises:
      UserError: a file is missing or malformed.
    """
    reader = READERS[config.name]
    path = (config.path or os.environ.get("JBN_DATA")) if reader.needs_path else config.name
    if not path:
        raise UserError(
            f"data.path: expected {reader.accepts}, for data.name = {config.name!r}, got none; or set "
            "$JBN_DATA to it."
        )
    key = "data.path" if config.path else "$JBN_DATA"
    with reading(Path(path), reader.accepts):
        if reader.needs_path and not Path(path).exists():
            raise UserError(f"{key}: '{path}' does not exist; expected {reader.accepts}.")
        found = reader.read(Path(path))
    if not found:
        raise UserError(f"{key}: expected {reader.accepts}, got '{path}', which has none of it.")
    train, test = (_checked(path, part, found[f"x_{part}"], found[f"y_{part}"]) for part in ("train", "test"))
    of_train, of_test = (f"{inputs.dtype}{list(inputs.shape[1:])}" for inputs, _ in (train, test))
    if of_train != of_test:
        raise UserError(
            f"{path}: expected examples of one kind, got {of_train} in x_train, {of_test} in x_test."
        )
    return train, test


def _checked(path: str, part: str, x: np.ndarray, y: np.ndarray) -> Examples:
    def require(holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(
                f"{path}: expected {expected}, got x_{part} {x.dtype}{list(x.shape)}, y_{part} "
                f"{y.dtype}{list(y.shape)}."
            )

    require(x.ndim in (2, 3, 4), f"x_{part} of shape (n, features), (n, h, w) or (n, h, w, channels)")
    require(y.shape in ((len(x),), (len(x), 1)), f"one label in y_{part} for each of the {len(x)} examples")
    require(x.size > 0, "one example or more, of one number or more")
    in_range = np.issubdtype(y.dtype, np.integer) and y.min() >= 0 and y.max() < 2**31
    require(in_range, f"labels in y_{part} that are integers >= 0 and < 2**31")
    is_bytes = x.dtype == np.uint8
    require(is_bytes or np.issubdtype(x.dtype, np.floating), f"x_{part} of uint8 or floating point")
    if not is_bytes and x.dtype != np.float32:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32, subok=False)
    finite = is_bytes or all(np.isfinite(x[rows]).all() for rows in chunks(x, len(x)))
    require(finite, f"finite numbers in x_{part}")
    return Examples(x[..., None] if x.ndim == 3 else x, y.reshape(-1).astype(np.int32, subok=False))


def chunks(examples: np.ndarray, count: int) -> Iterator[slice]:
    """Yield slices that cover `count` such examples, each of up to 64 MiB as float32 or of one."""
    size = max(1, CHUNK // (4 * examples[0].size))
    return (slice(start, start + size) for start in range(0, count, size))


def _preprocessing(config: Data, split: Split) -> Preprocessing:
    mean, std = np.float32(0), np.float32(255 if split.inputs.dtype == np.uint8 else 1)
    if config.normalize:
        mean, std = _mean_and_std(split)
    if config.feature_scales:
        shape = split.inputs.shape[1:]
        # The same for every job.
        low, high = np.log(config.feature_scales)
        scales = np.exp(np.random.RandomState(0).uniform(low, high, shape))
        std = std / scales.astype(np.float32)
    return Preprocessing(np.asarray(mean), np.asarray(std))


def _mean_and_std(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Measure the split over all axes but the last, in chunks, for it may be larger than memory."""
    parts = (
        jbn.moments(split.take(positions).inputs.astype(np.float32, copy=False))
        for positions in chunks(split.inputs, len(split))
    )
    whole = functools.reduce(jbn.merge, parts)
    mean, std = np.asarray(whole.mean), np.sqrt(np.asarray(whole.var))
    if not np.isfinite(std).all():
        raise UserError(
            "data.normalize: expected inputs whose standard deviation float32 can hold, got larger ones; "
            "scale them, or set data.normalize = false."
        )
    # What is measured of a constant is rounding.
    varies = std > np.finfo(np.float32).eps * np.abs(mean)
    return mean, np.where(varies, std, np.float32(1))


def _fingerprint(*parts: Examples) -> str:
    """Hash shapes, dtypes, all labels, and inputs at rows that are few enough to take no time."""
    digest = hashlib.sha256()
    for inputs, labels in parts:
        rows = np.linspace(0, len(inputs) - 1, min(len(inputs), 1024)).astype(np.int64)
        digest.update(f"{inputs.dtype.name}{inputs.shape}".encode())
        digest.update(labels.tobytes())
        for part in chunks(inputs, len(rows)):
            digest.update(inputs[rows[part]].tobytes())
    return digest.hexdigest()[:16]
