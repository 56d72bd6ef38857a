"""A diagnosis as text, at most 100 columns wide."""

import math
import textwrap
from collections.abc import Sequence

from jbn.inspection._diagnosis.layers import LayerDiagnosis
from jbn.inspection._diagnosis.records import Losses
from jbn.inspection._diagnosis.sentences import Finding

WIDTH = 100
SHOWN = 12  # layers at most, worst first
NAME = 34  # letters of a name
FLAGS = {
    "nonfinite_inputs": "NaN in inputs",
    "nonfinite_params": "NaN in scale or bias",
    "nonfinite_statistics": "NaN in statistics",
    "near_zero_scale": "scale 0",
}


def table(
    layers: Sequence[LayerDiagnosis],
    losses: Losses | None,
    findings: Sequence[Finding],
    examples: int,
) -> str:
    """Return the verdict, the losses, and the worst layers."""
    ordered = worst_first(layers)
    shown = ordered[: SHOWN if len(ordered) > SHOWN + 1 else len(ordered)]
    lines = [
        f"{len(layers)} batch norm layer{'s' * (len(layers) > 1)}, {examples:,} examples",
        *_losses(losses),
    ]
    lines += ["", *_lines(rows(shown))]
    if rest := ordered[len(shown) :]:
        largest = max((layer.kl for layer in rest if not math.isnan(layer.kl)), default=0.0)
        lines.append(f"and {len(rest)} more layers, all with KL of {largest:.2g} or less")
    lines += ["", *_verdict(findings)]
    return "\n".join(lines)


def worst_first(layers: Sequence[LayerDiagnosis]) -> list[LayerDiagnosis]:
    """Return layers with values that are not finite in the order of calls, then the others by divergence."""

    def badness(layer):
        marks = layer.marks()
        nonfinite = any(marks[name].any() for name in FLAGS if name.startswith("nonfinite"))
        return nonfinite, math.inf if nonfinite or math.isnan(layer.kl) else layer.kl

    return sorted(layers, key=badness, reverse=True)


def flags(layer: LayerDiagnosis) -> str:
    """Return what is wrong with a layer in a few words."""
    words = [text for name, text in FLAGS.items() if layer.marks()[name].any()]
    words += ["never updated"] * layer.untouched + ["frozen"] * layer.frozen
    words += ["one value"] * (0 < layer.samples <= 1)
    return ", ".join(words)


def worst_features(layer: LayerDiagnosis) -> str:
    """Return the worst features with their divergences."""
    return ", ".join(f"{layer.feature(i)} ({layer.divergence[i]:.2g})" for i in layer.worst(2))


def _losses(losses: Losses | None) -> list[str]:
    if losses is None:
        return []
    means = losses.means()
    return [
        f"loss {means['running']:.4g} with the running statistics, {means['batch']:.4g} with each batch's "
        f"own, {means['recalibrated']:.4g} recalibrated"
    ]


def rows(layers: Sequence[LayerDiagnosis]) -> list[tuple[str, ...]]:
    """Return name, divergence, worst features, share of constant ones and flags of each layer."""
    return [
        (
            shortened(layer.name),
            "-" if math.isnan(layer.kl) else f"{layer.kl:.2g}",
            worst_features(layer),
            f"{layer.constant.mean():.0%}" if layer.constant.any() else "",
            flags(layer),
        )
        for layer in layers
    ]


def _lines(cells: Sequence[tuple[str, ...]]) -> list[str]:
    cells = [("layer", "KL", "worst features", "constant", "remarks"), *cells]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = []
    for name, kl, worst, share, said in cells:
        line = f"{name:{widths[0]}}  {kl:>{widths[1]}}  {worst:{widths[2]}}  {share:>{widths[3]}}  {said}"
        lines.append(shortened(line.rstrip(), WIDTH, keep=WIDTH - 3))
    return lines


def shortened(text: str, width: int = NAME, keep: int | None = None) -> str:
    """Leave out the middle of a text that is too long, or what is after the first `keep` letters."""
    if len(text) <= width:
        return text
    keep = (width - 3) // 2 if keep is None else keep
    end = width - 3 - keep
    return f"{text[:keep]}...{text[len(text) - end :] if end else ''}"


def _verdict(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["Nothing is wrong with the running statistics."]
    lines = []
    for number, finding in enumerate(findings, 1):
        start = f"{number}. {finding.kind}: "
        lines += textwrap.wrap(start + finding.what, WIDTH, subsequent_indent="   ")
        lines += textwrap.wrap(
            f"-> {finding.remedy}", WIDTH, initial_indent="   ", subsequent_indent="      "
        )
    return lines
