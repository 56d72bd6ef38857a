"""A data set in memory or in mapped files: its splits, their order and their batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from train.errors import UserError


class Examples(NamedTuple):
    inputs: np.ndarray  # (k, height, width, channels) or (k, features), uint8 or float32
    labels: np.ndarray  # (k,), int32 of classes, float32 of numbers


@dataclass(frozen=True, eq=False)
class Split:
    """The examples at some rows of arrays that may be larger than memory."""

    inputs: np.ndarray  # (m, ...), uint8 or float32: all rows of the file, possibly a memory map
    labels: np.ndarray  # (m,), int32 of classes, float32 of numbers
    rows: np.ndarray  # (n,), int64: the rows that belong to the split, ascending

    def __len__(self) -> int:
        """Return n."""
        return len(self.rows)

    def take(self, at: slice | np.ndarray) -> Examples:
        """Copy the examples at these positions in the split, a slice or (k,) integers, into memory."""
        rows = self.rows[at]
        return Examples(np.asarray(self.inputs[rows]), self.labels[rows])


class Preprocessing(NamedTuple):
    """How raw inputs become a network's: (inputs - mean) / std, in float32."""

    mean: np.ndarray  # (), (channels,) or (features,), float32, in units of the raw inputs
    std: np.ndarray  # likewise, or in the shape of an example where features have scales of their own

    def __call__(self, inputs: Any) -> Any:
        """Return what the network gets, of NumPy or of JAX as the inputs are."""
        return (inputs.astype(np.float32) - self.mean) / self.std


class Labels(NamedTuple):
    """What the training data say of the labels: those of classes, or numbers. Equal by value."""

    counts: tuple[int, ...] = ()  # training examples of each class; empty for numbers
    names: tuple[str, ...] = ()  # of the classes, where the data have any
    mean: float = 0.0  # of numbers, over the training data
    std: float = 1.0

    @property
    def outputs(self) -> int:
        """How many outputs a network for them has: one for each class, or one number."""
        return len(self.counts) or 1

    def name(self, index: int) -> str:
        """Return what a class is called."""
        return self.names[index] if self.names else str(index)


class Dataset(NamedTuple):
    train: Split
    validation: Split  # of length 0 where the job holds out none
    test: Split
    labels: Labels
    preprocessing: Preprocessing
    fingerprint: str  # differs for other data in any split, wherever they are and in whichever format
    columns: tuple[str, ...] = ()  # names of the features of a table
    notes: tuple[str, ...] = ()  # what the user should know of the data

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.train.inputs.shape[1:]


class Batch(NamedTuple):
    examples: Examples  # of one size for all batches
    mask: np.ndarray  # (batch,), False for padding


def eval_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Yield each example exactly once, in batches of one size, the last one padded with zeros and masked."""
    for start in range(0, len(split), batch_size):
        examples = split.take(slice(start, start + batch_size))
        size = len(examples.labels)
        pad = lambda a, missing=batch_size - size: np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1))
        yield Batch(Examples(*map(pad, examples)), np.arange(batch_size) < size)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the number of whole batches; the remainder is dropped, other rows each epoch."""
    if examples < batch_size:
        raise UserError(
            f"batch_size: expected at most the {examples} training examples, got {batch_size}; "
            "set a smaller one."
        )
    return examples // batch_size


def order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Return the order in which an epoch visits the training data: (examples,), int32."""
    return permutation([seed, epoch], examples)


def permutation(seed: int | list[int], n: int) -> np.ndarray:
    """Return the numbers below n in an order that follows from the seed, on every machine: (n,), int32."""
    # RandomState is the one NumPy generator whose stream is promised never to change.
    return np.random.RandomState(seed).permutation(n).astype(np.int32)
