"""It trains faster, and where nothing else does."""

import math
from collections.abc import Sequence
from functools import partial

from train import comparison, pictures
from train.claims.wording import accuracy, count, listed, median, number, with_range
from train.comparison import Spread, best, spread, spread_of_speedups, steps_to
from train.page import Picture, Section, Table
from train.series import Series

FAILED = {"failed": "failed", "refused": "was refused"}  # how a job ended that has an error

_or_never = partial(with_range, missing="not reached")


def section(compared: Sequence[Series]) -> Section:
    """Tells which jobs learnt, how well, and in how many steps to the best accuracy of the baseline."""
    baseline, *others = compared
    sentences = [*_failures(compared)]
    idle = [job for job in compared if any(job.over(lambda run: run.curve)) and not _learnt(job)]
    if idle:
        classes = _classes(idle[0])
        sentences.append(
            f"{_reached(idle)}: that is not learning, for guessing one of {classes} classes gives about "
            f"{1 / classes:.2g}."
        )
    sentences += [
        f"{job.name} {_learnt_with(job)}; it reached {_best(job)}."
        for job in compared
        if _learnt(job) and not has_learnt(job)
    ]
    learnt = [job for job in others if has_learnt(job)]
    if has_learnt(baseline):
        sentences += _times(learnt, baseline)
    elif learnt:
        sentences.append(f"{_reached(learnt)}, where {baseline.name} {_learnt_with(baseline)}.")
    return Section(
        "How fast it trains", tuple(sentences), tuple(_pictures(compared)), _table(compared, baseline)
    )


def best_accuracy(job: Series) -> Spread:
    """Returns the best test accuracy over the seeds."""
    return spread((reached and reached[1] for reached in map(best, _curves(job))), worst=-math.inf)


def has_learnt(job: Series) -> bool:
    """Tells whether the median over the seeds is clearly better than guessing."""
    reached = best_accuracy(job).median
    return reached is not None and comparison.has_learnt(reached, _classes(job))


def _learnt(job: Series) -> int:
    """Returns with how many of its seeds a job has learnt."""
    bests = map(best, _curves(job))
    return sum(reached is not None and comparison.has_learnt(reached[1], _classes(job)) for reached in bests)


def _learnt_with(job: Series) -> str:
    if not any(_curves(job)):
        return "has no result"
    return f"learnt with {_learnt(job)} of {len(job.runs)} seeds" if _learnt(job) else "did not learn"


def _classes(job: Series) -> int | None:
    """Returns the number of classes, if any seed has come as far as its data."""
    return next((run.classes for run in job.runs if run.classes), None)


def _curves(job: Series) -> list[comparison.Curve]:
    return job.over(lambda run: run.curve)


def _failures(compared: Sequence[Series]) -> list[str]:
    return [
        f"{job.name} with seed {run.config.seed} {FAILED[run.summary['status']]}: "
        f"{run.summary['error'].partition('. ')[0].rstrip('.')}."
        for job in compared
        for run in job.runs
        if run.summary["error"]
    ]


def _reached(jobs: Sequence[Series]) -> str:
    return listed(f"{job.name} reached {_best(job)}" for job in jobs)


def _best(job: Series) -> str:
    """Writes the best test accuracy over the seeds that have one."""
    return with_range(spread((best(curve)[1] for curve in _curves(job) if curve), worst=-math.inf), accuracy)


def _times(jobs: Sequence[Series], baseline: Series) -> list[str]:
    """Says how many steps the baseline took to its best accuracy, and how many others took to the same."""
    measurable = list(filter(comparison.is_measurable, _curves(baseline)))
    said = f"{baseline.name} was at its best, {_best(baseline)}, in its first evaluation" + (
        ", so that how many times faster or slower others came there is not known." if jobs else "."
    )
    if measurable:
        taken = with_range(_steps(measurable, measurable), count)
        reached = with_range(spread(map(comparison.target, measurable), worst=-math.inf), accuracy)
        said = f"{baseline.name} took {taken} steps to its best accuracy, {reached}."
    return [said, *(beside for job in jobs if (beside := _beside(job, baseline)))]


