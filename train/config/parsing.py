"""The values of a file -> a `Config`, or a sentence that says what is wrong with them."""

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from train.config.schema import Config, Data, Model, Optimizer
from train.errors import UserError

_SCHEMA = TypeAdapter(Config)
_SECTIONS = {"data": Data, "model": Model, "optimizer": Optimizer}


def parse(values: dict[str, Any], *, where: str = "") -> Config:
    """Build a config from the values of a TOML or JSON file; errors begin with `where`."""
    try:
        # By way of JSON, where a list may become a tuple although all else is strict.
        return _SCHEMA.validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise UserError(where + _explained(error)) from None
    # Of thousands of digits, or lists in lists in lists.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}expected a job, got values that cannot be one: {error}.") from None


def said(value: Any) -> str:
    """Return a value as it is shown to a user, who knows it and needs no more of it than a line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# How pydantic names a problem -> what was expected.
_EXPECTED = {
    "missing": "a value",
    "dataclass_type": "a table",
    "tuple_type": "a list",
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "greater_than": "a number > {limit}",
    "greater_than_equal": "a number >= {limit}",
    "less_than": "a number < {limit}",
    "less_than_equal": "a number <= {limit}",
}


def _explained(error: ValidationError) -> str:
    """Say in one sentence what the first problem is."""
    first, *others = error.errors()
    # A value of several types has a problem with each: what is inside one of them says the most.
    same = [first, *(problem for problem in others if problem["loc"][:2] == first["loc"][:2])]
    problem = max(same, key=lambda problem: len(problem["loc"])) if _tagged(first["loc"]) else first
    kind, text = problem["type"], problem["msg"].removeprefix("Input should be ")
    loc = [part for part in problem["loc"] if not _tagged([part])] or [""]
    *section, _ = loc
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)[1:]
    if kind == "unexpected_keyword_argument":
        schema = _SECTIONS[str(section[0])] if section else Config
        return f"{key} is not a key; {_meant(key, [field.name for field in dataclasses.fields(schema)])}."
    limit = text.rpartition(" ")[2]
    if limit.isdigit() and len(limit) > 20:
        limit = f"{float(limit):g}"
    expected = _EXPECTED.get(kind, "{text}").format(text=text, limit=limit)
    expected += " or a list" * any(other["type"] == "tuple_type" for other in same if other is not problem)
    if kind == "json_invalid":  # which is nested too deeply
        return f"expected a job, got values that cannot be one: {text.rpartition(': ')[2]}."
    got = "none" if kind == "missing" else said(problem["input"])
    return f"{key}: expected {expected}, got {got}.".removeprefix(": ")


def _tagged(loc: Sequence[int | str]) -> bool:
    """Return whether the place of a problem is one of several types: ("class_weights", "tuple[...]")."""
    return any(re.match(r"(literal|tuple)\[", str(part)) for part in loc)


def _meant(key: str, names: list[str]) -> str:
    section, dot, name = key.rpartition(".")
    close = difflib.get_close_matches(name, names, n=1)
    return f"perhaps you meant {section}{dot}{close[0]}" if close else f"expected one of {', '.join(names)}"
