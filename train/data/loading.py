"""The data that a job names -> a `Dataset`."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from train.config import OF_NUMBERS, Data, LossName
from train.data import fingerprints
from train.data.dataset import Dataset, Examples, Labels, Split, permutation
from train.data.formats.readers import READERS
from train.data.formats.reading import PARTS, Found, reading
from train.data.labels import converted
from train.data.preprocessing import chunks, fitting
from train.errors import UserError

OWN = ("folder", "csv", "npz")  # data sets of whatever the user has


def load(config: Data, *, loss: LossName = "cross_entropy", cache: Path | None = None) -> Dataset:
    """Load the data that a job names. Every split is a function of the files alone, and not of the seed.

    Args:
      config: which data.
      loss: what the labels are: classes, or numbers.
      cache: the folder for what is made of files once, unless the job names one.

    Raises:
      UserError: a file is missing or malformed, or there is nothing to train on.
    """
    if config.path and not READERS[config.name].needs_path:
        own = " or ".join(map(repr, OWN))
        raise UserError(
            f"data.path: expected none with data.name = {config.name!r}, whose data come with the program, "
            f"got '{config.path}'; for data of your own set data.name = {own}."
        )
    path, found = _found(config, cache)
    examples, names = _examples(path, found, loss)
    splits, notes = _split(config, examples)
    return Dataset(
        **splits,
        labels=_labels(config, examples, splits["train"], names, loss),
        preprocessing=fitting(config, splits["train"]),
        fingerprint=_fingerprint(config, loss, cache, found, examples, names),
        columns=found.columns,
        notes=(*found.notes, *notes),
    )


def load_test(
    config: Data,
    *,
    loss: LossName,
    labels: Labels,
    columns: tuple[str, ...] = (),
    trained_on: str | None = None,
    cache: Path | None = None,
) -> tuple[str, Split, str]:
    """Return the test split alone, after its name, "test", and before the data's fingerprint.

    It is for a network that was trained with these labels and columns. Of data without a test split it is
    what training held out, if these are the data (if `trained_on` is their fingerprint), else all of them,
    whose name is "all": some may be training data, as in a folder to which images were added.

    Raises:
      UserError: a file is missing or malformed, or has labels that the network does not know.
    """
    path, found = _found(config, cache)
    if columns and found.columns != columns:
        if set(columns) != set(found.columns):
            raise UserError(
                f"{path}: expected the columns {', '.join(columns)}, got {', '.join(found.columns)}."
            )
        order = [found.columns.index(name) for name in columns]
        found.arrays.update({key: x[:, order] for key, x in found.arrays.items() if key.startswith("x_")})
        found = found._replace(columns=columns)
    examples, names = _examples(path, found, loss, known=labels)
    of_all = _fingerprint(config, loss, cache, found, examples, names)
    if "test" not in examples and of_all != trained_on:
        return "all", Split(*examples["train"], np.arange(len(examples["train"].labels))), of_all
    return "test", _split(config, examples)[0]["test"], of_all


def fingerprint(config: Data, *, loss: LossName, cache: Path | None = None) -> str | None:
    """Return the fingerprint of the data that a job names; None if they are not where they were.

    Raises:
      UserError: a file is malformed.
    """
    given, _ = _path(config)
    if READERS[config.name].needs_path and not (given and given.exists()):
        return None
    path, found = _found(config, cache)
    return _fingerprint(config, loss, cache, found, *_examples(path, found, loss))


def _path(config: Data) -> tuple[Path | None, str]:
    """Return where the data are said to be, None for embedded ones, and the name of what says so."""
    given = config.path or os.environ.get("JBN_DATA")
    if not given or not READERS[config.name].needs_path:
        return None, "data.path"
    return Path(given), "data.path" if config.path else "$JBN_DATA"


def _found(config: Data, cache: Path | None) -> tuple[str, Found]:
    """Read what is there, and return it with its name for errors."""
    reader = READERS[config.name]
    given, key = _path(config)
    if reader.needs_path and not given:
        raise UserError(
            f"data.path: expected {reader.accepts}, for data.name = {config.name!r}, got none; or set "
            "$JBN_DATA to it."
        )
    path = given or Path(config.name)
    config = dataclasses.replace(config, cache=config.cache or str(cache or path.parent))
    with reading(path, reader.accepts):
        if given and not path.exists():
            raise UserError(f"{key}: '{path}' does not exist; expected {reader.accepts}.")
        found = reader.read(path, config)
    if found is None:
        raise UserError(f"{key}: expected {reader.accepts}, got '{path}', which has none of it.")
    return str(path), found


def _examples(
    path: str, found: Found, loss: LossName, *, known: Labels | None = None
) -> tuple[dict[str, Examples], tuple[str, ...]]:
    """Return the examples of each split that the files have, checked, and the names of classes.

    Images get a channel axis where they have none. Floating point becomes float32; memory maps stay memory
    maps.
    """
    parts = [part for part in PARTS if f"x_{part}" in found.arrays]
    x, y = ({part: found.arrays[f"{axis}_{part}"] for part in parts} for axis in "xy")
    for part in parts:
        _check_shapes(path, part, x[part], y[part])
    targets, names = converted(path, y, found.names, loss=loss, known=known)
    inputs = {part: _inputs(path, part, x[part]) for part in parts}
    kinds = {part: f"{a.dtype}{list(a.shape[1:])}" for part, a in inputs.items()}
    for part, kind in kinds.items():
        if kind != kinds["train"]:
            raise UserError(
                f"{path}: expected examples of one kind, got {kinds['train']} in x_train, {kind} in x_{part}."
            )
    return {part: Examples(inputs[part], np.asarray(targets[part])) for part in parts}, names


def _check_shapes(path: str, part: str, x: np.ndarray, y: np.ndarray) -> None:
    def require(holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(
                f"{path}: expected {expected}, got x_{part} {x.dtype}{list(x.shape)}, y_{part} "
                f"{y.dtype}{list(y.shape)}."
            )

    require(x.ndim in (2, 3, 4), f"x_{part} of shape (n, features), (n, h, w) or (n, h, w, channels)")
    one_each = f"one label in y_{part} for each of the {len(x)} examples"
    hint = " (of one-hot ones, save y.argmax(-1))" if y.ndim == 2 and len(y) == len(x) else ""
    require(y.shape in ((len(x),), (len(x), 1)), one_each + hint)
    require(x.size > 0, "one example or more, of one number or more")
    floating = (
        f"x_{part} of uint8 or floating point (save x.astype('float32'), or of pixels x.astype('uint8'))"
    )
    require(x.dtype == np.uint8 or x.dtype.kind == "f", floating)


def _inputs(path: str, part: str, x: np.ndarray) -> np.ndarray:
    if x.dtype != np.uint8:
        if x.dtype != np.float32:
            with np.errstate(over="ignore"):
                x = x.astype(np.float32, subok=False)
        for rows in chunks(x, len(x)):
            if not (finite := np.isfinite(x[rows])).all():
                at = rows.start + int(finite.reshape(len(finite), -1).all(1).argmin())
                raise UserError(
                    f"{path}: expected finite float32 numbers in x_{part}, got others in x_{part}[{at}]."
                )
    return x[..., None] if x.ndim == 3 else x


def _split(config: Data, examples: dict[str, Examples]) -> tuple[dict[str, Split], list[str]]:
    """Return all three splits, and what to say of those that the files do not have."""
    whole = {part: Split(*of_part, np.arange(len(of_part.labels))) for part, of_part in examples.items()}
    count, notes = len(examples["train"].labels), []
    rows = permutation(0, count).astype(np.int64)
    if "test" not in whole:
        held_out = round(count * config.test)
        if not 0 < held_out < count:
            raise UserError(
                f"data.test: expected a fraction that holds out some of {count} examples, for the data "
                f"have no test split, and leaves some, got {config.test}."
            )
        rows, test = rows[held_out:], rows[:held_out]
        whole["test"] = Split(*examples["train"], np.sort(test))
        notes.append(
            f"The data have no test split: {held_out:,} of {count:,} examples are held out as one, the same "
            f"in every run (data.test = {config.test:g})."
        )
    if "validation" not in whole:
        held_out = round(len(rows) * config.validation)
        if held_out == len(rows):
            raise UserError(
                f"data.validation: expected a fraction that leaves some of {len(rows)} examples to train on, "
                f"got {config.validation}."
            )
        whole["validation"] = Split(*examples["train"], np.sort(rows[:held_out]))
        rows = rows[held_out:]
    return whole | {"train": Split(*examples["train"], np.sort(rows))}, notes


def _labels(
    config: Data, examples: dict[str, Examples], train: Split, names: tuple[str, ...], loss: LossName
) -> Labels:
    given = train.labels[train.rows]
    if loss in OF_NUMBERS:
        targets = given.astype(np.float64)
        return Labels(mean=float(targets.mean()), std=float(targets.std()))
    # All splits count, for a class that only one of them has.
    classes = len(names) or 1 + max(int(of_part.labels.max()) for of_part in examples.values())
    if classes > len(examples["train"].labels):
        raise UserError(
            f"data.name = {config.name!r}: expected labels from 0 to the number of classes - 1, got labels "
            f"up to {classes - 1} for {len(examples['train'].labels)} training examples."
        )
    return Labels(counts=tuple(np.bincount(given, minlength=classes).tolist()), names=names)


def _fingerprint(config: Data, loss: LossName, cache: Path | None, found: Found, examples, names) -> str:
    """Hash all examples; of large files once, as long as their sizes and times stay the same."""
    folder = Path(config.cache) if config.cache else cache
    key = repr((loss, config.name, config.label, names, found.columns))
    return fingerprints.cached(
        folder, found.files, key, lambda: fingerprints.of(examples, names, found.columns)
    )
