"""The log of a run: metrics.jsonl (the truth), inspection.jsonl, TensorBoard, and a table in the terminal."""

import math
import platform
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

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
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from train.runs.files import JsonLines, is_number, read_lines
from train.runs.summary import SPLITS

# split -> {"loss": ..., "accuracy": ...}, the same metrics for each; of classes it is a dict of theirs
Results = dict[str, dict[str, Any]]


def read_inspections(run_dir: Path) -> list[dict[str, Any]]:
    """Read inspection.jsonl: the measurements inside the network, step by step, all of one shape."""
    lines = read_lines(run_dir / "inspection.jsonl")
    shapes = Counter(map(_shape, lines))
    return [line for line in lines if _shape(line) == shapes.most_common(1)[0][0]]


def _shape(value: Any) -> Any:
    """Return a value of a JSON file with its numbers left out, which may be compared and hashed."""
    if isinstance(value, dict):
        return tuple((key, _shape(inner)) for key, inner in sorted(value.items()))
    if isinstance(value, list):
        return tuple(map(_shape, value))
    return is_number(value) or str(value)


class Log:
    """The log of one session: writes files and TensorBoard, and prints all that is printed meanwhile."""

    def __init__(self, run_dir: Path, *, first_step: int, total_steps: int, writes: bool = True):
        """Open the log of a run that continues from `first_step`, and drop the lines after that step.

        Without `writes` nothing is written or printed: one of several processes writes for all.
        """
        self._started, self._writes = time.perf_counter(), writes
        self._console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not writes)
        if writes:
            self._metrics, self._inspections = (
                JsonLines(run_dir / f"{name}.jsonl", first_step=first_step)
                for name in ("metrics", "inspection")
            )
            seconds = [line.get("seconds") for line in self._metrics.kept]
            self._started -= max((s for s in seconds if s is not None and is_number(s)), default=0.0)
            self._tensorboard = _EventFile(run_dir / "tensorboard", purge_step=first_step + 1)
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
        self._in_table = self._warned = False

    def __enter__(self) -> Self:
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

    def print(self, text: str) -> None:
        """Print a line."""
        self._console.print(text)

    def print_once(self, text: str) -> None:
        """Print a line, unless one was printed in this way before."""
        if not self._warned:
            self.print(text)
        self._warned = True

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=step)

    def results(self, step: int, epoch: float, results: Results) -> None:
        """Write the results of one evaluation, split by split."""
        if not self._writes:
            return
        seconds = round(self.seconds, 3)
        self._metrics.append(
            *({"step": step, "split": split, **results[split], "seconds": seconds} for split in results)
        )
        for split, values in results.items():
            for key, value in _scalars(values):
                if value is not None and math.isfinite(value):
                    self._tensorboard.add(f"{key}/{split}", value, step)
        self._tensorboard.flush()
        if not self._in_table:
            self.print(_header(results))
            self._in_table = True
        self.print(_row(step, epoch, results, seconds))

    def inspection(self, step: int, measured: dict[str, Any]) -> None:
        """Write the measurements of a step, made inside the network."""
        if self._writes:
            self._inspections.append({"step": step, **measured})


class _EventFile:
    """A new file of scalars for TensorBoard.

    tensorboardX's SummaryWriter writes in a thread: its `flush` does not wait for what is queued, which a
    kill then loses, and nobody learns of a full disk.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        """Open the file; what earlier files have from `purge_step` on counts no longer."""
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}"  # as TensorBoard looks for
        self._file = RecordWriter(str(folder / name))
        self._write(0, file_version="brain.Event:2")
        self._write(purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush, self.close = self._file.flush, self._file.close

    def add(self, name: str, value: float, step: int) -> None:
        """Write one value."""
        self._write(step, summary=scalar(name, value))

    def _write(self, step: int, **content: Any) -> None:
        self._file.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


class _Rate(ProgressColumn):
    """Steps per second, evaluations included, once they are known."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("compiling")
        return Text(f"{task.speed:,.0f} steps/s" if task.speed >= 10 else f"{task.speed:.2g} steps/s")


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """Yield what TensorBoard shows: "loss", "class_accuracy/NAME"."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _header(results: Results) -> str:
    columns = _columns(results)
    width = sum(map(_width, columns.values()))
    splits = "".join(f"{split:>{width}}" for split in SPLITS)
    height = max(map(len, columns.values()))
    lines = [
        "".join(f"{([''] * height + words)[line - height]:>{_width(words)}}" for words in columns.values())
        for line in range(height)
    ]
    *above, last = (line * len(SPLITS) for line in lines)
    upper = "".join(f"{'':14}{line}".rstrip() + "\n" for line in above)
    return f"{'':14}{splits}\n{upper}   step  epoch{last}  seconds"


def _row(step: int, epoch: float, results: Results, seconds: float) -> str:
    cells = [
        f"{_number(results.get(split, {}).get(name)):>{_width(words)}}"
        for split in SPLITS
        for name, words in _columns(results).items()
    ]
    return f"{step:7d}{epoch:7.1f}{''.join(cells)}{seconds:9.1f}"


def _columns(results: Results) -> dict[str, list[str]]:
    """Return the heading of each metric's column, in short lines; metrics of each class have no column."""
    values = next(iter(results.values()))
    return {
        name: textwrap.wrap(name.replace("_", " "), 8, break_long_words=False)
        for name, value in values.items()
        if not isinstance(value, dict)
    }


def _width(words: list[str]) -> int:
    return max(8, *(len(word) + 2 for word in words))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    # Of 7 characters at most.
    if -10 < value < 100:
        return f"{value:.4f}"
    return f"{value:.1f}" if 0 < value < 99_999 else f"{value:.{int(value > 0)}e}"
