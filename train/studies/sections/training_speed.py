"""How fast jobs train (Ioffe & Szegedy 2015, figure 2)."""

import math
from collections.abc import Sequence
from functools import partial

from train.studies import charts
from train.studies.charts import Chart
from train.studies.results import Group, Run, Spread, is_measurable, speedups, spread, steps_to_best_of
from train.studies.sections.section import Section, count, further, listed, number, score, with_range

_or_never = partial(with_range, missing="not reached")
_times = partial(number, digits=2)  # evaluations are too far apart for more

LOWEST = -1.0  # that is drawn: an R^2 may be anything below 1, as in the first steps


def section(groups: Sequence[Group]) -> Section:
    """Show the headline over steps, and in how many steps each job reached the best of the baseline."""
    references = _references(groups)
    more, of_job = further(groups, "{} at the best validation", Run.chosen)
    header = ("job", "norm", "learning rate", "best of the test curve", "at the best validation")
    header += (*more, "steps to the baseline's best", "speed-up")
    header += (*(f"speed-up over {job.name}" for job in references[1:]), "seconds", "ended")
    rows = tuple(row(job, groups[0], references, of_job[job.name]) for job in groups)
    shown = curves(groups, baseline=groups[0])
    return Section("How fast it trains", tuple(sentences(groups)), shown, header, rows)


def sentences(groups: Sequence[Group]) -> list[str]:
    """Say how long the baseline took to the best of its test curve, and which job was the fastest to it."""
    baseline, *others = groups
    its_best = f"its best test {baseline.headline}"
    learnt = [job for job in others if job.learns]
    reached = with_range(baseline.best, score)
    if not baseline.learns:
        why = f"did not learn: {its_best} was {reached}" if any(baseline.curves) else "has no result"
        said = [f"{baseline.name} {why}, so there is no speed-up over it."]
        best = max(learnt, key=lambda job: job.best.median or 0, default=None)
        return said + (
            [f"The best of the others, {best.name}, reached {with_range(best.best, score)}."] if best else []
        )
    if any(map(is_measurable, baseline.curves)):
        taken = _or_never(steps_to_target(baseline, baseline), count)
        said, parts = [f"{baseline.name} took {taken} steps to {its_best}, {reached}."], []
        if others:
            parts.append(_fastest(learnt, baseline, alone=len(others) == 1))
    else:
        said = [f"{baseline.name} was at {its_best}, {reached}, in its first evaluation"]
        said = [said[0] + (": how many times faster others were is not known." if others else ".")]
        parts = []
    failed = [job.name for job in others if any(run.outcome.error for run in job.runs)]
    idle = [job.name for job in others if any(job.curves) and not job.learns and job.name not in failed]
    parts += [
        f"{listed(names)} {what}" for names, what in ((idle, "did not learn"), (failed, "failed")) if names
    ]
    return said + (["; ".join(parts) + "."] if parts else [])


def _fastest(learnt: Sequence[Group], baseline: Group, *, alone: bool) -> str:
    compared = [(times.median, job, times) for job in learnt if (times := speedups(job, baseline)).median]
    if not compared:
        seeds = " with most of its seeds" if len(baseline.runs) > 1 else ""
        return f"The other job did not reach it{seeds}" if alone else f"No other job reached it{seeds}"
    _, job, times = max(compared, key=lambda pair: pair[0] or 0)
    steps = _or_never(steps_to_target(job, baseline), count)
    at_first = any(
        own and steps_to_best_of(own, theirs) == own[0][0] for own, theirs in zip(job.curves, baseline.curves)
    )
    return (
        f"{job.name}{'' if alone else ', the fastest of the others,'} took {steps} to the same: "
        f"{'at least ' * at_first}{_fewer_or_more(times)}"
    )


def _fewer_or_more(times: Spread) -> str:
    if times.low == times.high == 1:
        return "as many"
    if times.median is not None and times.median >= 1:
        return f"{_or_never(times, _times)} times fewer"
    inverse = Spread(*(value and 1 / value for value in (times.median, times.high, times.low)))
    return f"{_or_never(inverse, _times)} times more"


