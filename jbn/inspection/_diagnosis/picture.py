"""A diagnosis as a picture, by matplotlib."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from jbn.inspection._diagnosis.layers import LayerDiagnosis
from jbn.inspection._diagnosis.records import Losses
from jbn.inspection._diagnosis.sentences import Finding
from jbn.inspection._diagnosis.table import shortened, worst_first

SHOWN = 24  # layers at most
LEAST = 1e-4  # of the axis of divergences
NAMES = {"running": "running", "batch": "each batch's own", "recalibrated": "recalibrated"}


def save(
    path: Any,
    layers: Sequence[LayerDiagnosis],
    losses: Losses | None,
    findings: Sequence[Finding],
) -> None:
    """Draw the divergences of the worst layers in the order of their calls, the losses and the verdict."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("A picture needs matplotlib; install it with: pip install matplotlib") from error
    said = "\n".join(textwrap.fill(f"{f.kind}: {f.what}", 110) for f in findings) or "Nothing is wrong."
    height = 1.4 + 0.26 * min(len(layers), SHOWN) + 0.19 * said.count("\n")
    figure = Figure(figsize=(9, max(3.2, height)), layout="constrained")
    has_losses = losses is not None
    axes: Any = figure.subplots(1, 1 + has_losses, width_ratios=(3, 1)[: 1 + has_losses], squeeze=False)[0]
    draw_layers(axes[0], layers)
    if losses is not None:
        draw_losses(axes[1], losses)
    figure.suptitle(said, fontsize=9, x=0.01, ha="left", parse_math=False)
    figure.savefig(path, dpi=120)


def draw_layers(axes: Any, layers: Sequence[LayerDiagnosis], color: str = "#0c6ccc") -> None:
    """Draw the divergence of the worst layers as bars, and those of their features as points."""
    worst = worst_first(layers)[:SHOWN]
    layers = [layer for layer in layers if any(layer is one for one in worst)]
    for row, layer in enumerate(layers):
        known = layer.divergence[np.isfinite(layer.divergence)]
        if not math.isnan(layer.kl):
            axes.barh(row, max(layer.kl, LEAST), color=color, alpha=0.35, height=0.7)
            axes.plot(np.maximum(known, LEAST), np.full(len(known), row), "|", color=color, alpha=0.6)
        else:
            axes.text(LEAST, row, " not known", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(left=LEAST)
    axes.axvline(0.05, color="gray", linestyle="--", linewidth=1)
    axes.set_yticks(
        range(len(layers)), [shortened(layer.name, 28).replace("$", r"\$") for layer in layers], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("KL, nats: mean (bar) and features")
    axes.spines[["top", "right"]].set_visible(False)


def draw_losses(axes: Any, losses: Losses, color: str = "#b43c00") -> None:
    """Draw the three losses."""
    means = losses.means()
    for row, value in enumerate(means[name] for name in NAMES):
        axes.barh(row, value if math.isfinite(value) else 0, color=color, alpha=0.6, height=0.6)
        axes.text(0, row, f" {value:.3g}", va="center", fontsize=9)
    axes.set_yticks(range(3), [*NAMES.values()], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("loss, by statistics")
    axes.spines[["top", "right"]].set_visible(False)
