"""What a section is made of: sentences, charts, a table, and numbers in words."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

from train.config import RenderingName
from train.studies.charts import Chart
from train.studies.results import Group, Run, Spread


class Section(NamedTuple):
    title: str
    sentences: tuple[str, ...]  # at most two
    charts: tuple[Chart, ...]  # at most two
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # the first cell names the row


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with so many significant digits: 0.0123, 49.5, 31,000, 1.25e+09; None is "-"."""
    if value is None or not math.isfinite(value):
        return "-"
    magnitude = int(f"{value:.{digits - 1}e}".partition("e")[2])  # once rounded: that of 9.996 is 1
    if value == 0 or not -4 <= magnitude < 7:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def count(value: float) -> str:
    """Format a number of steps."""
    return f"{value:,.0f}"


def score(value: float) -> str:
    """Format an accuracy or an R^2."""
    return f"{value:.4f}"


def with_range(values: Spread, how: Callable[[float], str] = number, *, missing: str = "-") -> str:
    """Format a median, and the range where there is one."""
    text, low, high = (missing if value is None else how(value) for value in values)
    # A line may end before the range, not in it.
    nbsp = "\N{NO-BREAK SPACE}"
    return text if values.low == values.high else f"{text} ({low}{nbsp}to{nbsp}{high})"


def further(
    groups: Sequence[Group], name: str, of_run: Callable[[Run, str], Any]
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return the header and, by job, the cells of balanced accuracy and of each rendering, where measured.

    Args:
      name: of a column, "final {}".
      of_run: a metric of a run.
    """
    header, cells = [], {job.name: () for job in groups}
    for what in ("balanced accuracy", *get_args(RenderingName)):
        of_what = partial(_of_balance_or_rendering, of_run, what)
        found = {job.name: job.over(of_what, worst=-math.inf) for job in groups}
        if any(reached != (None, None, None) for reached in found.values()):
            header.append(name.format(what))
            cells = {job: (*before, with_range(found[job], score)) for job, before in cells.items()}
    return tuple(header), cells


def _of_balance_or_rendering(of_run: Callable[[Run, str], Any], what: str, run: Run) -> float | None:
    if what == "balanced accuracy":
        return of_run(run, "balanced_accuracy")
    return (of_run(run, f"rendering_{run.headline}") or {}).get(what)


def times(value: float, base: float, *, more: str, less: str) -> str:
    """Compare with a base: "3.1 times less", "2.0 times more", "the same within 5 %"."""
    if not (base > 0 and value > 0 and math.isfinite(base) and math.isfinite(value)):
        return f"{number(value)} against {number(base)}"
    ratio = value / base
    if 1 / 1.05 < ratio < 1.05:
        return "the same within 5 %"
    factor = number(float(f"{max(ratio, 1 / ratio):.2g}"), 2)
    return f"{factor} times {more if ratio > 1 else less}"


def capitalized(text: str) -> str:
    """Write the first letter large."""
    return text[0].upper() + text[1:]


def listed(names: Iterable[str]) -> str:
    """Write "a", "a and b", "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of what was measured, if anything was."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None
