"""Raw arrays -> splits and how they become a network's inputs; the order of the training data; batches."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

import jbn
from train.config import Data
from train.data import sources
from train.errors import UserError


class Examples(NamedTuple):
    inputs: np.ndarray  # (k, height, width, channels) or (k, features), uint8 or float32
    labels: np.ndarray  # (k,), int32


@dataclass(frozen=True, eq=False)
class Split:
    """The examples at some rows of arrays that may be larger than memory."""

    inputs: np.ndarray  # (m, ...), uint8 or float32: all rows of the file, maybe a memory map
    labels: np.ndarray  # (m,), int32
    rows: np.ndarray  # (n,), int64: which of them belong to the split, ascending

    def __len__(self) -> int:
        """Returns n."""
        return len(self.rows)

    def take(self, at: slice | np.ndarray) -> Examples:
        """Copies the examples at these positions in the split, a slice or (k,) integers, into memory."""
        rows = self.rows[at]
        return Examples(np.asarray(self.inputs[rows]), self.labels[rows])


class Batch(NamedTuple):
    inputs: np.ndarray  # (batch, ...)
    labels: np.ndarray  # (batch,)
    mask: np.ndarray  # (batch,), False for padding


class Preprocessing(NamedTuple):
    """How raw inputs become a network's: (inputs - mean) / std, in float32."""

    mean: np.ndarray  # (), (channels,) or (features,), float32, in units of the raw inputs
    std: np.ndarray  # likewise, or in the shape of an example where features are scaled apart

    def __call__(self, inputs: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        return (inputs.astype(np.float32) - self.mean) / self.std


class Dataset(NamedTuple):
    train: Split
    validation: Split  # of length 0 where the job holds out none
    test: Split
    classes: int
    preprocessing: Preprocessing
    fingerprint: str  # tells other training or test data, wherever they lie and in whichever format


def load(config: Data) -> Dataset:
    """Loads the data that a job names. Every split is a function of the files alone, and not of the seed.

    Raises:
      UserError: a file is missing or malformed, or there is nothing to train on.
    """
    train, test = sources.read(config)
    examples = len(train.labels)
    # Both count, for a class that only one of them has.
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    if classes > examples:
        raise UserError(
            f"data.name = {config.name!r} has labels up to {classes - 1} and {examples} training "
            "examples; wanted labels from 0 to the number of classes - 1."
        )
    held_out = round(examples * config.validation)
    if held_out == examples:
        raise UserError(f"data.validation = {config.validation} leaves no example to train on; wanted less.")
    shuffled = sources.permutation(0, examples).astype(np.int64)
    training = Split(*train, np.sort(shuffled[held_out:]))
    preprocessing = _standardizing(training) if config.normalize else _scaling(training)
    if config.feature_scales:
        scales = _feature_scales(config.feature_scales, training.inputs.shape[1:])
        preprocessing = preprocessing._replace(std=preprocessing.std / scales)
    return Dataset(
        train=training,
        validation=Split(*train, np.sort(shuffled[:held_out])),
        test=Split(*test, np.arange(len(test.labels))),
        classes=classes,
        preprocessing=preprocessing,
        fingerprint=_fingerprint(train, test),
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
    return sources.permutation([seed, epoch], examples)


def eval_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Yields each example exactly once, in batches of one size, the last one padded with zeros and masked."""
    for start in range(0, len(split), batch_size):
        inputs, labels = split.take(slice(start, start + batch_size))
        padding = batch_size - len(labels)
        yield Batch(
            *(
                np.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1))
                for a in (inputs, labels, np.ones(len(labels), bool))
            )
        )


def _scaling(split: Split) -> Preprocessing:
    """Bytes become numbers in [0, 1]; floating point is left as it is."""
    return Preprocessing(
        mean=np.array(0, np.float32), std=np.array(255 if split.inputs.dtype == np.uint8 else 1, np.float32)
    )


def _standardizing(split: Split) -> Preprocessing:
    """Measures the split over all axes but the last, in chunks, for it may be larger than memory."""
    parts = (
        jbn.moments(split.take(positions).inputs.astype(np.float32, copy=False))
        for positions in sources.chunks(split.inputs, len(split))
    )
    whole = functools.reduce(jbn.merge, parts)
    mean, std = np.asarray(whole.mean), np.sqrt(np.asarray(whole.var))
    if not np.isfinite(std).all():
        raise UserError(
            "data.normalize = true, and the inputs are too large for a standard deviation in float32; wanted "
            "smaller ones, or data.normalize = false."
        )
    # Of a constant all that is measured is rounding.
    varies = std > np.finfo(np.float32).eps * np.abs(mean)
    return Preprocessing(mean, np.where(varies, std, np.float32(1)))


def _feature_scales(limits: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Returns what to multiply each feature with: of an example's shape, float32, the same for every job."""
    return np.exp(np.random.RandomState(0).uniform(*np.log(limits), shape)).astype(np.float32)


def _fingerprint(*parts: sources.Arrays) -> str:
    """Hashes shapes, dtypes, all labels, and inputs at rows that are few enough to take no time."""
    digest = hashlib.sha256()
    for inputs, labels in parts:
        rows = np.linspace(0, len(inputs) - 1, min(len(inputs), 1024)).astype(np.int64)
        digest.update(f"{inputs.dtype.name}{inputs.shape}".encode())
        digest.update(labels.tobytes())
        digest.update(inputs[rows].tobytes())
    return digest.hexdigest()[:16]
