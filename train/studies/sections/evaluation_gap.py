"""How far the network of evaluation, with running statistics, is from the one that was trained."""

from collections.abc import Sequence

from train.models import NORMS
from train.studies import charts
from train.studies.results import Group, inspected
from train.studies.sections.section import Section, capitalized, number

DRAWN = 8  # jobs at most, for a sweep may have many


def section(groups: Sequence[Group]) -> Section | None:
    """Show the headline with the examples' own statistics less that with the running ones, over training."""
    seen = [job for job in inspected(groups) if NORMS[job.config.model.norm].over_batch and _gaps(job)]
    if not seen:
        return None
    ordered = sorted(seen, key=_largest, reverse=True)
    worst, drawn = ordered[0], [job for job in seen if job in ordered[:DRAWN]]
    headline = seen[0].headline
    points = f"points of {headline}"  # hundredths
    at, gap = max(_gaps(worst), key=lambda pair: abs(pair[1]))
    closed = sum(abs(_gaps(job)[-1][1]) < 0.01 for job in seen)
    sentence = (
        f"The largest gap was {number(100 * gap, 2)} {points}, in {worst.name} after {at:,} steps; "
        f"at the end it was {number(100 * _gaps(worst)[-1][1], 2)} points there"
        + (f", and below one point in {closed} of {len(seen)} jobs." if len(seen) > 1 else ".")
    )
    chart = charts.chart(
        lambda axes: _draw(axes, drawn, points),
        alt=f"{capitalized(headline)} with batch statistics less {headline} with running statistics",
        caption=f"{capitalized(headline)} with the examples' own statistics less that with the running ones, "
        "on the same training examples: all of the gap comes from the statistics."
        + (f" Of {len(seen)} jobs the {DRAWN} with the largest gaps." if len(seen) > DRAWN else ""),
    )
    header = (f"gap, {points}", "first", "largest", "last", "loss, running", "loss, own")
    return Section("Training and evaluation", (sentence,), (chart,), header, tuple(map(_row, seen)))


def _gaps(job: Group) -> list[tuple[int, float]]:
    """Return step and gap, without step 0, at which nothing has been trained."""
    metric = job.runs[0].headline
    found = [
        (line["step"], *(line[f"{kind}_statistics"].get(metric) for kind in ("batch", "running")))
        for line in job.inspections[1:]
    ]
    return [(step, own - running) for step, own, running in found if own is not None and running is not None]


def _largest(job: Group) -> float:
    return max(abs(gap) for _, gap in _gaps(job))


def _draw(axes, drawn, points):
    for job in drawn:
        steps, gaps = zip(*_gaps(job))
        charts.line(axes, steps, [100 * gap for gap in gaps], name=job.name, index=job.position)
    axes.set(xlabel="step", ylabel=f"gap, {points}")


def _row(job):
    gaps, last = [gap for _, gap in _gaps(job)], job.inspections[-1]
    points = (gaps[0], max(gaps, key=abs), gaps[-1])
    losses = (last[f"{kind}_statistics"]["loss"] for kind in ("running", "batch"))
    return (job.name, *(number(100 * gap, 2) for gap in points), *map(number, losses))
