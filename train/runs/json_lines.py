"""Files to which a run appends a line of JSON at a time."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from train.runs import files


class JsonLines:
    """A file of objects that have a `step` each, and grow with it."""

    def __init__(self, path: Path, *, first_step: int):
        """Opens the file of a run that goes on from `first_step`, and drops what it has after it.

        At step 0 a run begins, whatever an earlier start has left.
        """
        self._path = path
        self.kept = [line for line in read(path) if first_step and line["step"] <= first_step]
        if path.exists():
            files.replace(path, "".join(map(_as_line, self.kept)).encode())

    def append(self, *objects: dict[str, Any]) -> None:
        """Writes objects, a line each. What is no finite number becomes null, for JSON has none."""
        with self._path.open("a") as file:
            file.write("".join(_as_line(_finite(value)) for value in objects))


def read(path: Path) -> list[dict[str, Any]]:
    """Reads such a file, if it is there, without a last line that a kill may have cut."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def _as_line(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
