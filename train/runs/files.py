"""Small files, written whole or not at all, also when the process is killed: JSON, and lines of JSON."""

import contextlib
import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from train.errors import UserError

LARGEST = sys.float_info.max


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
      UserError: it does not exist, or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Read a text file; an OSError says so if it is a pipe or a device, which might never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a file", str(path))
    return path.read_text("utf-8", errors)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    replace(path, as_json(value))


def replace(path: Path, content: bytes | bytearray) -> None:
    """Replace a file's content."""
    os.replace(write_next_to(path, content), path)


def write_next_to(path: Path, content: bytes | bytearray) -> Path:
    """Write what is to replace a file, and return where: os.replace does the rest."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    return temporary


def as_json(value: Any) -> bytes:
    """Return the text of a JSON file. Numbers that are not finite become null, for JSON has none."""
    return (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode()


class JsonLines:
    """A file of JSON objects, one a line, each with a `step`, in their order."""

    def __init__(self, path: Path, *, first_step: int):
        """Open the file of a run that goes on from `first_step`, and drop what it has after it.

        At step 0 a run begins, whatever an earlier start has left.
        """
        self._path = path
        self.kept = [line for line in read_lines(path) if first_step and line["step"] <= first_step]
        if path.exists():
            replace(path, "".join(map(_as_line, self.kept)).encode())

    def append(self, *objects: dict[str, Any]) -> None:
        """Write objects, a line each. Numbers that are not finite become null."""
        with self._path.open("a") as file:
            file.write("".join(map(_as_line, objects)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read such a file, if it exists, without a last line that a kill may have cut."""
    lines = []
    for text in read_text(path, errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and _is_step(line.get("step"))]


def is_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a number, or null for one that was not finite."""
    return value is None or (type(value) in (int, float) and abs(value) <= LARGEST)


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _as_line(value: dict[str, Any]) -> str:
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
