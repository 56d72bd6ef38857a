"""How the result depends on the values of a sweep: the learning rate, the batch size, the norm."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from train.studies import charts
from train.studies.plan import named, short
from train.studies.results import Group, Run, Spread, spread
from train.studies.sections import evaluation_gap
from train.studies.sections.section import Section, further, listed, number, score, with_range
from train.studies.sections.training_speed import curves, ended

Line = dict[float, Spread]  # value of a key -> final headline over seeds
NEAR = 0.05  # of accuracy or R^2: what is further below the best is not called near it
NAMED = 4  # lines at most in a sentence
DRAWN = 8  # jobs at most whose curves are drawn
# On which axis values are apart from each other, by the lowest and the highest; other ones on a linear one.
SCALES = {
    "log": lambda low, high: low > 0 and high / low >= 4,
    "logit": lambda low, high: low > 0 and high < 1 and (1 - low) / (1 - high) >= 4,  # 0.9, 0.99, 0.999
}


def sections(groups: Sequence[Group]) -> list[Section]:
    """Show, for each key with several numbers, the final headline over its values, and how all jobs ended.

    There is a line for each combination of the other keys, a norm each where the sweep has several.
    """
    runs = [run for job in groups for run in job.runs]
    keys = [key for key in runs[0].values if key != "seed" and _is_numeric([run.values[key] for run in runs])]
    finished = any(run.final is not None for run in runs)
    lines = {key: _lines(key, runs) for key in keys if finished}
    # What has a name keeps its colour on the page.
    names = list(dict.fromkeys(name for of_key in lines.values() for name in of_key))
    groups = [job._replace(position=len(names) + job.position) for job in groups]
    seeds = max(len(job.runs) for job in groups)
    found = [_over(short(key), groups[0].headline, of_key, names, seeds) for key, of_key in lines.items()]
    gap = evaluation_gap.section(groups)
    return [*found, *([gap] if gap else []), _all_jobs(groups, compare=not found)]


def _over(what: str, headline: str, lines: dict[str, Line], names: list[str], seeds: int) -> Section:
    over = f", median of {seeds} seeds; the shade is their range" if seeds > 1 else ""
    shown = (
        charts.chart(
            lambda axes: _draw(axes, lines, names, what, headline, seeds),
            alt=f"Final test {headline} over the {what}",
            caption=f"Test {headline} after the last step{over}. A gap is a job that did not finish.",
        ),
        charts.chart(
            lambda axes: _draw(axes, lines, names, what, "error", seeds),
            alt=f"Final test error over the {what}",
            caption=f"The same as an error, 1 - {headline}, where differences between good jobs can be seen.",
        ),
    )
    values = _values(lines)
    rows = tuple((name, *(_cell(line.get(at)) for at in values)) for name, line in lines.items())
    header = (f"final test {headline} at {what}", *(f"{at:g}" for at in values))
    return Section(f"Over the {what}", _sentences(lines, what, headline), shown, header, rows)


def _cell(reached: Spread | None) -> str:
    """Write a median; the chart has the range, unless a seed has no place in it."""
    if reached is None:
        return ""
    if None not in reached:
        return score(reached.median or 0)
    return with_range(reached, score, missing="unfinished")


def _sentences(lines: dict[str, Line], what: str, headline: str) -> tuple[str, ...]:
    """Compare the lines by their best, and by how many of their values are near the best of all."""
    medians = {
        name: {at: reached.median for at, reached in line.items() if reached.median is not None}
        for name, line in lines.items()
    }
    best = {name: max(reached, key=reached.__getitem__) for name, reached in medians.items() if reached}
    if not best:
        return ("At no value did most seeds finish.",)
    scores = {name: medians[name][at] for name, at in best.items()}
    lowest = max(scores.values()) - NEAR
    far = {
        name: [at for at in line if medians[name].get(at, -math.inf) < lowest] for name, line in lines.items()
    }
    said = [f"{score(scores[name])} with {name} (at {best[name]:g})" for name in _named(scores)]
    near = [
        f"{name} at {len(lines[name]) - len(far[name])} of {len(lines[name])} values"
        + (f" (not at {listed(f'{at:g}' for at in far[name])})" if far[name] else "")
        for name in _named({name: -len(values) for name, values in far.items()})
    ]
    return (
        f"The best final test {headline} over the {what} was{_of(best, 'lines')} {listed(said)}.",
        f"Within {100 * NEAR:.0f} points of the best of all were{_of(far, 'lines')} {listed(near)}.",
    )


def _named(values: Mapping[str, float]) -> list[str]:
    """Return the names of few values, of many those of the highest and of the lowest."""
    ordered = sorted(values, key=values.__getitem__, reverse=True)
    return list(values) if len(values) <= NAMED else [ordered[0], ordered[-1]]


def _of(values: Mapping[str, Any], what: str) -> str:
    """Say which of many values are named."""
    return f", of {len(values)} {what} the highest and the lowest," if len(values) > NAMED else ""


def _all_jobs(groups: Sequence[Group], *, compare: bool) -> Section:
    """List how all jobs ended; with `compare`, where no number is varied, compare them."""
    headline = groups[0].headline
    more, of_job = further(groups, "final {}", Run.last)
    rows = tuple(
        (
            job.name,
            *(with_range(a, score) for a in (job.final, job.best)),
            *of_job[job.name],
            number(job.over(lambda run: run.wall_seconds, worst=math.inf).median),
            ended(job),
        )
        for job in groups
    )
    header = ("job", f"final test {headline}", "best of the test curve", *more, "seconds", "ended")
    known = {job.name: reached for job in groups if (reached := job.final.median) is not None}
    said = listed(f"{score(known[name])} with {name}" for name in _named(known)) if known else ""
    sentence = f"The final test {headline} was{_of(known, 'jobs')} {said}." if known else "No job finished."
    shown = curves(groups) if compare and len(groups) <= DRAWN else ()
    return Section("All jobs", (sentence,) if compare else (), shown, header, rows)


def _is_numeric(values: Sequence[Any]) -> bool:
    return len(set(values)) > 1 and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    )


def _lines(key: str, runs: Sequence[Run]) -> dict[str, Line]:
    """Return the lines of a key, one for each combination of the others; alone it is named after its norm."""
    found: dict[str, dict[float, list[float | None]]] = {}
    for run in runs:
        name = named(run.values, without=key) or f"norm = {run.config.model.norm}"
        found.setdefault(name, {}).setdefault(run.values[key], []).append(run.final)
    return {
        name: {at: spread(reached, worst=-math.inf) for at, reached in sorted(line.items())}
        for name, line in found.items()
    }


def _values(lines: dict[str, Line]) -> list[float]:
    return sorted({at for line in lines.values() for at in line})


def _draw(axes, lines, names, what, kind, seeds):
    values = _values(lines)
    for name, line in lines.items():
        middle, low, high = zip(*line.values())
        if kind == "error":
            middle, low, high = map(_errors, (middle, high, low))
        between = (low, high) if seeds > 1 else None
        charts.line(axes, list(line), middle, name=name, index=names.index(name), between=between)
    spaced = next((scale for scale, how_far in SCALES.items() if how_far(values[0], values[-1])), None)
    if spaced:
        axes.set_xscale(spaced)
        if len(values) <= 8:  # more would overlap
            axes.set_xticks(values, labels=[f"{at:g}" for at in values])
            axes.set_xticks([], minor=True)
    axes.set(xlabel=what, ylabel=f"final test {kind}")
    if kind == "error":
        charts.logarithmic(axes)


def _errors(scores):
    # Rounded, as matplotlib warns of a logarithmic axis on which there is nothing but 1 - 0.9.
    return [None if reached is None else round(1 - reached, 9) for reached in scores]
