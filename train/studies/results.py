"""What the jobs of a study have reached, and statistics over their seeds."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.config import Config
from train.runs.directory import read_data
from train.runs.log import read_inspections
from train.runs.summary import read_metrics
from train.studies.plan import Planned
from train.studies.runner import Outcome

Curve = Sequence[tuple[int, float]]  # (step, test accuracy) of each evaluation, in their order


class Run(NamedTuple):
    """One job with one seed."""

    name: str
    values: dict[str, Any]
    config: Config
    outcome: Outcome
    classes: int | None  # None if it has not come as far as its data
    metrics: list[dict[str, Any]]
    inspections: list[dict[str, Any]]

    @property
    def curve(self) -> Curve:
        """Test accuracy over steps."""
        tests = [line for line in self.metrics if line["split"] == "test"]
        return [(line["step"], line["accuracy"]) for line in tests if line.get("accuracy") is not None]

    @property
    def final_accuracy(self) -> float | None:
        """The test accuracy after the last step; None for a job that did not finish."""
        return self.curve[-1][1] if self.curve and self.outcome.status == "finished" else None

    @property
    def validated_accuracy(self) -> float | None:
        """The test accuracy at the step that validation chose."""
        return self.outcome.summary.test_accuracy if self.outcome.summary else None

    @property
    def wall_seconds(self) -> float | None:
        """How long it took."""
        return self.outcome.summary.wall_seconds if self.outcome.summary else None


class Group(NamedTuple):
    """One job, once for each seed."""

    name: str
    position: int  # of the job in the study, which decides its colour
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
    def inspections(self) -> list[dict[str, Any]]:
        """What was measured inside the network, step by step: of the first seed."""
        return self.runs[0].inspections

    @property
    def best_accuracy(self) -> "Spread":
        """The maximum of the test curve, over seeds."""
        return spread(map(best_accuracy, self.curves), worst=-math.inf)

    @property
    def final_accuracy(self) -> "Spread":
        """The test accuracy after the last step, over seeds."""
        return self.over(lambda run: run.final_accuracy, worst=-math.inf)

    @property
    def learns(self) -> bool:
        """Whether the median over seeds is clearly better than guessing."""
        reached = self.best_accuracy.median
        return reached is not None and any(
            run.classes and is_learnt(reached, run.classes) for run in self.runs
        )

    def over(self, value: Callable[[Run], float | None], *, worst: float) -> "Spread":
        """Return a value's spread over seeds."""
        return spread(map(value, self.runs), worst=worst)


def read(planned: Planned, outcome: Outcome) -> Run:
    """Read what a job has left; nothing if its run directory is another job's."""
    path = Path(planned.config.run_dir)
    given = planned.name, planned.values, planned.config, outcome
    if outcome.status == "refused" or not (path / "data.json").exists():
        return Run(*given, None, [], [])
    return Run(*given, read_data(path).classes, read_metrics(path), read_inspections(path))


def group(runs: Sequence[Run]) -> list[Group]:
    """Put the runs of one name together, in the order in which the names first come."""
    names = list(dict.fromkeys(run.name for run in runs))
    return [
        Group(name, index, tuple(run for run in runs if run.name == name)) for index, name in enumerate(names)
    ]


def inspected(groups: Sequence[Group]) -> list[Group]:
    """Return those inside which something was measured after step 0, at which all are untrained."""
    return [job for job in groups if len(job.inspections) > 1]


class Spread(NamedTuple):
    """Median and range over seeds; None where there is none."""

    median: float | None
    low: float | None
    high: float | None


def spread(values: Iterable[float | None], *, worst: float) -> Spread:
    """Return median and range; None, what was not reached, counts as `worst`, and comes out as None."""
    found = [worst if value is None else value for value in values]
    if not found:
        return Spread(None, None, None)
    middle = (statistics.median_low(found), statistics.median_high(found))
    median = worst if worst in middle else statistics.median(found)
    return Spread(*(None if value == worst else value for value in (median, min(found), max(found))))


def best_accuracy(curve: Curve) -> float | None:
    """Return the best accuracy, if there is an evaluation."""
    return max((reached for _, reached in curve), default=None)


def steps_to(curve: Curve, accuracy: float) -> int | None:
    """Return the first step that was evaluated at this accuracy or more, if there is one."""
    return next((step for step, reached in curve if reached >= accuracy), None)


def steps_to_best_of(curve: Curve, baseline: Curve) -> int | None:
    """Return the steps to the best accuracy of a baseline, if it has one and it is reached."""
    target = best_accuracy(baseline)
    return None if target is None else steps_to(curve, target)


def speedup(curve: Curve, baseline: Curve) -> float | None:
    """Return how many times fewer steps a job takes to the best accuracy of the baseline.

    None if it does not reach it, or if that is the baseline's first evaluation: when the baseline reached it
    is then not known.
    """
    reached, best = steps_to_best_of(curve, baseline), steps_to_best_of(baseline, baseline)
    return best / reached if reached and best and is_measurable(baseline) else None


def is_measurable(baseline: Curve) -> bool:
    """Return whether there can be a speed-up over this baseline: it improves after its first evaluation."""
    best = steps_to_best_of(baseline, baseline)
    return best is not None and best > baseline[0][0]


def speedups(job: Group, baseline: Group) -> Spread:
    """Return the speed-ups over a baseline, seed by seed, without those that cannot be measured."""
    pairs = [(own, theirs) for own, theirs in zip(job.curves, baseline.curves) if is_measurable(theirs)]
    return spread((speedup(own, theirs) for own, theirs in pairs), worst=0)


def is_learnt(accuracy: float, classes: int) -> bool:
    """Return whether an accuracy is twice that of guessing or, of few classes, halfway from there to 1."""
    guessing = 1 / classes
    return accuracy > min(2 * guessing, (1 + guessing) / 2)
