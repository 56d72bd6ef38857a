"""It trains faster, and where nothing else does."""

import math
from collections.abc import Sequence
from functools import partial

from train.studies import charts as pictures
from train.studies import statistics as comparison
from train.studies.page import Picture, Section, Table
from train.studies.sections import learning
from train.studies.sections.wording import accuracy, count, listed, median, number, with_range
from train.studies.series import Series
from train.studies.statistics import Spread, spread, spread_of_speedups, steps_to

FAILED = {"failed": "failed", "refused": "was refused"}  # how a job ended that has an error

_or_never = partial(with_range, missing="not reached")
_times_in_words = partial(number, digits=2)  # evaluations are too far apart for more


def section(compared: Sequence[Series]) -> Section:
    """Shows accuracy over steps, and tells how fast each job came to the best accuracy of the baseline."""
    shown = tuple(_pictures(compared))
    return Section("How fast it trains", tuple(sentences(compared)), shown, _table(compared, compared[0]))


def sentences(compared: Sequence[Series]) -> list[str]:
    """Tells which jobs learnt, how well, and in how many steps to the best accuracy of the baseline."""
    baseline, *others = compared
    said = [*_failures(compared)]
    idle = [job for job in compared if any(job.curves) and not learning.seeds_that_learnt(job)]
    if idle:
        classes = idle[0].classes
        said.append(
            f"{_reached(idle)}: that is not learning, for guessing one of {classes} classes gives about "
            f"{1 / classes:.2g}."
        )
    said += [
        f"{job.name} {learning.in_words(job)}; it reached {learning.best_in_words(job)}."
        for job in compared
        if learning.seeds_that_learnt(job) and not learning.has_learnt(job)
    ]
    learnt = [job for job in others if learning.has_learnt(job)]
    if learning.has_learnt(baseline):
        said += _times(learnt, baseline)
    elif learnt:
        said.append(f"{_reached(learnt)}, where {baseline.name} {learning.in_words(baseline)}.")
    return said


def _failures(compared: Sequence[Series]) -> list[str]:
    return [
        f"{job.name} with seed {run.config.seed} {FAILED[run.summary['status']]}: "
        f"{run.summary['error'].partition('. ')[0].rstrip('.')}."
        for job in compared
        for run in job.runs
        if run.summary["error"]
    ]


def _reached(jobs: Sequence[Series]) -> str:
    return listed(f"{job.name} reached {learning.best_in_words(job)}" for job in jobs)


def _times(jobs: Sequence[Series], baseline: Series) -> list[str]:
    """Says how many steps the baseline took to its best accuracy, and how many others took to the same."""
    measurable = list(filter(comparison.is_measurable, baseline.curves))
    said = f"{baseline.name} was at its best, {learning.best_in_words(baseline)}, in its first evaluation" + (
        ", so that how many times faster or slower others came there is not known." if jobs else "."
    )
    if measurable:
        taken = with_range(_steps(measurable, measurable), count)
        reached = with_range(spread(map(comparison.target, measurable), worst=-math.inf), accuracy)
        said = f"{baseline.name} took {taken} steps to its best accuracy, {reached}."
    return [said, *(beside for job in jobs if (beside := _beside(job, baseline)))]


def _beside(job: Series, baseline: Series) -> str | None:
    """Compares how fast one job was with the baseline, which both learnt; None if that is not known."""
    pairs = [(own, theirs) for own, theirs in zip(job.curves, baseline.curves) if theirs]
    reached = sum(steps_to(own, comparison.target(theirs)) is not None for own, theirs in pairs)
    if not reached:
        return f"{job.name} did not come there; it reached {learning.best_in_words(job)}."
    measurable = [(own, theirs) for own, theirs in pairs if comparison.is_measurable(theirs)]
    if not measurable:
        return None
    own, theirs = zip(*measurable)
    times = spread_of_speedups(own, theirs)
    if times.median is None:
        best = learning.best_in_words(job)
        return f"{job.name} came there with {reached} of {len(pairs)} seeds; it reached {best}."
    at_first = any(
        curve and steps_to(curve, comparison.target(base)) == curve[0][0] for curve, base in measurable
    )
    fewer = times.median >= 1
    shown = _or_never(times if fewer else times.inverted(), _times_in_words)
    by = f"{shown} times {'fewer' if fewer else 'more'}"
    if times.low == times.high == 1:
        by = "as many"
    if at_first:
        by += " or better, for it was there at its first evaluation"
    return f"{job.name} took {_or_never(_steps(own, theirs), count)} steps to the same, {by}."


