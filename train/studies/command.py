"""The commands `compare` and `sweep`.

Whatever imports JAX is imported once the command line is known to be right, so that --help answers at once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from tyro.conf import Positional

from train.config import check_text, closest_config
from train.errors import UserError

if TYPE_CHECKING:
    from train.runs.stopping import StopRequests

Session = Callable[..., AbstractContextManager["StopRequests"]]


@dataclass(frozen=True)
class Compare:
    """Train several jobs and compare them with the first: comparison.json, and report.html.

    How many times fewer steps does each take to the best test accuracy (of numbers R^2) of the baseline? The
    same line again resumes a study that was stopped; finished jobs are not trained again. Any further `--key
    value` is a key of every config; `--key A,B` trains every job with each of the values, and `--inspect
    True` measures for the report what the layers get and how smooth the loss is.
    """

    configs: Positional[tuple[Path, ...]]
    """The baseline, and the configs that are compared with it."""
    out: Path | None = None
    """The folder of the study; if not given, runs/BASELINE-comparison."""
    seeds: int = 1
    """With how many seeds to train each job: its own and the following ones."""


@dataclass(frozen=True)
class Sweep:
    """Train every combination of values: results.json, and report.html.

    `--key A,B` gives a key of the config several values; lists are words: `--model.widths 64,64 32`. The same
    line again resumes a sweep that was stopped; finished jobs are not trained again.
    """

    configs: Positional[tuple[Path, ...]]
    """The config."""
    out: Path | None = None
    """The folder of the sweep; if not given, runs/CONFIG-sweep: give another one for another sweep."""
    seeds: int = 1
    """With how many seeds to train each job: its own and the following ones; the page has medians, ranges."""


STUDIES = {"compare": Compare, "sweep": Sweep}


def study(command: str, words: list[str], session: Session) -> int:
    """Train and compare several jobs, in a session that connects their processes; return the exit code."""
    given, overrides = tyro.cli(
        STUDIES[command], args=words, prog=f"python -m train {command}", return_unknown_args=True
    )
    compare, configs = command == "compare", given.configs
    if not all(path.suffix == ".toml" for path in configs) or (
        len(configs) < 2 if compare else len(configs) != 1
    ):
        expected = "two configs or more, the baseline first" if compare else "one config"
        got = " ".join(map(str, configs)) or "none before the first --key"
        close = [str(path) if path.suffix == ".toml" else closest_config(str(path)) for path in configs]
        line = " ".join(map(str, close))
        meant = f"; did you mean {line}?" if line and all(close) and line != got else "."
        raise UserError(f"{command}: expected {expected}, got {got}{meant}")
    if not 1 <= given.seeds <= 10_000:
        raise UserError(f"--seeds: expected 1 to 10000, got {given.seeds}.")
    if given.out is not None:
        check_text("--out", str(given.out))
    from train.studies.plan import plan

    out = given.out or Path("runs") / f"{configs[0].stem}-{'comparison' if compare else 'sweep'}"
    planned = plan(configs, overrides, out=out, seeds=given.seeds)
    if len(planned) == 1:
        raise UserError(
            "sweep: expected several values of a key, as in --optimizer.learning_rate 0.1,1, or --seeds 3, "
            f"got one job; `python -m train {configs[0]}` trains it."
        )
    with session(planned[0].config, command, out=str(out), jobs=len(planned)) as stop:
        from train import models
        from train.runs import processes
        from train.studies import report, runner

        for job in planned:
            processes.check_same_job(job.config)
            models.check(
                job.config.model,
                accumulate=job.config.optimizer.accumulate,
                recalibrate=job.config.recalibrate,
            )
        with processes.raise_on_all("use the folder of the study"):
            report.check_folder(out, planned, compare=compare)
            runner.create_folder(out)

        def write(outcomes: list[runner.Outcome]) -> None:
            if processes.is_primary():
                report.write_numbers(out, planned, outcomes, compare=compare)

        outcomes = runner.train_all([job.config for job in planned], stop, write)
        if processes.is_primary():
            report.write_report(out, planned, outcomes, compare=compare)
        return runner.exit_code(outcomes, len(planned), stop)
