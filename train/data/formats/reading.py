"""What readers of files have in common: what they return, and how they fail."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.errors import DISK_FULL, UserError, shortened

PARTS = ("train", "validation", "test")


class Found(NamedTuple):
    """What a reader found at a path."""

    arrays: dict[str, np.ndarray]  # x_train and y_train, and those of test and validation where there are any
    files: tuple[Path, ...] = ()  # where they come from
    names: tuple[str, ...] = ()  # of classes, where labels are their positions
    columns: tuple[str, ...] = ()  # names of the features of a table
    notes: tuple[str, ...] = ()  # what the user should know of it


@contextlib.contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a UserError that names the file, and hide warnings."""
    with warnings.catch_warnings():
        # NumPy warns of headers that Python 2 wrote, Pillow of odd metadata, and both read on.
        warnings.simplefilter("ignore")
        with naming(path, expected):
            yield


@contextlib.contextmanager
def naming(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a UserError that names the file; other threads may do the same."""
    try:
        yield
    except UserError:
        raise
    # On unforeseen bytes a parser may fail with anything.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}; expected {expected}.") from error


def regular(path: Path) -> Path:
    """Return a path that is a file, and not something that one could wait for, such as a pipe."""
    if not path.is_file():
        raise ValueError("it is no file" if path.exists() else "it does not exist")
    return path


def left_out(path: Path, names: Sequence[str], expected: str) -> str:
    """Say that some of what is at a path is not read: a split that is misspelt would be missed by nobody."""
    return f"Left out of '{path}': {shortened([*map(repr, names)])}; expected {expected}."
