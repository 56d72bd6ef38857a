"""Labels as data have them, numbers or texts -> positions of classes, or targets."""

from typing import Any

import numpy as np

from train.config import OF_NUMBERS, LossName
from train.data.dataset import Labels
from train.errors import UserError, shortened

Parts = dict[str, np.ndarray]  # the labels of each split
LOST = 0.01  # of a standard deviation of numbers, the most that rounding to float32 may change one


def converted(
    what: str, given: Parts, names: tuple[str, ...], *, loss: LossName, known: Labels | None = None
) -> tuple[Parts, tuple[str, ...]]:
    """Return labels as (n,) int32 positions of classes, or float32 targets, and the names of classes.

    Args:
      what: the data, for errors.
      given: (n,) or (n, 1) integers >= 0, texts, or, with a loss in OF_NUMBERS, numbers.
      names: of the classes, if labels are positions already.
      known: the labels that a network was trained with, whose positions texts get; if not given, classes
        are in the order of their names, or of their numbers, if all are integers.

    Raises:
      UserError: the labels do not suit the loss, or there are others than the known ones.
    """
    texts = {part: _texts(labels) for part, labels in given.items()}
    if loss in OF_NUMBERS:
        return {part: _targets(what, part, labels) for part, labels in texts.items()}, ()
    if names:
        texts = {part: np.array(names)[labels] for part, labels in texts.items()}
    elif known is not None and known.names and all(map(_is_integer, known.names)):
        # Beside classes '1' and '2' the number 1 is the class '1', and not the second one.
        texts = {part: y.astype(str) if y.dtype.kind in "iu" else y for part, y in texts.items()}
    if not all(labels.dtype.kind == "U" for labels in texts.values()):
        return {part: _positions(what, part, labels, known) for part, labels in texts.items()}, ()
    found = sorted({str(name) for labels in texts.values() for name in np.unique(labels)}, key=by_number)
    if fractions := [name for name in found if _number(name) is not None and not _is_integer(name)]:
        raise UserError(
            f"{what}: expected classes as labels, got the number {fractions[0][:80]}; for numbers set "
            "model.loss = 'squared_error', for classes write integers or texts."
        )
    order = tuple(found) if known is None else tuple(map(known.name, range(known.outputs)))
    if unknown := [name for name in found if name not in order]:
        raise UserError(
            f"{what}: expected labels as in the data that the network was trained on, "
            f"{shortened([*map(repr, order)])}, got {shortened([*map(repr, unknown)])}."
        )
    position = {name: index for index, name in enumerate(order)}
    positions = {}
    for part, labels in texts.items():
        unique, inverse = np.unique(labels, return_inverse=True)
        positions[part] = np.array([position[str(name)] for name in unique], np.int32)[inverse.reshape(-1)]
    return positions, order


def by_number(name: str) -> tuple[bool, int, str]:
    """Order names by their numbers, if they are integers, and before others."""
    return (False, int(name), name) if _is_integer(name) else (True, 0, name)


def _texts(labels: np.ndarray) -> np.ndarray:
    """Return (n,) labels, bytes as texts."""
    labels = labels.reshape(-1)
    return np.char.decode(labels, "utf-8", "replace") if labels.dtype.kind == "S" else labels


def _targets(what: str, part: str, labels: np.ndarray) -> np.ndarray:
    try:
        targets = labels.astype(np.float64)
    except (ValueError, TypeError):
        wrong = next((str(name) for name in labels if _number(str(name)) is None), labels.dtype)
        raise UserError(
            f"{what}: expected numbers as the labels of the {part} data, with model.loss = "
            f"'squared_error', got {wrong!r}; for classes set model.loss = 'cross_entropy'."
        ) from None
    with np.errstate(over="ignore"):
        rounded = targets.astype(np.float32)
    if not (finite := np.isfinite(rounded)).all():
        at = int(finite.argmin())
        raise UserError(
            f"{what}: expected finite float32 numbers as the labels of the {part} data, got {targets[at]} as "
            f"number {at + 1}."
        )
    mean, std = targets.mean(), targets.std()
    differ = part == "train" and (targets != targets[0]).any()
    if differ and np.abs(rounded - targets).max() > LOST * std:
        raise UserError(
            f"{what}: expected labels whose differences float32 can hold, got numbers about {mean:.10g} with "
            f"a standard deviation of {std:.3g}; subtract {mean:.0f} from all labels."
        )
    return rounded


def _positions(what: str, part: str, labels: np.ndarray, known: Labels | None) -> np.ndarray:
    if labels.dtype.kind == "f":
        raise UserError(
            f"{what}: expected integers or texts as y_{part}, got {labels.dtype}; for numbers set "
            "model.loss = 'squared_error', for classes save y as integers."
        )
    if labels.dtype.kind not in "iub" or labels.min() < 0 or labels.max() >= 2**31:
        got = f"{labels.min()} to {labels.max()}" if labels.dtype.kind in "iub" else labels.dtype
        raise UserError(f"{what}: expected labels in y_{part} that are integers >= 0 and < 2**31, got {got}.")
    if known is not None and labels.max() >= known.outputs:
        raise UserError(
            f"{what}: expected labels up to {known.outputs - 1}, as in the data that the network was trained "
            f"on, got up to {labels.max()}."
        )
    return labels.astype(np.int32)


def _number(name: Any) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii() and len(name) < 20
