"""A grid of overrides: every combination is a job, and all of them a table."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config import Config, flatten
from train.errors import RunFailed, UserError, explained
from train.files import read_json, write_json
from train.parsing import load
from train.stopping import StopRequests

Grid = dict[str, list[list[str]]]  # key -> its values, each one or more words of the command line

# What the table shows of each job's summary, and how.
COLUMNS = {
    "status": "",
    "step": "",
    "best_step": "",
    "test_accuracy": ".4f",
    "test_loss": ".4f",
    "best_test_accuracy": ".4f",
    "wall_seconds": ".1f",
}


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
    several = [key for key, values in grid.items() if len(values) > 1]
    planned: dict[str, Planned] = {}
    for combination in itertools.product(*grid.values()):
        config = load(path, [word for key, words in zip(grid, combination) for word in (f"--{key}", *words)])
        flat = flatten(dataclasses.asdict(config))
        values = {key: flat[key] for key in several}
        name = ",".join(f"{key}={_text(value)}" for key, value in values.items()) or path.stem
        run_dir = str(out / name.replace("/", "_").replace(" ", "-"))
        if run_dir in planned:
            raise UserError(f"Two jobs of the sweep would be '{run_dir}'; wanted each value of a key once.")
        planned[run_dir] = Planned(values, dataclasses.replace(config, run_dir=run_dir))
    return out, list(planned.values())


def run(out: Path, planned: Sequence[Planned], stop: StopRequests) -> int:
    """Trains the jobs one after the other, but for finished ones; prints a table and returns the exit code.

    After each job OUT/results.json holds a list of those so far: values, run directory, summary, error. A job
    that fails, or that its data do not allow, does not keep the others from running.

    Raises:
      UserError: OUT cannot be created.
    """
    import jax

    from train import distributed

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be created: {error.strerror}; wanted a folder.") from error
    say = print if distributed.is_first() else lambda *_, **__: None
    results, codes = [], []
    for job in planned:
        say(f"[{len(results) + 1}/{len(planned)}] {job.config.run_dir}", flush=True)
        code, reached = _train(job.config, stop)
        jax.clear_caches()  # or the programs of all jobs would stay in memory
        if reached["error"]:
            say(f"{reached['status']}: {reached['error']}")
        codes.append(code)
        results.append({**job.values, "run_dir": job.config.run_dir, **reached})
        if distributed.is_first():
            write_json(out / "results.json", results)
        if stop.received is not None and len(results) < len(planned):
            codes.append(128 + stop.received)
            break
    say(f"\n{_table(list(planned[0].values), results)}\n\nResults: {out / 'results.json'}")
    return max(codes)


def _train(config: Config, stop: StopRequests) -> tuple[int, dict[str, Any]]:
    """Returns the exit code that the job would have by itself, and its summary with what went wrong."""
    from train.loop import fit

    nothing = dict.fromkeys(COLUMNS)
    try:
        with explained():
            summary = fit(config, stop)
    except UserError as error:
        return 2, {**nothing, "status": "refused", "error": str(error)}
    except RunFailed as error:
        path = Path(config.run_dir) / "summary.json"
        summary = read_json(path) if path.exists() else nothing
        return 1, {**summary, "status": "failed", "error": str(error)}
    return 0 if summary["status"] == "finished" else 128 + stop.received, {**summary, "error": None}


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
    rows = [[*keys, *COLUMNS]]
    for result in results:
        shown = ["-" if result[key] is None else format(result[key], how) for key, how in COLUMNS.items()]
        rows.append([*(_text(result[key]) for key in keys), *shown])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
