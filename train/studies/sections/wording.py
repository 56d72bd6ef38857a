"""Numbers in sentences."""

import math
import statistics
from collections.abc import Callable, Iterable

from train.studies.statistics import Spread

SAME = 1.05  # times more or less at which two numbers are not the same any more


def number(value: float | None, digits: int = 3) -> str:
    """Writes a number with so many digits that count: 0.0123, 49.5, 31,000, 1.25e+09."""
    if value is None or not math.isfinite(value):
        return "-"
    magnitude = int(f"{value:.{digits - 1}e}".partition("e")[2])  # once rounded: that of 9.996 is 1
    if value == 0 or not -4 <= magnitude < 7:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def count(value: float) -> str:
    """Writes a number of steps."""
    return f"{value:,.0f}"


def accuracy(value: float) -> str:
    """Writes an accuracy."""
    return f"{value:.4f}"


def with_range(values: Spread, how: Callable[[float], str] = number, *, missing: str = "-") -> str:
    """Writes a median, and the range where there is one."""
    text, low, high = (missing if value is None else how(value) for value in values)
    # A line may end before the range, not in it.
    return (
        text if values.low == values.high else f"{text} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"
    )


def ratio(value: float, base: float, *, more: str, less: str) -> str:
    """Compares with a base: "3.1 times less", "2.0 times more", "the same within 5 %"."""
    if not (base > 0 and value > 0 and math.isfinite(base) and math.isfinite(value)):
        return f"{number(value)} beside {number(base)}"
    times = value / base
    if 1 / SAME < times < SAME:
        return "the same within 5 %"
    return f"{number(times, 2)} times {more}" if times > 1 else f"{number(1 / times, 2)} times {less}"


def listed(names: Iterable[str]) -> str:
    """Writes "a", "a and b", "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def median(values: Iterable[float | None]) -> float | None:
    """Returns the median of what was measured, if anything was."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None
