"""Several jobs, one after the other, of which none keeps the others from running."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.config import Config
from train.errors import REMEDIES, RunFailed, UserError, explained
from train.runs.files import read_json
from train.runs.stopping import StopRequests

# What every job's summary has, whatever became of it, and how it is shown.
COLUMNS = {
    "status": "",
    "step": "",
    "best_step": "",
    "test_accuracy": ".4f",
    "test_loss": ".4f",
    "best_test_accuracy": ".4f",
    "wall_seconds": ".1f",
}


class Outcome(NamedTuple):
    code: int  # with which the job by itself would exit
    summary: dict[str, Any]  # its summary.json, and the `error` that ended it, or None


def create(out: Path) -> None:
    """Creates the folder of the jobs.

    Raises:
      UserError: it cannot be created, or not be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        if REMEDIES.get(error.errno) == "make room":
            raise
        raise UserError(f"--out {out} cannot be used: {error.strerror}; wanted a folder.") from error


def train_all(
    configs: Sequence[Config], stop: StopRequests, after_each: Callable[[list[Outcome]], None]
) -> tuple[int, list[Outcome]]:
    """Trains the jobs, but for finished ones; returns the exit code of the worst, and what came of each.

    A job that fails, or that its data do not allow, is told and passed over; a stop request ends all.

    Args:
      after_each: is called after each job with the outcomes so far.
    """
    import jax

    from train.runs import processes as distributed

    say = print if distributed.is_first() else lambda *_, **__: None
    outcomes: list[Outcome] = []
    for config in configs:
        say(f"[{len(outcomes) + 1}/{len(configs)}] {config.run_dir}", flush=True)
        outcome = _train(config, stop)
        outcomes.append(outcome)
        jax.clear_caches()  # or the programs of all jobs would stay in memory
        if outcome.summary["error"]:
            say(f"{outcome.summary['status']}: {outcome.summary['error']}")
        after_each(outcomes)
        if stop.received is not None:
            break
    codes = [outcome.code for outcome in outcomes]
    if len(outcomes) < len(configs):
        codes.append(128 + stop.received)
    return max(codes), outcomes


def is_worth_writing(outcomes: Sequence[Outcome]) -> bool:
    """Tells whether any job was more than refused: or what an earlier call has written stays as it is."""
    return any(outcome.summary["status"] != "refused" for outcome in outcomes)


def unfinished(outcomes: Sequence[Outcome], planned: int) -> str | None:
    """Says how many jobs have come to their end, if not all, and how to go on."""
    ended = sum(outcome.summary["status"] == "finished" for outcome in outcomes)
    waiting = planned - len(outcomes) + sum(each.summary["status"] == "stopped" for each in outcomes)
    if not waiting:
        return None
    return f"{ended} of {planned} jobs have come to their end; the same line again goes on with the others."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays cells out in columns, for the console."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in (header, *rows))


def text(value: Any, how: str = "") -> str:
    """Returns what a table shows of a value; `how` formats numbers."""
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, tuple) else format(value, how)


def _train(config: Config, stop: StopRequests) -> Outcome:
    from train.training.loop import fit

    nothing = dict.fromkeys(COLUMNS)
    try:
        with explained():
            summary = fit(config, stop)
    except UserError as error:
        # Run directories are not the user's to choose here, but the folder that they are in is.
        message = str(error).replace("--run_dir", "--out")
        return Outcome(2, {**nothing, "status": "refused", "error": message})
    except RunFailed as error:
        path = Path(config.run_dir) / "summary.json"
        summary = read_json(path) if path.exists() else nothing
        return Outcome(1, {**summary, "status": "failed", "error": str(error)})
    code = 0 if summary["status"] == "finished" else 128 + stop.received
    return Outcome(code, {**summary, "error": None})
