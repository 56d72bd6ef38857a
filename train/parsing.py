"""TOML files and flags -> Config, and back from a run's config.json.

The dataclasses of train/config.py are the schema. A TOML file is turned into flags, and tyro parses file and
command line alike, so that both have the same keys, the same types and the same messages.
"""

import dataclasses
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from train.checks import check
from train.config import Config, Data, Model, Optimizer, flatten
from train.errors import UserError


def load(path: Path, overrides: Sequence[str]) -> Config:
    """Loads a job: the defaults, then the file (and the file that its `base` names), then the flags.

    Raises:
      UserError: the file cannot be read, or keys contradict each other.
      SystemExit: with code 2 for an unknown key or a wrong type, after tyro has printed which key was meant.
    """
    config = _parse(overrides, _from_file(path), f"python -m train {path}")
    check(config)
    return config


def from_dict(values: dict[str, Any]) -> Config:
    """Rebuilds the config of a run from its config.json."""
    sections = {"data": Data, "model": Model, "optimizer": Optimizer}
    tuples = {"widths", "milestones", "feature_scales"}
    built = {
        key: sections[key](**{k: tuple(v) if k in tuples else v for k, v in value.items()})
        if key in sections
        else value
        for key, value in values.items()
    }
    return Config(**built)


def differences(a: Config, b: Config, *, ignore: Sequence[str] = ()) -> list[str]:
    """Lists the keys in which two jobs differ, each with both values."""
    flat_a, flat_b = (flatten(dataclasses.asdict(config)) for config in (a, b))
    return [
        f"{key} = {flat_a[key]!r}, now {flat_b[key]!r}"
        for key in flat_a
        if key not in ignore and flat_a[key] != flat_b[key]
    ]


def _from_file(path: Path, above: tuple[Path, ...] = ()) -> Config:
    if path.resolve() in above:
        raise UserError(f"{path} inherits from itself; wanted a `base` that does not lead back here.")
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `python -m train list` shows the configs.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from None
    default = Config(run_dir=f"runs/{path.stem}")
    if "base" in table:
        base = _from_file(path.parent / str(table.pop("base")), (*above, path.resolve()))
        default = dataclasses.replace(base, run_dir=default.run_dir)
    arguments = [text for key, value in flatten(table).items() for text in _as_flag(key, value)]
    try:
        return _parse(arguments, default, f"python -m train {path}")
    except SystemExit:
        print(f"The mistake is in the file {path}.", file=sys.stderr)
        raise


def _parse(arguments: Sequence[str], default: Config, program: str) -> Config:
    config = tyro.cli(
        Config, args=list(arguments), default=default, prog=program, config=(tyro.conf.FlagConversionOff,)
    )
    # A length given here replaces the one given before.
    if config.epochs != default.epochs and config.steps == default.steps:
        return dataclasses.replace(config, steps=None)
    if config.steps != default.steps and config.epochs == default.epochs:
        return dataclasses.replace(config, epochs=None)
    return config


def _as_flag(key: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{key}", *map(str, values)]
