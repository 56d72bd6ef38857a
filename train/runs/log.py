"""What a run says: metrics.jsonl (the truth) and inspection.jsonl, TensorBoard, and the console's table."""

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

from train.runs import json_lines
from train.runs.json_lines import JsonLines
from train.runs.tensorboard import TensorBoard

Results = dict[str, dict[str, float]]  # split -> {"loss": ..., "accuracy": ...}

_SPLITS = ("train", "validation", "test")
_HEADER = (
    " " * 14 + "".join(f"{split:>18}" for split in _SPLITS) + "\n"
    "   step  epoch" + "    loss  accuracy" * len(_SPLITS) + "  seconds"
)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl, without a last line that a kill may have cut."""
    return [line for line in json_lines.read(run_dir / "metrics.jsonl") if "split" in line]


def read_inspections(run_dir: Path) -> list[dict[str, Any]]:
    """Reads inspection.jsonl likewise: what train/training/inspection.py has measured, step by step."""
    return json_lines.read(run_dir / "inspection.jsonl")


class Logs:
    """Writes results to file, TensorBoard and console. The one object that prints while a job trains."""

    def __init__(self, run_dir: Path, *, first_step: int, total_steps: int, writes: bool = True):
        """Opens the logs of a run that goes on from `first_step`, and drops what they have after it.

        Without `writes` all of it is silent: one of several processes speaks for the others.
        """
        self._started, self._writes = time.perf_counter(), writes
        self._console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not writes)
        if writes:
            self._metrics, self._inspections = (
                JsonLines(run_dir / f"{name}.jsonl", first_step=first_step)
                for name in ("metrics", "inspection")
            )
            if self._metrics.kept:
                self._started -= self._metrics.kept[-1]["seconds"]
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
            self._tensorboard.close()

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
        seconds = round(self.seconds, 3)
        self._metrics.append(
            *({"step": step, "split": split, **results[split], "seconds": seconds} for split in results)
        )
        for split, values in results.items():
            for key, value in values.items():
                if math.isfinite(value):
                    self._tensorboard.scalar(f"{key}/{split}", value, step)
        self._tensorboard.flush()
        if not self._in_table:
            self.say(_HEADER)
            self._in_table = True
        self.say(_row(step, epoch, results, self.seconds))

    def inspection(self, step: int, measured: dict[str, Any]) -> None:
        """Writes what was measured at a step."""
        if self._writes:
            self._inspections.append({"step": step, **measured})


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
