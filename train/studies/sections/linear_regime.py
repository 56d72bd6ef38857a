"""Where on the curve of their activation inputs lie, and that scale and bias can put them anywhere."""

from collections.abc import Sequence

import numpy as np

from train.studies import charts as pictures
from train.studies.page import Picture, Section, Table
from train.studies.sections.wording import listed, number
from train.studies.series import Series, inspected
from train.training.inspection import EDGES

CURVES = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
}
STEEPEST = {"sigmoid": 0.25, "tanh": 1.0, "relu": 1.0}  # the largest derivative


def section(compared: Sequence[Series]) -> Section | None:
    """Shows what activations get, before training and after it, and what that leaves of a gradient."""
    seen = inspected(compared)
    if not seen:
        return None
    sentences = [
        "The pictures show the inputs of the last hidden layer's activations over the activation itself: "
        "before training, when batch norm's scale is 1 and its bias 0, and at the end, when both have learnt."
    ]
    for job in (job for job in seen if job.config.model.norm != "none"):
        lines = job.inspections
        first, last = _share(lines[0]), _share(lines[-1])
        if len(lines) > 1 and "-" not in (first, last):
            sentences.append(
                f"In {job.name} {first} of these inputs lay between -1 and 1 while scale was 1 and bias 0, "
                f"and {last} once both had learnt."
            )
    passing = {job.name: _passes(job, job.inspections[-1]) for job in seen}
    if known := [f"{share} in {name}" for name, share in passing.items() if share != "-"]:
        sentences.append(
            f"Of the gradient that passes an activation at its steepest, at the end {listed(known)} passed "
            "on average."
        )
    errors = [line["identity_error"] for job in seen for line in job.inspections]
    if None not in errors:
        sentences.append(
            "Batch norm can give back what it is given: with scale = sqrt(variance + epsilon) and bias = "
            f"mean it changed none of these inputs by more than {number(max(errors), 2)} of the largest."
        )
    return Section("Where on the curve", tuple(sentences), tuple(map(_picture, seen)), _table(seen))


def _share(line: dict) -> str:
    inside = np.array(line["histograms"][-1], float)[(EDGES[:-1] >= -1) & (EDGES[1:] <= 1)]
    return f"{inside.sum():.0%}" if np.isfinite(inside).all() else "-"


def _passes(job: Series, line: dict) -> str:
    slope = line["slope"][-1]
    return "-" if slope is None else f"{slope / STEEPEST[job.config.model.activation]:.0%}"


def _picture(job: Series) -> Picture:
    activation = job.config.model.activation

    def describe(axes):
        for index, (when, at) in enumerate((("before training", 0), ("at the end", -1))):
            shares = np.array(job.inspections[at]["histograms"][-1], float)
            pictures.histogram(axes, EDGES, shares / max(shares.max(), 1e-12), name=when, index=index)
        x = np.linspace(EDGES[0], EDGES[-1], 200)
        axes.plot(x, CURVES[activation](x), color=pictures.INK, linewidth=1.2, label=activation)
        axes.set(xlabel="input of the activation", ylim=(min(0, CURVES[activation](x).min()) - 0.02, 1.08))
        axes.set_title(job.name)

    caption = f"{job.name}: inputs of the last hidden layer, each histogram over its highest bin."
    return Picture(pictures.draw(describe, label=f"Inputs of the activations of {job.name}"), caption)


def _table(seen: Sequence[Series]) -> Table:
    header = ("inputs of the last hidden layer", "between -1 and 1, at first", "between -1 and 1, at the end")
    rows = []
    for job in seen:
        lines = [job.inspections[at] for at in (0, -1)]
        rows.append((job.name, *map(_share, lines), *(_passes(job, line) for line in lines)))
    return Table((*header, "gradient that passes, at first", "gradient that passes, at the end"), tuple(rows))
