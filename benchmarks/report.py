"""Tables in Markdown and a picture of what was measured."""

from itertools import groupby
from math import exp, log
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.interleave import Measured

Results = list[tuple[Case, dict[str, Measured]]]

BASE = "flax.linen"  # its default, whose variance is E[x^2] - E[x]^2
PASSES = {"forward": 3, "forward+backward": 8, "inference": 2}  # over x, y, dx or dy, at the least
FACTS = {
    "bytes": "bytes, in units of x",
    "temporary": "temporary, in units of x",
    "kept": "kept for backward, bytes an element",
    "collectives": "collectives",
}


def layer_tables(results: Results) -> str:
    """Returns one table for each section: times over those of Flax's default, and counts."""
    return "\n\n".join(map(_table, _sections(results)))


def summary_table(results: Results) -> str:
    """Returns one row for each section, with each library's mean ratio."""
    sections = _sections(results)
    means = [_means([_ratios(*result) for result in cases]) for cases in sections]
    names = [name for name in means[0] if name != BASE and "ghost" not in name]
    rows = [[f"time / {BASE}", *names]]
    for cases, of_section in zip(sections, means):
        rows.append([cases[0][0].section, *(_number(of_section.get(name)) for name in names)])
    return markdown(rows)


def _sections(results):
    return [list(cases) for _, cases in groupby(results, lambda result: result[0].section)]


def _ratios(case, found):
    """Returns each median over that of Flax's default; of the copy, what the necessary passes take."""
    times = {name: measured.median for name, measured in found.items()}
    times["floor"] = times.pop("copy") * PASSES[case.mode] / 2
    return {name: time / found[BASE].median for name, time in times.items()}


def _mean(values):
    return exp(sum(map(log, values)) / len(values))  # the geometric mean


def _means(columns):
    """Returns, of what all columns have, the mean ratios in their order."""
    names = [name for name in columns[0] if all(name in column for column in columns)]
    means = {name: _mean([column[name] for column in columns]) for name in names}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def _table(cases):
    columns = [_ratios(*result) for result in cases]
    names = list(dict.fromkeys(name for column in columns for name in column))
    names.sort(key=lambda name: _mean([column[name] for column in columns if name in column]))
    of_first = cases[0][1]
    facts = [fact for fact in FACTS if fact in of_first[BASE].facts]
    rows = [[cases[0][0].section, "mean", *map(_shape, cases), *(FACTS[fact] for fact in facts)]]
    for name in names:
        values = [column.get(name) for column in columns]
        counted = of_first[name].facts if name in of_first else {}
        mean = "" if None in values else f"**{_mean(values):.2f}**"
        rows.append([name, mean, *map(_number, values), *(_number(counted.get(fact), 1) for fact in facts)])
    base = [_number(found[BASE].median * 1e3) for _, found in cases]
    return markdown([*rows, [f"{BASE}, milliseconds", "", *base, *[""] * len(facts)]])


def _shape(result):
    return "x".join(map(str, result[0].shape))


def _number(value, digits=2):
    return "" if value is None else f"{value:.{digits}f}"


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

    drawn = [cases for cases in _sections(results) if "further" not in cases[0][0].section][:4]
    figure, axes = plt.subplots(1, len(drawn), figsize=(5 * len(drawn), 5), squeeze=False)
    for axis, cases in zip(axes[0], drawn):
        means = _means([_ratios(*result) for result in cases])
        floor = means.pop("floor")
        means = dict(reversed(means.items()))
        colors = ["tab:blue" if name.startswith("jbn") else "silver" for name in means]
        axis.barh(list(means), list(means.values()), color=colors)
        axis.axvline(floor, color="black", linestyle=":", linewidth=1)
        axis.set_title(cases[0][0].section, fontsize=10)
        axis.set_xlabel("time / Flax's default; dotted: copying")
        axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.01, caption, fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
