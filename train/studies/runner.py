"""Train jobs one after the other; one that fails does not keep the others from running."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from train.config import Config
from train.errors import RunFailed, Stopped, UserError, explained
from train.runs import directory, processes
from train.runs.stopping import StopRequests
from train.runs.summary import Summary, read_summary
from train.training import fit


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: Literal["finished", "stopped", "failed", "refused"]
    summary: Summary | None  # None if it has not begun
    error: str | None  # why it failed or was refused
    exit_code: int  # with which the job by itself would exit


def create_folder(out: Path) -> None:
    """Create the folder of a study.

    Raises:
      UserError: it cannot be created, or not be written to.
    """
    with directory.usable(out, "out"):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass


def train_all(
    jobs: Sequence[Config], stop: StopRequests, after_each: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Train the jobs, but for finished ones, until all are done or a stop is requested.

    Args:
      after_each: is called after each job with the outcomes so far.
    """
    outcomes: list[Outcome] = []
    for number, config in enumerate(jobs, 1):
        if processes.is_primary():
            print(f"[{number}/{len(jobs)}] {config.run_dir}", flush=True)
        outcome = _train(config, stop)
        outcomes.append(outcome)
        if number < len(jobs) and _programs(config) != _programs(jobs[number]):
            jax.clear_caches()  # or the programs of all jobs would stay in memory
        if outcome.error and processes.is_primary():
            print(f"{outcome.status}: {outcome.error}", flush=True)
        after_each(outcomes)
        if processes.agree(0, stop).signal:
            break
    return outcomes


def exit_code(outcomes: Sequence[Outcome], planned: int, stop: StopRequests) -> int:
    """Return the exit code of a study: that of its worst job, or of the signal that stopped it."""
    codes = [outcome.exit_code for outcome in outcomes]
    return max([*codes, 128 + stop.received] if stop.received and len(outcomes) < planned else codes)


def _programs(config: Config) -> tuple:
    """Return what decides whether two jobs run the same compiled programs."""
    return config.data, config.model, config.optimizer, config.batch_size, config.steps, config.epochs


def _train(config: Config, stop: StopRequests) -> Outcome:
    try:
        with explained():
            summary = fit(config, stop)
    except UserError as error:
        # A study chooses the run directories, and the user the folder that they are in.
        return Outcome("refused", None, str(error).replace("--run_dir", "--out"), 2)
    except RunFailed as error:
        return Outcome("failed", read_summary(Path(config.run_dir)), str(error), 1)
    except Stopped as stopped:  # before its first step, as while images are decoded
        return Outcome("stopped", None, None, 128 + stopped.number)
    if summary.finished:
        return Outcome("finished", summary, None, 0)
    return Outcome("stopped", summary, None, 128 + (stop.received or 0))
