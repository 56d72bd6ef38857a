"""A TOML file and flags -> a `Config`."""

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from train.config.checks import check
from train.config.parsing import parse, said
from train.config.schema import Config
from train.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"  # those that come with the program
LARGEST_FILE = 2**16  # bytes of TOML, which is parsed in a time that grows with their square


def load(path: Path, overrides: Sequence[str]) -> Config:
    """Load a job: the defaults, then the file (and the file that its `base` names), then the flags.

    Raises:
      UserError: the file cannot be read, a key or a value is not valid, or two values contradict each other.
      SystemExit: with code 2 for an unknown flag or a wrong type, after tyro has printed which was meant.
    """
    default = parse(_read(path), where=f"{path}: ")
    for word in overrides:
        if re.fullmatch(r"(--[\w.-]+=)?[\d.e+-]+,[\d.e+,-]*", word):
            spaced = word.rpartition("=")[2].replace(",", " ").strip()
            raise UserError(
                f"expected spaces between the numbers of a list, `{spaced}`, got '{word}'; commas, between "
                "several values of a key, are for `python -m train sweep`."
            )
    config = tyro.cli(
        Config,
        args=list(overrides),
        default=default,
        prog=f"python -m train {path}",
        config=(tyro.conf.FlagConversionOff,),
    )
    config = dataclasses.replace(config, **_one_length(default, config))
    check(config)
    return config


def closest_config(word: str) -> str | None:
    """Return the config with a name like this, of those next to it and those that come with the program."""
    name = Path(word).name.lower().removesuffix(".toml")
    known = {
        path.stem.lower(): path for folder in (CONFIGS, Path(word).parent) for path in folder.glob("*.toml")
    }
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return os.path.relpath(known[close[0]]) if close else None


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a TOML file over those of its base."""
    try:
        resolved = path.resolve()
        if resolved in above:
            raise UserError(f"{path} inherits from itself: expected a `base` that does not lead back here.")
        if len(above) > 99:
            raise UserError(f"{path} is the base of more than 99 configs, one of the other: expected fewer.")
        size = path.stat().st_size
        if not path.is_file():  # A pipe may never end, nor a device.
            raise ValueError("it is a folder, a pipe or a device")
        if size > LARGEST_FILE:
            raise ValueError(f"it has {size:,} bytes, more than {LARGEST_FILE:,}")
        table = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        close = closest_config(str(path))
        meant = f"did you mean {close}?" if close else "`python -m train list` shows the configs."
        raise UserError(f"{path} does not exist; {meant}") from None
    # RuntimeError: of links that lead to each other, up to Python 3.12.
    except (OSError, ValueError, RecursionError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from None
    below, base = {}, table.pop("base", None)
    parse({"run_dir": ""} | table, where=f"{path}: ")  # by itself: its mistakes are not those of its base
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base: expected a string, got {said(base)}.")
        below = _read(path.parent / base, (*above, resolved))
    if {"steps", "epochs"} & table.keys():
        below = {key: value for key, value in below.items() if key not in ("steps", "epochs")}
    sections = {
        key: below[key] | value
        for key, value in table.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | {"run_dir": f"runs/{path.stem}"} | table | sections


def _one_length(before: Config, after: Config) -> dict[str, None]:
    """Return which of steps and epochs to drop: a length given now replaces the other given before."""
    if (after.steps == before.steps) == (after.epochs == before.epochs):
        return {}
    return {"steps": None} if after.steps == before.steps else {"epochs": None}
