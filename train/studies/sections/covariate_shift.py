"""It holds each layer's input distribution still (Ioffe & Szegedy 2015, figure 1)."""

from collections.abc import Sequence

from train.studies import charts as pictures
from train.studies.page import Picture, Section, Table
from train.studies.sections.wording import median, number, ratio
from train.studies.series import Series, inspected


def section(compared: Sequence[Series]) -> Section | None:
    """Shows percentiles of what units get over training, and tells how far layers' inputs move in a step."""
    seen = inspected(compared)
    if not seen:
        return None
    baseline, *others = seen
    sentences = [
        "Shown are the 15th, 50th and 85th percentiles of what the first units of the last hidden layer get, "
        "on the same examples all along. A line that bends, or a band that widens, is an input whose "
        "distribution changes while the layers after it learn. Its width is the distance of the outer two."
    ]
    base_movement, base_wander = _movement(baseline)[-1], _wander(baseline)
    for job in others:
        movement, wander = _movement(job)[-1], _wander(job)
        if None in (movement, wander, base_movement, base_wander):
            continue
        step = ratio(movement, base_movement, more="more", less="less")
        whole = ratio(wander, base_wander, more="more", less="less")
        sentences.append(
            f"In {job.name} the inputs of a typical unit of the last hidden layer moved "
            f"{number(movement)} of their sd in a step ({baseline.name}: {number(base_movement)}; {step}). "
            f"Over the whole run their median wandered by {number(wander)} times their width "
            f"({baseline.name}: {number(base_wander)}; {whole})."
        )
    return Section(
        "Internal covariate shift", tuple(sentences), (*_percentiles(seen), _picture(seen)), _table(seen)
    )


def _movement(job: Series) -> list[float | None]:
    """Returns, for each layer, the median movement in a step, over the steps of the first seed's run."""
    lines = job.inspections[1:] or job.inspections
    return [median(values) for values in zip(*(line["movement"] for line in lines))]


def _wander(job: Series) -> float | None:
    """Returns how far the medians of the units went, over the typical distance of their percentiles."""
    shares = []
    for unit in _units(job):
        widths = [high - low for low, _, high in unit]
        middles = [middle for _, middle, _ in unit]
        if width := median(widths):
            shares.append((max(middles) - min(middles)) / width)
    return median(shares)


def _units(job: Series) -> list[list[list[float]]]:
    """Returns the percentiles of each unit, step by step, without steps at which they are no numbers."""
    lines = [line["units"] for line in job.inspections]
    return list(
        zip(*(units for units in lines if all(value is not None for unit in units for value in unit)))
    )


def _percentiles(seen: Sequence[Series]) -> list[Picture]:
    """Shows each job by itself, all of them with the same axis."""
    reached = [value for job in seen for unit in _units(job) for step in unit for value in step]
    limits = (min(reached), max(reached)) if reached else (None, None)
    return [_percentiles_of(job, limits) for job in seen]


def _percentiles_of(job: Series, limits: tuple[float | None, float | None]) -> Picture:
    steps = [line["step"] for line in job.inspections]

    def describe(axes):
        for index, unit in enumerate(zip(*(line["units"] for line in job.inspections))):
            low, middle, high = zip(*unit)
            pictures.line(axes, steps, middle, name=f"unit {index + 1}", index=index)
            for edge in (low, high):
                axes.plot(steps, edge, color=pictures.color(index), linewidth=0.8)
        axes.set(xlabel="step", ylabel="input of the activation", ylim=limits, title=job.name)

    caption = f"{job.name}: median (thick), 15th and 85th percentile of the inputs."
    return Picture(
        pictures.draw(describe, label=f"Percentiles of the inputs of units in {job.name}"), caption
    )


def _picture(seen: Sequence[Series]) -> Picture:
    def describe(axes):
        for index, job in enumerate(seen):
            lines = job.inspections
            moved = [line["movement"][-1] for line in lines]
            pictures.line(axes, [line["step"] for line in lines], moved, name=job.name, index=index)
        axes.set(xlabel="step", ylabel="movement in a step, sd", yscale="log")

    caption = "How far the inputs of a typical unit of the last hidden layer move in one step of training."
    return Picture(pictures.draw(describe, label="Movement of input distributions over steps"), caption)


def _table(seen: Sequence[Series]) -> Table:
    layers = max(len(_movement(job)) for job in seen)
    header = (
        "movement in a step, sd",
        *(f"layer {layer + 1}" for layer in range(layers)),
        "wandering, widths",
    )
    rows = []
    for job in seen:
        cells = [number(value) for value in _movement(job)]
        rows.append((job.name, *cells, *[""] * (layers - len(cells)), number(_wander(job))))
    return Table(header, tuple(rows))
