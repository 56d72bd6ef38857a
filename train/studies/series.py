"""What several jobs have left in their run directories, seed beside seed, for those who compare them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.config import Config
from train.runs import directory as run_directory
from train.runs.log import read_inspections, read_metrics
from train.studies.runner import Outcome
from train.studies.statistics import Curve


class Run(NamedTuple):
    """One job with one seed."""

    config: Config
    summary: dict[str, Any]
    classes: int | None  # None if it has not come as far as its data
    metrics: list[dict[str, Any]]
    inspections: list[dict[str, Any]]

    @property
    def curve(self) -> Curve:
        """Test accuracy over steps."""
        return [(line["step"], line["accuracy"]) for line in self.metrics if line["split"] == "test"]

    @property
    def final_accuracy(self) -> float | None:
        """The test accuracy at the end; None for a job that did not come there."""
        return self.curve[-1][1] if self.curve and self.summary["status"] == "finished" else None


class Series(NamedTuple):
    """One job, once for each seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> Config:
        """The job with its first seed."""
        return self.runs[0].config

    @property
    def curves(self) -> list[Curve]:
        """Test accuracy over steps, of each seed."""
        return [run.curve for run in self.runs]

    @property
    def classes(self) -> int | None:
        """The number of classes, if any seed has come as far as its data."""
        return next((run.classes for run in self.runs if run.classes), None)

    @property
    def inspections(self) -> list[dict[str, Any]]:
        """What was measured inside the network, step by step: of the first seed."""
        return self.runs[0].inspections

    def over(self, value: Callable[[Run], Any]) -> list[Any]:
        """Returns a value of each run."""
        return [value(run) for run in self.runs]


def read(config: Config, outcome: Outcome) -> Run:
    """Reads what a job has left; nothing if its run directory is another job's."""
    path, summary = Path(config.run_dir), outcome.summary
    if summary["status"] == "refused" or not (path / "data.json").exists():
        return Run(config, summary, None, [], [])
    classes = run_directory.read_data(path).classes
    return Run(config, summary, classes, read_metrics(path), read_inspections(path))


def inspected(compared: Sequence[Series]) -> list[Series]:
    """Returns those inside which something was measured."""
    return [job for job in compared if job.inspections]


def group(names: Sequence[str], runs: Sequence[Run]) -> list[Series]:
    """Puts the runs of one name together, in the order in which the names first come."""
    by_name: dict[str, list[Run]] = {}
    for name, run in zip(names, runs):
        by_name.setdefault(name, []).append(run)
    return [Series(name, tuple(members)) for name, members in by_name.items()]
