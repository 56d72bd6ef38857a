"""A grid of overrides: every combination is a job, and all of them a table."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.config import Config
from train.errors import RunFailed, UserError
from train.parsing import load
from train.stopping import StopRequests

COLUMNS = ("status", "step", "best_step", "test_accuracy", "test_loss", "best_test_accuracy", "wall_seconds")


@dataclasses.dataclass(frozen=True)
class Planned:
    """One job of a sweep."""

    values: dict[str, str]  # of the keys that have several
    config: Config  # its run directory is OUT/NAME


def jobs(path: Path, arguments: Sequence[str]) -> tuple[Path, list[Planned]]:
    """Returns where the sweep goes (`--out`, else runs/NAME-sweep) and its jobs, one for each combination.

    `--key A,B` gives a key several values; those of a key that takes a list are lists: `--model.widths 64,64 64`.
    """
    out, options = Path(f"runs/{path.stem}-sweep"), _options(arguments)
    if "out" in options:
        out = Path(" ".join(options.pop("out")[0]))
    choices = [[(key, value) for value in values] for key, values in options.items()]
    planned = []
    for combination in itertools.product(*choices):
        several = {key: " ".join(value) for key, value in combination if len(options[key]) > 1}
        name = ",".join(f"{key}={value}" for key, value in several.items()).replace("/", "_") or path.stem
        overrides = [text for key, value in combination for text in (f"--{key}", *value)]
        planned.append(Planned(several, load(path, [*overrides, "--run_dir", str(out / name)])))
    return out, planned


def run(out: Path, planned: Sequence[Planned], stop: StopRequests) -> int:
    """Trains the jobs one after the other, finished ones excepted, and returns the exit code.

    After each job OUT/results.json holds a list with the values and the summary of those so far. A job that
    fails does not keep the others from running.
    """
    from train import run_directory
    from train.loop import fit

    rows: list[dict[str, Any]] = []
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for number, job in enumerate(planned, 1):
        console.print(f"\n[{number}/{len(planned)}] {job.config.run_dir}")
        try:
            summary = fit(job.config, stop)
        except RunFailed as error:
            console.print(f"failed: {error}")
            summary = run_directory.read_json(Path(job.config.run_dir) / "summary.json")
        rows.append({**job.values, "run_dir": job.config.run_dir, **{key: summary[key] for key in COLUMNS}})
        run_directory.write_json(out / "results.json", rows)
        if stop.received is not None:
            break
    _print_table(console, planned[0].values, rows)
    print(f"Results: {out / 'results.json'}")
    if stop.received is not None:
        return 128 + stop.received
    return int(any(row["status"] != "finished" for row in rows))


def _options(arguments: Sequence[str]) -> dict[str, list[list[str]]]:
    """Returns the values of each key, each a list of words."""
    words: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            key = argument[2:].replace("-", "_")
            words[key] = []
        elif words:
            words[key].append(argument)
        else:
            raise UserError(f"'{argument}' follows no --key; wanted --key VALUE,VALUE ...")
    return {key: [value.split() for value in " ".join(parts).split(",")] for key, parts in words.items()}


def _print_table(console: Console, values: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    columns = [*values, *COLUMNS]
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("-" if row[key] is None else _text(row[key]) for key in columns))
    console.print()
    console.print(table)


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
