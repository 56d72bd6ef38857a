"""Why it works, as later work saw it: a smoother loss (Santurkar et al. 2018)."""

from collections.abc import Callable, Sequence

from train.studies import charts as pictures
from train.studies.page import Picture, Section, Table
from train.studies.sections.wording import SAME, listed, median, number, ratio
from train.studies.series import Series, inspected

Line = dict

# What is measured, as pictures and tables name it; the value of one line of inspection.jsonl.
MEASURES: dict[str, Callable[[Line], float | None]] = {
    "range of the loss": lambda line: _range([line["loss"], *line["losses"]]),
    "change of the gradient": lambda line: _largest(line["gradient_changes"]),
    "smoothness constant": lambda line: line["smoothness"],
    "shift of the gradient": lambda line: _mean(line["gradient_shift"][1:]),
    "cosine of the shift": lambda line: _mean(line["gradient_cosine"][1:]),
}
CAPTIONS = {
    "range of the loss": "Largest less smallest loss of a batch, from here to four steps along its gradient.",
    "change of the gradient": "Largest distance of the gradient at these points from that where they start.",
    "smoothness constant": "Largest change of the gradient over the distance moved: the lower, the smoother.",
    "shift of the gradient": "Distance between a layer's gradient before and after the layers below it take "
    "their step, mean over layers: internal covariate shift as Santurkar et al. measure it.",
    "cosine of the shift": "Cosine of the angle between these two gradients: 1 is no shift.",
}


def section(compared: Sequence[Series]) -> Section | None:
    """Shows how loss and gradient change along a step, over training."""
    seen = inspected(compared)
    if not seen:
        return None
    baseline, *others = seen
    sentences = [
        "Each job is measured along its own steps, of its own learning rate; numbers are medians over the "
        "steps measured."
    ]
    for job in others:
        parts = []
        for name in ("range of the loss", "smoothness constant", "shift of the gradient"):
            value, base = _typical(job, name), _typical(baseline, name)
            if value is not None and base is not None:
                parts.append(f"the {name} was {ratio(value, base, more='larger', less='smaller')}")
        if parts:
            sentences.append(f"In {job.name}, beside {baseline.name}, " + ", ".join(parts) + ".")
    sentences.append(_verdict(baseline, others))
    shown = tuple(_picture(seen, name) for name in MEASURES)
    rows = tuple((job.name, *(number(_typical(job, name)) for name in MEASURES)) for job in seen)
    return Section("Why it works", tuple(filter(None, sentences)), shown, Table(("median", *MEASURES), rows))


def _verdict(baseline: Series, others: Sequence[Series]) -> str | None:
    """Says for which jobs at the baseline's learning rate the measured smoothness agrees with the paper's.

    That is of batch norm beside none; what `ratio` calls the same is not smoother.
    """
    if baseline.config.model.norm != "none":
        return None
    rate = baseline.config.optimizer.learning_rate
    alike = [job for job in others if job.config.optimizer.learning_rate == rate]
    alike = [job for job in alike if job.config.model.norm in ("batch", "ghost", "flax")]
    pairs = [
        (job, _typical(job, "smoothness constant"), _typical(baseline, "smoothness constant"))
        for job in alike
    ]
    pairs = [(job, value, base) for job, value, base in pairs if value is not None and base is not None]
    if not pairs:
        return None
    smoother = [job.name for job, value, base in pairs if value * SAME <= base]
    rougher = [job.name for job, value, base in pairs if value * SAME > base]
    found = [f"{listed(smoother)} had the smoother loss, as Santurkar et al. found"] if smoother else []
    if rougher:
        found.append(f"{listed(rougher)} did not have the smoother loss that Santurkar et al. found")
    return f"At the learning rate of {baseline.name}, {'; '.join(found)}."


def _typical(job: Series, name: str) -> float | None:
    return median(MEASURES[name](line) for line in job.inspections)


def _picture(seen: Sequence[Series], name: str) -> Picture:
    def describe(axes):
        for index, job in enumerate(seen):
            lines = job.inspections
            values = [MEASURES[name](line) for line in lines]
            pictures.line(axes, [line["step"] for line in lines], values, name=job.name, index=index)
        axes.set(xlabel="step", ylabel=name, yscale="linear" if name.startswith("cosine") else "log")

    return Picture(pictures.draw(describe, label=f"{name} over steps"), CAPTIONS[name])


def _range(values: list[float | None]) -> float | None:
    return None if None in values else max(values) - min(values)


def _largest(values: list[float | None]) -> float | None:
    return None if None in values else max(values)


def _mean(values: list[float | None]) -> float | None:
    return None if None in values or not values else sum(values) / len(values)
