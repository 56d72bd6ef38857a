"""What the accuracies of several jobs over their steps say of each other."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Curve = Sequence[tuple[int, float]]  # (step, test accuracy) of each evaluation, in their order


class Spread(NamedTuple):
    """Median and range over seeds; None where there is none."""

    median: float | None
    low: float | None
    high: float | None

    def inverted(self) -> "Spread":
        """Returns the spread of 1 / value, of numbers that are not 0."""
        return Spread(*(value and 1 / value for value in (self.median, self.high, self.low)))


def best(curve: Curve) -> tuple[int, float] | None:
    """Returns the best accuracy and the first step that has it, if there is an evaluation."""
    return max(curve, key=lambda point: (point[1], -point[0]), default=None)


def steps_to(curve: Curve, accuracy: float) -> int | None:
    """Returns the first step that was evaluated at this accuracy or more, if there is one."""
    return next((step for step, reached in curve if reached >= accuracy), None)


def target(baseline: Curve) -> float | None:
    """Returns the accuracy by which others are judged: the best of the baseline."""
    return best(baseline)[1] if baseline else None


def speedup(curve: Curve, baseline: Curve) -> float | None:
    """Returns how many times fewer steps a job takes to the best accuracy of the baseline.

    None if it does not reach it, or if that is the baseline's first evaluation: when the baseline came there
    is not known then.
    """
    if not is_measurable(baseline):
        return None
    step, accuracy = best(baseline)
    reached = steps_to(curve, accuracy)
    return None if reached is None else step / reached


def is_measurable(baseline: Curve) -> bool:
    """Tells whether there can be a speed-up over this baseline: it got better after its first evaluation."""
    return bool(baseline) and best(baseline)[0] > baseline[0][0]


def has_learnt(accuracy: float, classes: int) -> bool:
    """Tells whether an accuracy is twice that of guessing or, of few classes, halfway from there to 1."""
    guessing = 1 / classes
    return accuracy > min(2 * guessing, (1 + guessing) / 2)


def spread(values: Iterable[float | None], *, worst: float) -> Spread:
    """Returns median and range; None, what was not reached, counts as `worst`, and comes out as None."""
    values = [worst if value is None else value for value in values]
    if not values:
        return Spread(None, None, None)
    middle = (statistics.median_low(values), statistics.median_high(values))
    found = (worst if worst in middle else statistics.median(values), min(values), max(values))
    return Spread(*(None if value == worst or math.isinf(value) else value for value in found))


def spread_of_speedups(curves: Sequence[Curve], baselines: Sequence[Curve]) -> Spread:
    """Returns the speed-ups over baselines, seed by seed, without those that cannot be measured."""
    pairs = zip(curves, baselines)
    return spread((speedup(curve, baseline) for curve, baseline in pairs if is_measurable(baseline)), worst=0)
