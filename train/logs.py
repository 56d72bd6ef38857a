"""What a run says: metrics.jsonl (the truth), TensorBoard, and the table and progress on the console."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from train import files
from train.tensorboard import TensorBoard

Results = dict[str, dict[str, float]]  # split -> {"loss": ..., "accuracy": ...}

_SPLITS = ("train", "validation", "test")
_HEADER = (
    " " * 14 + "".join(f"{split:>18}" for split in _SPLITS) + "\n"
    "   step  epoch" + "    loss  accuracy" * len(_SPLITS) + "  seconds"
)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl, without a last line that a kill may have cut."""
    path = run_dir / "metrics.jsonl"
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and _is_result(line)]


def _is_result(line: dict[str, Any]) -> bool:
    return isinstance(line.get("step"), int) and "split" in line


class Logs:
    """Writes results to file, TensorBoard and console. The one object that prints while a job trains."""

    def __init__(self, run_dir: Path, *, first_step: int, total_steps: int, writes: bool = True):
        """Opens the logs of a run that goes on from `first_step`, and drops what they have after it.

        Without `writes` all of it is silent: one of several processes speaks for the others.
        """
        kept = [line for line in read_metrics(run_dir) if line["step"] <= first_step]
        self._started = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)
        self._writes = writes
        self._console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not writes)
        if writes:
            path = run_dir / "metrics.jsonl"
            files.replace(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = path.open("a")
            self._tensorboard = TensorBoard(run_dir / "tensorboard", purge_step=first_step + 1)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            speed_estimate_period=300,  # seconds to average over; a step may take minutes
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=first_step)
        self._in_table = False

    def __enter__(self) -> "Logs":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._console.is_terminal:
            self._progress.stop()
        if self._writes:
            with contextlib.closing(self._tensorboard), self._file:
                pass  # both are closed, also if the disk is full

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier sessions included."""
        return time.perf_counter() - self._started

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._progress.update(self._task, completed=step)

    def results(self, step: int, epoch: float, results: Results) -> None:
        """Writes the results of one evaluation, split by split."""
        if not self._writes:
            return
        for split, values in results.items():
            finite = {key: value for key, value in values.items() if math.isfinite(value)}
            # JSON has no NaN.
            line = {"step": step, "split": split, **dict.fromkeys(values), **finite}
            self._file.write(json.dumps({**line, "seconds": round(self.seconds, 3)}) + "\n")
            for key, value in finite.items():
                self._tensorboard.scalar(f"{key}/{split}", value, step)
        self._file.flush()
        self._tensorboard.flush()
        if not self._in_table:
            self.say(_HEADER)
            self._in_table = True
        self.say(_row(step, epoch, results, self.seconds))


class _Rate(ProgressColumn):
    """Steps per second, evaluations included, once they are known."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("compiling")
        return Text(f"{task.speed:,.0f} steps/s" if task.speed >= 10 else f"{task.speed:.2g} steps/s")


def _row(step: int, epoch: float, results: Results, seconds: float) -> str:
    cells = [f"{step:7d}{epoch:7.1f}"]
    for split in _SPLITS:
        values = results.get(split)
        if values:
            loss = f"{values['loss']:.4f}" if values["loss"] < 100 else f"{values['loss']:.1e}"
            cells.append(f"{loss:>8}{values['accuracy']:10.4f}")
        else:
            cells.append(f"{'-':>8}{'-':>10}")
    return "".join(cells) + f"{seconds:9.1f}"
