"""How far the distribution of each layer's inputs moves (Ioffe & Szegedy 2015, figure 1)."""

from collections.abc import Sequence

import numpy as np

from train.studies import charts
from train.studies.results import Group, inspected
from train.studies.sections.section import Section, listed, median, number, times


def section(groups: Sequence[Group]) -> Section | None:
    """Show percentiles of a unit's inputs over training, and how far layers' inputs move in a step."""
    seen = inspected(groups)
    if not seen:
        return None
    shown = (
        charts.chart(
            lambda axes: _percentiles(axes, seen),
            alt="Percentiles of a unit's inputs over steps",
            caption="Inputs of the first unit of the last hidden layer: median, and 15th to 85th percentile. "
            "Where they bend or widen, what the unit gets changes its distribution in training.",
        ),
        charts.chart(
            lambda axes: _movements(axes, seen),
            alt="Movement of a layer's inputs over steps",
            caption="How far the inputs of a typical unit of the last hidden layer move in one step.",
        ),
    )
    layers = max(len(_movement(job)) for job in seen)
    header = ("movement in a step, sd", *(f"layer {layer + 1}" for layer in range(layers)), "drift, widths")
    rows = tuple(_row(job, layers) for job in seen)
    return Section("Internal covariate shift", _sentences(seen), shown, header, rows)


def _sentences(seen: Sequence[Group]) -> tuple[str, ...]:
    """Compare the movement of the last hidden layer's inputs with the baseline's."""
    baseline, *others = seen
    base = _movement(baseline)[-1]
    moved = {job.name: value for job in others if (value := _movement(job)[-1]) is not None}
    if base is None or not moved:
        return ()
    parts = [
        f"{number(value)} in {name} ({times(value, base, more='more', less='less')})"
        for name, value in moved.items()
    ]
    return (
        "In a step the inputs of a typical unit of the last hidden layer moved, in standard deviations, "
        f"{number(base)} in {baseline.name}, and {listed(parts)}.",
    )


def _percentiles(axes, seen):
    for job in seen:
        steps = [line["step"] for line in job.inspections]
        low, middle, high = zip(*(line["units"][0] for line in job.inspections))
        charts.line(axes, steps, middle, name=job.name, index=job.position, between=(low, high))
        for edge in (low, high):
            axes.plot(steps, np.asarray(edge, float), linewidth=0.8, **charts.style(job.position))
    axes.set(xlabel="step", ylabel="input of the activation")


def _movements(axes, seen):
    for job in seen:
        steps, moved = zip(*((line["step"], line["movement"][-1]) for line in job.inspections))
        charts.line(axes, steps, moved, name=job.name, index=job.position)
    axes.set(xlabel="step", ylabel="movement in a step, sd")
    charts.logarithmic(axes)


def _row(job, layers):
    cells = [number(value) for value in _movement(job)]
    return (job.name, *cells, *[""] * (layers - len(cells)), number(_drift(job)))


def _movement(job: Group) -> list[float | None]:
    """Return, for each layer, the median movement in a step, over the steps of the first seed's run."""
    lines = job.inspections[1:]
    return [median(values) for values in zip(*(line["movement"] for line in lines))]


def _drift(job: Group) -> float | None:
    """Return how far the medians of the units went, over the typical distance of their percentiles."""
    lines = [line["units"] for line in job.inspections]
    finite = [units for units in lines if all(value is not None for unit in units for value in unit)]
    shares = []
    for unit in zip(*finite):
        middles = [middle for _, middle, _ in unit]
        if width := median(high - low for low, _, high in unit):
            shares.append((max(middles) - min(middles)) / width)
    return median(shares)