def _steps(curves: Sequence[comparison.Curve], baselines: Sequence[comparison.Curve]) -> Spread:
    pairs = zip(curves, baselines)
    return spread((steps_to(curve, comparison.target(base)) for curve, base in pairs if base), worst=math.inf)


def _pictures(compared: Sequence[Series]) -> list[Picture]:
    if not any(curve for job in compared for curve in job.curves):
        return []
    target = spread(map(comparison.target, compared[0].curves), worst=-math.inf).median

    def describe(axes, lowest=None):
        for index, job in enumerate(compared):
            draw_accuracy(axes, job, index)
        if target is not None and learning.has_learnt(compared[0]):
            pictures.level(axes, target, name=f"best of {compared[0].name}")
        axes.set(xlabel="step", ylabel="test accuracy")
        if lowest is not None:
            axes.set_ylim(lowest, None)

    seeds = max(len(job.runs) for job in compared)
    over = (
        f" Median of {seeds} seeds, or of those that came there; the shade is their range."
        if seeds > 1
        else ""
    )
    shown = [
        Picture(pictures.draw(describe, label="Test accuracy over steps"), f"Test accuracy over steps.{over}")
    ]
    finals = [reached for job in compared if (reached := learning.best_accuracy(job).median) is not None]
    if target is not None and finals and learning.has_learnt(compared[0]):
        lowest = min(0.99, math.floor(100 * (1 - 2.5 * (1 - min(target, *finals)))) / 100)
        if lowest > 0:
            near = pictures.draw(lambda axes: describe(axes, lowest), label="Test accuracy near the best")
            shown.append(Picture(near, f"The same, above {lowest:.2f}."))
    return shown


def draw_accuracy(axes, job: Series, index: int) -> None:
    """Draws the test accuracy of a job over steps: median and range of the seeds that came there."""
    by_step: dict[int, list[float]] = {}
    for curve in job.curves:
        for step, reached in curve:
            by_step.setdefault(step, []).append(reached)
    steps = sorted(by_step)
    spreads = [spread(by_step[step], worst=-math.inf) for step in steps]
    if spreads:
        middle, low, high = zip(*spreads)
        ranges = {"low": low, "high": high} if len(job.runs) > 1 else {}
        pictures.line(axes, steps, middle, name=job.name, index=index, **ranges)


def _table(compared: Sequence[Series], baseline: Series) -> Table:
    """A row a job; the speed-up over the baseline, and over every other job that has no normalization."""
    references = [baseline] + [job for job in compared[1:] if job.config.model.norm == "none"]
    header = ("job", "norm", "learning rate", "best test accuracy", "steps to the baseline's best")
    rows = [
        (
            job.name,
            job.config.model.norm,
            f"{job.config.optimizer.learning_rate:g}",
            learning.best_in_words(job),
            _or_never(_steps(job.curves, baseline.curves), count) if learning.has_learnt(baseline) else "-",
            *(_speedup(job, reference) for reference in references),
            number(median(job.over(lambda run: run.summary["wall_seconds"]))),
        )
        for job in compared
    ]
    over = (f"speed-up over {reference.name}" for reference in references)
    return Table((*header, *over, "seconds"), tuple(rows))


def _speedup(job: Series, reference: Series) -> str:
    if not learning.has_learnt(reference) or not any(map(comparison.is_measurable, reference.curves)):
        return "-"
    return _or_never(spread_of_speedups(job.curves, reference.curves), _times_in_words)