def row(
    job: Group, baseline: Group, references: Sequence[Group], more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the row of a job in the table."""
    return (
        job.name,
        job.config.model.norm,
        f"{job.config.optimizer.learning_rate:g}",
        with_range(job.best, score),
        with_range(job.over(lambda run: run.validated, worst=-math.inf), score),
        *more,
        _or_never(steps_to_target(job, baseline), count) if job.learns and baseline.learns else "-",
        *(_speedup(job, reference) for reference in references),
        number(job.over(lambda run: run.wall_seconds, worst=math.inf).median),
        ended(job),
    )


def steps_to_target(job: Group, baseline: Group) -> Spread:
    """Return the steps to the best of the baseline's test curve, seed by seed."""
    pairs = [(own, theirs) for own, theirs in zip(job.curves, baseline.curves) if theirs]
    return spread((steps_to_best_of(own, theirs) for own, theirs in pairs), worst=math.inf)


def ended(job: Group) -> str:
    """Say how the runs of a job ended: "finished", "failed: the loss ... (1 of 3 seeds)"."""
    by_end: dict[str, list[Run]] = {}
    for run in job.runs:
        error = f": {run.outcome.error.partition('. ')[0].rstrip('.')}" if run.outcome.error else ""
        by_end.setdefault(run.outcome.status + error, []).append(run)
    of = f" of {len(job.runs)} seeds"
    return "; ".join(f"{end} ({len(runs)}{of})" if len(by_end) > 1 else end for end, runs in by_end.items())


def curves(groups: Sequence[Group], *, baseline: Group | None = None) -> tuple[Chart, ...]:
    """Return a chart of the headline over steps, and one of its upper end where that shows more."""
    if not any(curve for job in groups for curve in job.curves):
        return ()
    seeds = max(len(job.runs) for job in groups)
    over = f" Median of {seeds} seeds; the shade is their range." if seeds > 1 else ""
    draw = partial(_draw, groups, baseline if baseline and baseline.learns else None)
    alt = f"Test {groups[0].headline} over steps"
    left_out = f" What is below {LOWEST:g} is left out." if _lowest(groups) < LOWEST else ""
    shown = (charts.chart(draw, alt=alt, caption=f"{alt}.{over}{left_out}"),)
    if (lowest := _near_the_best(groups)) > max(0, _lowest(groups)):
        caption = f"The same, above {lowest:.2f}."
        shown += (charts.chart(partial(draw, lowest=lowest), alt=f"{alt}, near the best", caption=caption),)
    return shown


def _references(groups: Sequence[Group]) -> list[Group]:
    """Return the baseline, and every other job that learns without normalization: baselines of their own."""
    return [groups[0], *(job for job in groups[1:] if job.config.model.norm == "none" and job.learns)]


def _speedup(job: Group, reference: Group) -> str:
    if not (job.learns and reference.learns and any(map(is_measurable, reference.curves))):
        return "-"
    return _or_never(speedups(job, reference), _times)


def _draw(groups, baseline, axes, lowest=None):
    for job in groups:
        _draw_curve(axes, job)
    if baseline is not None:
        charts.level(axes, baseline.best.median, name=f"best of {baseline.name}")
    axes.set(xlabel="step", ylabel=f"test {groups[0].headline}")
    if lowest is None and _lowest(groups) < LOWEST:
        lowest = LOWEST
    if lowest is not None:
        axes.set_ylim(lowest, 1 + 0.03 * (1 - lowest))


def _lowest(groups: Sequence[Group]) -> float:
    return min(reached for job in groups for curve in job.curves for _, reached in curve)


def _draw_curve(axes, job):
    """Draw the headline of a job over steps: median and range of the seeds evaluated there."""
    by_step: dict[int, list[float]] = {}
    for step, reached in (point for curve in job.curves for point in curve):
        by_step.setdefault(step, []).append(reached)
    if not by_step:
        return
    middle, low, high = zip(*(spread(by_step[step], worst=-math.inf) for step in sorted(by_step)))
    between = (low, high) if len(job.runs) > 1 else None
    charts.line(axes, sorted(by_step), middle, name=job.name, index=job.position, between=between)


def _near_the_best(groups: Sequence[Group]) -> float:
    """Return a value above which good jobs can be told apart; 0 if there is none."""
    lowest = min((job.best.median or 0 for job in groups if job.learns), default=1)
    return math.floor(100 * (1 - 2.5 * (1 - lowest))) / 100 if lowest < 1 else 0
