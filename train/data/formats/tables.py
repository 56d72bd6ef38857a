"""Tables: CSV files with a line of names, numbers below it, and a column of labels."""

import csv
import difflib
import re
from pathlib import Path

import numpy as np

from train.config import Data
from train.data.formats.reading import PARTS, Found, left_out, reading, regular

ACCEPTS = "a .csv file, or a folder with train.csv, and test.csv and validation.csv if there are any"
EXPECTED = (
    "a CSV file in UTF-8, separated by commas, semicolons or tabs: names of the columns in its first line, "
    "and numbers below, such as 1.5"
)
SEPARATORS = ",;\t"
QUOTED = re.compile(rf'(?:^|(?<=[{SEPARATORS}]))"(?:[^"]|"")*"', re.M)  # elsewhere in a cell it is an inch


def read(path: Path, config: Data) -> Found | None:
    """Read one table, or a folder of one for each split. Labels are texts."""
    files = {part: path / f"{part}.csv" for part in PARTS} if path.is_dir() else {"train": path}
    files = {part: file for part, file in files.items() if file.is_file()}
    if "train" not in files:
        return None
    others = sorted(found.name for found in path.glob("*.csv") if found not in files.values())
    arrays, columns = {}, ()
    for part, file in files.items():
        with reading(file, EXPECTED):
            names = _names(file)
            if config.label not in names:
                raise ValueError(
                    f"data.label = '{config.label}' is no column of it{_meant(config.label, names)}"
                )
            columns = columns or tuple(name for name in names if name != config.label)
        arrays[f"x_{part}"] = features(file, columns)
        arrays[f"y_{part}"] = _labels(file, names.index(config.label), config.label)
    notes = (left_out(path, others, ACCEPTS),) if others else ()
    return Found(arrays, tuple(files.values()), columns=columns, notes=notes)


def features(file: Path, columns: tuple[str, ...]) -> np.ndarray:
    """Read these columns of a table, which may have others: (rows, columns), float64.

    Raises:
      UserError: there is no such column, or something in it is not a finite number.
    """
    with reading(file, EXPECTED):
        names = _names(file)
        if missing := [name for name in columns if name not in names]:
            raise ValueError(f"it has no column {missing[0]!r}{_meant(missing[0], names)}")
        if not columns:
            raise ValueError("it has no column but that of the labels")
        at = [names.index(name) for name in columns]
        _check_lengths(file, len(names))
        try:
            values = np.loadtxt(regular(file), usecols=at, ndmin=2, **_options(file))
        except ValueError:
            values = None
        if values is None or not np.isfinite(values).all():
            raise ValueError(_first_fault(file, dict(zip(at, columns))))
    return values


def _labels(file: Path, at: int, name: str) -> np.ndarray:
    with reading(file, EXPECTED):
        texts = np.char.strip(np.loadtxt(file, str, usecols=at, ndmin=1, **_options(file)))
        if (texts == "").any():
            raise ValueError(f"row {int((texts == '').argmax()) + 1} has no label in column '{name}'")
    return texts


def _names(file: Path) -> list[str]:
    names, _ = _header(regular(file))
    if "" in names:
        raise ValueError(
            f"column {names.index('') + 1} has no name; give it one, or leave it out (pandas: index=False)"
        )
    if not names or all(_is_number(name) for name in names):
        raise ValueError("its first line has no names of columns" if names else "it is empty")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two columns are called {twice[0]!r}")
    return names


def _header(file: Path) -> tuple[list[str], int]:
    """Return the names in the first row, and how many lines end with it."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines, delimiter=_separator(file))
        return [name.strip() for name in next(filter(None, rows), [])], rows.line_num


def _separator(file: Path) -> str:
    with file.open(encoding="utf-8-sig") as lines:
        unquoted = QUOTED.sub("", lines.read(2**20).lstrip("\n"))
    first = unquoted.partition("\n")[0]
    return max(SEPARATORS, key=first.count)


def _options(file: Path) -> dict:
    return {
        "delimiter": _separator(file),
        "skiprows": _header(file)[1],
        "comments": None,
        "quotechar": '"',
        "encoding": "utf-8-sig",
    }


def _check_lengths(file: Path, columns: int) -> None:
    """Refuse rows that go on after the last column, as with 1,5 for 1.5, or with names of rows."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = filter(None, csv.reader(lines, delimiter=_separator(file)))
        next(rows)
        for number, row in enumerate(rows, 1):
            if len(row) > columns and (beyond := "".join(row[columns:]).strip()):
                raise ValueError(
                    f"row {number} has {beyond[:80]!r} after the last of its {columns} columns; put quotes "
                    "around cells that hold the separator"
                )


def _first_fault(file: Path, columns: dict[int, str]) -> str:
    """Say which cell is not a finite number, and why."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = filter(None, csv.reader(lines, delimiter=_separator(file)))
        next(rows)
        for number, row in enumerate(rows, 1):
            for at, name in columns.items():
                cell = row[at].strip() if at < len(row) else ""
                if not _is_number(cell) or not np.isfinite(float(cell)):
                    what = repr(cell[:80]) if cell else "nothing"
                    return f"row {number} has {what} in column '{name}', which has to be a finite number"
    return "its rows have different lengths"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text  # Python has more numbers than NumPy reads


def _meant(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; perhaps you meant '{close[0]}'" if close else f", which has {', '.join(names[:20])}"
