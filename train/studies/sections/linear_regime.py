"""Where the inputs of activations are on their curve (Ioffe & Szegedy 2015, section 3)."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from train.studies import charts
from train.studies.results import Group, inspected
from train.studies.sections.section import Section, listed, number
from train.training.inspection import EDGES


def section(groups: Sequence[Group]) -> Section | None:
    """Show what activations get, before training and after it, and how much of a gradient passes them."""
    seen = inspected(groups)
    if not seen:
        return None
    sentences = []
    passing = {job.name: _passing(job, -1) for job in seen}
    if known := [f"{share} in {name}" for name, share in passing.items() if share != "-"]:
        sentences.append(
            "At the end the activations of the last hidden layer passed on, on average, this share of the "
            f"gradient that they pass where they are steepest: {listed(known)}."
        )
    errors = [line["identity_error"] for job in seen for line in job.inspections]
    if None not in errors:
        sentences.append(
            "Batch norm can represent the identity: with scale = sqrt(variance + epsilon) and bias = mean it "
            f"changed none of these inputs by more than {number(max(errors), 2)} of the largest."
        )
    shown = tuple(
        charts.chart(
            lambda axes, at=at: _histograms(axes, seen, at),
            alt=f"Inputs of the activations {when}",
            caption=f"Inputs of the last hidden layer's activations {when}, each over its highest bin.",
        )
        for when, at in (("before training", 0), ("at the end", -1))
    )
    header = ("inputs of the last hidden layer", "between -1 and 1, at first", "between -1 and 1, at the end")
    header += ("gradient that passes, at first", "gradient that passes, at the end")
    rows = tuple((job.name, *(f(job, at) for f in (_inside, _passing) for at in (0, -1))) for job in seen)
    return Section("Where on the curve", tuple(sentences), shown, header, rows)


def _inside(job: Group, at: int) -> str:
    inside = np.array(job.inspections[at]["histograms"][-1], float)[(EDGES[:-1] >= -1) & (EDGES[1:] <= 1)]
    return f"{inside.sum():.0%}" if np.isfinite(inside).all() else "-"


def _passing(job: Group, at: int) -> str:
    slope, (_, steepest) = job.inspections[at]["slope"][-1], _curve(job.config.model.activation)
    return "-" if slope is None else f"{slope / steepest:.0%}"


@functools.cache
def _curve(activation: str) -> tuple[np.ndarray, float]:
    """Return an activation at the edges of the bins, and its largest derivative there."""
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(getattr(jax.nn, activation))))(np.float32(EDGES))
    return np.asarray(values), float(slopes.max())


def _histograms(axes, seen, at):
    for job in seen:
        shares = np.array(job.inspections[at]["histograms"][-1], float)
        shares, style = shares / max(shares.max(), 1e-12), charts.style(job.position)
        axes.stairs(shares, EDGES, color=style["color"], alpha=0.25, fill=True)
        axes.stairs(shares, EDGES, linewidth=1.4, label=charts.plain(job.name), **style)
    lowest = 0.0
    activations = dict.fromkeys(job.config.model.activation for job in seen)
    for activation, linestyle in zip(activations, charts.STYLES):
        curve, _ = _curve(activation)
        lowest = min(lowest, curve.min())
        ink = axes.xaxis.label.get_color()
        axes.plot(EDGES, curve, color=ink, linestyle=linestyle, linewidth=1.2, label=activation)
    axes.set(xlabel="input of the activation", ylim=(max(lowest, -1.06) - 0.02, 1.08))
