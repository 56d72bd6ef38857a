"""A grid of overrides: every combination is a job, and all of them a table."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config import Config, flatten
from train.errors import UserError
from train.parsing import load
from train.runs.files import replace, write_json
from train.runs.stopping import StopRequests
from train.studies import runner as several

Grid = dict[str, list[list[str]]]  # key -> its values, each one or more words of the command line


@dataclasses.dataclass(frozen=True)
class Planned:
    """One job of a sweep."""

    values: dict[str, Any]  # of the keys that have several
    config: Config  # its run directory is OUT/KEY=VALUE,KEY=VALUE


def plan(path: Path, arguments: Sequence[str]) -> tuple[Path, list[Planned]]:
    """Returns where a sweep goes (`--out`, else runs/NAME-sweep) and its jobs, one for each combination.

    `--key A,B` gives a key several values. Those of a key that takes a list are lists: `--model.widths
    64,64 32` compares one layer of 64 features with two of 64 and 32.

    Raises:
      UserError: a job makes no sense, or two of them would be the same.
      SystemExit: with code 2 for an unknown key or a wrong type, after tyro has printed which key was meant.
    """
    grid = _grid(arguments)
    out = _folder(grid.pop("out", [[f"runs/{path.stem}-sweep"]]))
    if "run_dir" in grid:
        raise UserError("--run_dir does not go with a sweep; wanted --out, in which each job gets a folder.")
    varied = [key for key, values in grid.items() if len(values) > 1]
    planned: dict[str, Planned] = {}
    for combination in itertools.product(*grid.values()):
        config = load(path, [word for key, words in zip(grid, combination) for word in (f"--{key}", *words)])
        flat = flatten(dataclasses.asdict(config))
        values = {key: flat[key] for key in varied}
        name = ",".join(f"{key}={several.text(value)}" for key, value in values.items()) or path.stem
        run_dir = str(out / name.replace("/", "_").replace(" ", "-"))
        if run_dir in planned:
            raise UserError(f"Two jobs of the sweep would be '{run_dir}'; wanted each value of a key once.")
        planned[run_dir] = Planned(values, dataclasses.replace(config, run_dir=run_dir))
    return out, list(planned.values())


def run(out: Path, planned: Sequence[Planned], stop: StopRequests) -> int:
    """Trains the jobs, but for finished ones; prints a table, and writes results.json and report.html.

    The former is written anew after each job: a list of those so far, with values, run directory, summary and
    error of each. Returns the exit code, that of the worst of the jobs.

    Raises:
      UserError: OUT cannot be created.
    """
    from train.runs import processes as distributed
    from train.studies import report, series

    several.create(out)

    def write(outcomes: list[several.Outcome]) -> None:
        if distributed.is_first() and several.is_worth_writing(outcomes):
            write_json(out / "results.json", _results(planned, outcomes))

    code, outcomes = several.train_all([job.config for job in planned], stop, write)
    if distributed.is_first():
        said = [_table(list(planned[0].values), _results(planned, outcomes))]
        unfinished = several.unfinished(outcomes, len(planned))
        if several.is_worth_writing(outcomes):
            runs = [series.read(job.config, outcome) for job, outcome in zip(planned, outcomes)]
            values = [job.values for job in planned[: len(runs)]]
            replace(out / "report.html", report.sweep(out.name, values, runs, unfinished=unfinished).encode())
            said.append(f"Results: {out / 'results.json'}\nReport: {out / 'report.html'}")
        print("", *said, *filter(None, [unfinished]), sep="\n\n")
    return code


def _results(planned: Sequence[Planned], outcomes: Sequence[several.Outcome]) -> list[dict[str, Any]]:
    return [
        {**job.values, "run_dir": job.config.run_dir, **outcome.summary}
        for job, outcome in zip(planned, outcomes)
    ]


def _grid(arguments: Sequence[str]) -> Grid:
    """Reads `--key A,B`, `--key=A,B` and `--key A, B`: a comma ends a value, and so does the next key."""
    grid: Grid = {}
    for argument in arguments:
        words = [argument]
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            key, words = name.replace("-", "_"), [value] * bool(equals)
            if key in grid:
                raise UserError(f"--{name} is given twice; wanted it once, with its values: --{name} A,B.")
            grid[key] = [[]]
        elif not grid:
            raise UserError(f"'{argument}' follows no key; wanted --key A,B ...")
        for word in words:
            first, *others = word.split(",")
            grid[key][-1] += [first] * bool(first)
            grid[key] += [[other] * bool(other) for other in others]
    return grid


def _folder(values: list[list[str]]) -> Path:
    if len(values) > 1 or len(values[0]) != 1:
        given = ",".join(" ".join(words) for words in values)
        raise UserError(f"--out is '{given}'; wanted one folder, without a comma in its name.")
    return Path(values[0][0])


def _table(keys: Sequence[str], results: Sequence[dict[str, Any]]) -> str:
    columns = dict.fromkeys(keys, "") | several.COLUMNS
    rows = [[several.text(result[key], how) for key, how in columns.items()] for result in results]
    return several.table(list(columns), rows)
