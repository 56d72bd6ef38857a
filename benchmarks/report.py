"""Tables in Markdown and a picture of what was measured."""

from itertools import groupby
from math import exp, log
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.interleave import Measured

Results = list[tuple[Case, dict[str, Measured]]]

BASE = "flax.linen, two passes"  # which is as exact as jbn
# How often something of the size of x must be read or written; a copy does so twice.
PASSES = {"forward": 3, "forward+backward": 8, "inference": 2}


def layer_tables(results: Results) -> str:
    """Returns one table for each section: times over those of Flax's two passes, and the compiler's counts."""
    return "\n\n".join(_section(list(cases)) for _, cases in groupby(results, lambda result: result[0].section))


def ratios(found: dict[str, Measured], mode: str) -> dict[str, float]:
    """Returns each median over that of Flax's two passes; of the copy, what the necessary passes would take."""
    base = found[BASE].median
    times = {name: measured.median for name, measured in found.items()}
    times["floor"] = times.pop("copy") * PASSES[mode] / 2
    return {name: time / base for name, time in times.items()}


def mean_ratio(values: list[float]) -> float:
    """Returns the geometric mean."""
    return exp(sum(map(log, values)) / len(values))


def _section(cases: Results) -> str:
    first = cases[0][0]
    shapes = ["x".join(map(str, case.shape)) for case, _ in cases]
    columns = [ratios(found, case.mode) for case, found in cases]
    names = [name for name in columns[0] if all(name in column for column in columns)]
    names += [name for column in columns for name in column if name not in names and name not in columns[0]]
    facts = [fact for fact in ("bytes", "temporary", "kept", "collectives") if fact in cases[0][1][BASE].facts]
    rows = [[first.section, "mean", *shapes, *(LABELS[fact] for fact in facts)]]
    for name in sorted(names, key=lambda name: mean_ratio([c[name] for c in columns if name in c])):
        values = [column.get(name) for column in columns]
        complete = None not in values
        counted = cases[0][1][name].facts if name in cases[0][1] else {}
        rows.append(
            [
                name,
                f"**{mean_ratio(values):.2f}**" if complete else "",
                *("" if value is None else f"{value:.2f}" for value in values),
                *(f"{counted[fact]:.1f}" if fact in counted else "" for fact in facts),
            ]
        )
    base = [f"{found[BASE].median * 1e3:.2f}" for _, found in cases]
    rows.append([f"{BASE}: milliseconds", "", *base, *[""] * len(facts)])
    return markdown(rows)


LABELS = {
    "bytes": "bytes, in units of x",
    "temporary": "temporary, in units of x",
    "kept": "kept for backward, bytes an element",
    "collectives": "collectives",
}


def markdown(rows: list[list[str]]) -> str:
    """Returns an aligned table whose first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def draw_layers(results: Results, path: Path, caption: str) -> None:
    """Draws the mean ratio of each library, one panel for each of the first sections."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sections = [list(cases) for _, cases in groupby(results, lambda result: result[0].section)]
    sections = [cases for cases in sections if len(cases) > 1 and "further" not in cases[0][0].section][:4]
    if not sections:
        sections = [results[:1]]
    figure, axes = plt.subplots(1, len(sections), figsize=(5 * len(sections), 5), squeeze=False)
    for axis, cases in zip(axes[0], sections):
        columns = [ratios(found, case.mode) for case, found in cases]
        means = {name: mean_ratio([c[name] for c in columns]) for name in columns[0] if all(name in c for c in columns)}
        floor = means.pop("floor")
        means = dict(sorted(means.items(), key=lambda item: -item[1]))
        colors = ["tab:blue" if name.startswith("jbn") else "silver" for name in means]
        axis.barh(list(means), list(means.values()), color=colors)
        axis.axvline(floor, color="black", linestyle=":", linewidth=1)
        axis.set_title(cases[0][0].section, fontsize=10)
        axis.set_xlabel("time / Flax's two passes; dotted: copying")
        axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.01, caption, fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
