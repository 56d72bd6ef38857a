"""How smooth the loss is along the steps of training (Santurkar et al. 2018)."""

from collections.abc import Callable, Sequence

from train.studies import charts
from train.studies.results import Group, inspected
from train.studies.sections.section import Section, listed, median, number, times

Line = dict

# What is measured, as the table names it, from one line of inspection.jsonl.
MEASURES: dict[str, Callable[[Line], float | None]] = {
    "range of the loss": lambda line: _reduce(lambda v: max(v) - min(v), [line["loss"], *line["losses"]]),
    "change of the gradient": lambda line: _reduce(max, line["gradient_changes"]),
    "smoothness constant": lambda line: line["smoothness"],
    "shift of the gradient": lambda line: _reduce(_mean, line["gradient_shift"][1:]),
    "cosine of the shift": lambda line: _reduce(_mean, line["gradient_cosine"][1:]),
}
SMOOTHNESS, SHIFT = "smoothness constant", "shift of the gradient"


def section(groups: Sequence[Group]) -> Section | None:
    """Show how loss and gradient change along a step, at each training loss and over training."""
    seen = inspected(groups)
    if not seen:
        return None
    shown = (
        charts.chart(
            lambda axes: _over_loss(axes, seen),
            alt=f"{SMOOTHNESS} over the training loss",
            caption="Largest change of the gradient over the distance moved, from here to four steps along "
            "the gradient, at each job's own learning rate: the lower, the smoother. Losses fall rightwards.",
        ),
        charts.chart(
            lambda axes: _over_steps(axes, seen),
            alt=f"{SHIFT} over steps",
            caption="Distance between a layer's gradient before and after the layers below it take their "
            "step, mean over layers: internal covariate shift as Santurkar et al. measure it.",
        ),
    )
    rows = tuple((job.name, *(number(_typical(job, name)) for name in MEASURES)) for job in seen)
    return Section(
        "Why it works", _sentences(seen), shown, ("median over training, not at equal loss", *MEASURES), rows
    )


def _sentences(seen: Sequence[Group]) -> tuple[str, ...]:
    """Compare each job's smoothness with the baseline's at equal training loss."""
    baseline, *others = seen
    parts = []
    for job in others:
        loss = _lowest_common_loss(baseline, job)
        base, value = (None if loss is None else _smoothness_at(loss, each) for each in (baseline, job))
        if base is not None and value is not None:
            compared = times(value, base, more="larger", less="smaller")
            parts.append(f"{compared} in {job.name} (at a loss of {number(loss)})")
    if not parts:
        return ()
    return (
        f"At equal training loss, the lowest that both reached, the smoothness constant was, compared with "
        f"{baseline.name}, {listed(parts)}.",
    )


def _usable(job: Group) -> list[Line]:
    return [line for line in job.inspections if line["loss"] is not None and line["smoothness"] is not None]


def _lowest_common_loss(*jobs: Group) -> float | None:
    lowest = [min((line["loss"] for line in _usable(job)), default=None) for job in jobs]
    return _reduce(max, lowest)


def _smoothness_at(loss: float, job: Group) -> float | None:
    """Return the smoothness where training first reached a loss, interpolated between two measurements."""
    lines = _usable(job)
    for before, after in zip(lines, lines[1:]):
        if before["loss"] > loss >= after["loss"]:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["smoothness"] + share * (after["smoothness"] - before["smoothness"])
    return None  # it began below it


def _typical(job: Group, name: str) -> float | None:
    return median(MEASURES[name](line) for line in job.inspections)


def _over_loss(axes, seen):
    for job in seen:
        points = sorted((line["loss"], line["smoothness"]) for line in _usable(job) if line["loss"] > 0)
        losses, values = zip(*points) if points else ((), ())
        charts.line(axes, losses, values, name=job.name, index=job.position)
    axes.set(xlabel="training loss", ylabel=SMOOTHNESS)
    charts.logarithmic(axes, "x")
    axes.invert_xaxis()
    charts.logarithmic(axes)


def _over_steps(axes, seen):
    for job in seen:
        steps, values = zip(*((line["step"], MEASURES[SHIFT](line)) for line in job.inspections))
        charts.line(axes, steps, values, name=job.name, index=job.position)
    axes.set(xlabel="step", ylabel=SHIFT)
    charts.logarithmic(axes)


def _reduce(f, values):
    return None if None in values or not values else f(values)


def _mean(values):
    return sum(values) / len(values)
