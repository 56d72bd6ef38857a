"""The jobs of a study: every config with every combination of values and every seed."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import Config, check, flatten, load
from train.errors import UserError

Grid = dict[str, list[list[str]]]  # key -> its values, each one or more words of the command line


@dataclass(frozen=True)
class Planned:
    """One job of a study, with one seed."""

    name: str  # of the job, whatever its seed
    values: dict[str, Any]  # of the keys that have several
    config: Config  # its run directory is in the folder of the study


def plan(paths: Sequence[Path], overrides: Sequence[str], *, out: Path, seeds: int) -> list[Planned]:
    """Return the jobs of a study, in the order in which they are trained.

    Args:
      paths: the configs.
      overrides: `--key value ...` for every job; `--key A,B` gives a key several values. Those of a key that
        takes a list are lists: `--model.widths 64,64 32` is one layer of 64 features, and two of 64 and 32.
      out: the folder of the study. A run directory there is named after the config, if there are several,
        and after the values.
      seeds: with how many seeds to train each job: its own and those after it.

    Raises:
      UserError: a job is not valid, or two of them would be the same.
      SystemExit: with code 2 for an unknown key or a wrong type, after tyro has printed which key was meant.
    """
    grid = _grid(overrides)
    if "run_dir" in grid:
        raise UserError(
            "--run_dir does not go with several jobs; give --out, in which each job gets a folder."
        )
    varied = [key for key, values in grid.items() if len(values) > 1]
    if seeds > 1 and "seed" in varied:
        raise UserError("expected either --seeds or several values of --seed, got both.")
    planned: dict[str, Planned] = {}
    for path, words in itertools.product(paths, _combinations(grid)):
        config = load(path, words)
        flat = flatten(dataclasses.asdict(config))
        values = {key: flat[key] for key in varied}
        stem = [path.stem] if len(paths) > 1 or not varied else []
        for seed in range(config.seed, config.seed + seeds):
            of_seed = [f"seed={seed}"] if seed != config.seed else []
            parts = [
                f"{key}={text(value)}".replace("/", "_").replace(" ", "-") for key, value in values.items()
            ]
            run_dir = str(out / ",".join([*stem, *parts, *of_seed]))
            if run_dir in planned:
                raise UserError(f"two jobs would be '{run_dir}'; give each config and each value once.")
            job = dataclasses.replace(config, seed=seed, run_dir=run_dir)
            check(job)
            planned[run_dir] = Planned(
                ", ".join(filter(None, [*stem, named(values)])) or path.stem, values, job
            )
    losses = list(dict.fromkeys(job.config.model.loss for job in planned.values()))
    if len(losses) > 1:
        raise UserError(
            "model.loss: expected the same in all jobs of a study, which compares them by one metric, got "
            f"{' and '.join(losses)}."
        )
    return list(planned.values())


def named(values: dict[str, Any], *, without: str = "") -> str:
    """Name a job by its values, whatever its seed: "norm = batch, learning rate = 0.1"."""
    kept = {key: value for key, value in values.items() if key not in ("seed", without)}
    # Only of a number: names of files are different with and without.
    said = lambda value: text(value).removesuffix(".0") if isinstance(value, float) else text(value) or "none"
    return ", ".join(f"{short(key)} = {said(value)}" for key, value in kept.items())


def short(key: str) -> str:
    """Return a key as one would say it: "learning rate", or "optimizer" for its name."""
    section, _, name = key.rpartition(".")
    return section if name == "name" else name.replace("_", " ")


def text(value: Any) -> str:
    """Return a value as the command line has it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _grid(words: Sequence[str]) -> Grid:
    """Parse `--key A,B`, `--key=A,B` and `--key A, B`: a comma ends a value, and so does the next key."""
    grid: Grid = {}
    key = ""
    for word in words:
        parts = [word]
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key, parts = name.replace("-", "_"), [value] * bool(equals)
            if key in grid:
                raise UserError(f"--{name} is given twice; give it once, with its values: --{name} A,B.")
            grid[key] = [[]]
        elif not grid:
            raise UserError(f"'{word}' follows no key; expected --key A,B ...")
        for part in parts:
            first, *others = part.split(",")
            grid[key][-1] += [first] * bool(first)
            grid[key] += [[other] * bool(other) for other in others]
    return grid


def _combinations(grid: Grid) -> Iterator[list[str]]:
    """Yield the flags of every combination of values.

    Seeds come one after the other, because jobs that differ in nothing else share their compiled programs.
    """
    keys = sorted(grid, key="seed".__eq__)
    for values in itertools.product(*map(grid.__getitem__, keys)):
        yield [word for key, words in zip(keys, values) for word in (f"--{key}", *words)]