def _beside(job: Series, baseline: Series) -> str | None:
    """Compares how fast one job was with the baseline, which both learnt; None if that is not known."""
    pairs = [(own, theirs) for own, theirs in zip(_curves(job), _curves(baseline)) if theirs]
    reached = sum(steps_to(own, comparison.target(theirs)) is not None for own, theirs in pairs)
    if not reached:
        return f"{job.name} did not come there; it reached {_best(job)}."
    measurable = [(own, theirs) for own, theirs in pairs if comparison.is_measurable(theirs)]
    if not measurable:
        return None
    own, theirs = zip(*measurable)
    times = spread_of_speedups(own, theirs)
    if times.median is None:
        return f"{job.name} came there with {reached} of {len(pairs)} seeds; it reached {_best(job)}."
    at_first = any(
        curve and steps_to(curve, comparison.target(base)) == curve[0][0] for curve, base in measurable
    )
    fewer = times.median >= 1
    by = f"{_or_never(times if fewer else times.inverted())} times {'fewer' if fewer else 'more'}"
    if times.low == times.high == 1:
        by = "as many"
    if at_first:
        by += " or better, for it was there at its first evaluation"
    return f"{job.name} took {_or_never(_steps(own, theirs), count)} steps to the same, {by}."


def _steps(curves: Sequence[comparison.Curve], baselines: Sequence[comparison.Curve]) -> Spread:
    pairs = zip(curves, baselines)
    return spread((steps_to(curve, comparison.target(base)) for curve, base in pairs if base), worst=math.inf)


def _pictures(compared: Sequence[Series]) -> list[Picture]:
    target = spread(map(comparison.target, _curves(compared[0])), worst=-math.inf).median

    def describe(axes, lowest=None):
        for index, job in enumerate(compared):
            draw_accuracy(axes, job, index)
        if target is not None and has_learnt(compared[0]):
            pictures.level(axes, target, name=f"best of {compared[0].name}")
        axes.set(xlabel="step", ylabel="test accuracy")
        if lowest is not None:
            axes.set_ylim(lowest, None)

    seeds = max(len(job.runs) for job in compared)
    over = f" Median of {seeds} seeds; the shade is their range." if seeds > 1 else ""
    shown = [
        Picture(pictures.draw(describe, label="Test accuracy over steps"), f"Test accuracy over steps.{over}")
    ]
    finals = [reached for job in compared if (reached := best_accuracy(job).median) is not None]
    if target is not None and finals and has_learnt(compared[0]):
        lowest = min(0.99, math.floor(100 * (1 - 2.5 * (1 - min(target, *finals)))) / 100)
        if lowest > 0:
            near = pictures.draw(lambda axes: describe(axes, lowest), label="Test accuracy near the best")
            shown.append(Picture(near, f"The same, above {lowest:.2f}."))
    return shown


def draw_accuracy(axes, job: Series, index: int) -> None:
    """Draws the test accuracy of a job over steps: the median over seeds, and their range."""
    by_step: dict[int, list[float]] = {}
    for curve in _curves(job):
        for step, reached in curve:
            by_step.setdefault(step, []).append(reached)
    steps = [step for step, values in by_step.items() if len(values) == len(job.runs)]
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
            with_range(best_accuracy(job), accuracy),
            _or_never(_steps(_curves(job), _curves(baseline)), count) if has_learnt(baseline) else "-",
            *(_speedup(job, reference) for reference in references),
            number(median(job.over(lambda run: run.summary["wall_seconds"]))),
        )
        for job in compared
    ]
    over = (f"speed-up over {reference.name}" for reference in references)
    return Table((*header, *over, "seconds"), tuple(rows))


def _speedup(job: Series, reference: Series) -> str:
    if not has_learnt(reference) or not any(map(comparison.is_measurable, _curves(reference))):
        return "-"
    return _or_never(spread_of_speedups(_curves(job), _curves(reference)))
