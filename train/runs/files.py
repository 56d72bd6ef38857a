"""Small files, written whole or not at all, also when the process is killed meanwhile."""

import json
import os
from pathlib import Path
from typing import Any

from train.errors import UserError


def read_json(path: Path) -> Any:
    """Reads one JSON file.

    Raises:
      UserError: it is not there, or is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON file."""
    replace(path, as_json(value))


def replace(path: Path, content: bytes) -> None:
    """Replaces a file's content."""
    os.replace(write_beside(path, content), path)


def write_beside(path: Path, content: bytes) -> Path:
    """Writes what is to replace a file, and returns where: os.replace does the rest."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    return temporary


def as_json(value: Any) -> bytes:
    """Returns the text of a JSON file."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
