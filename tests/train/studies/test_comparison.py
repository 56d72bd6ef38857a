import math

import pytest

from train.studies.statistics import (
    Spread,
    best,
    is_measurable,
    speedup,
    spread,
    spread_of_speedups,
    steps_to,
    target,
)

BASELINE = [(10, 0.2), (20, 0.7), (30, 0.9), (40, 0.9), (50, 0.8)]
FAST = [(10, 0.8), (20, 0.9), (30, 0.95)]
SLOW = [(50, 0.5), (60, 0.91)]
NEVER = [(10, 0.3), (20, 0.89)]


def test_best_is_the_first_step_of_the_highest_accuracy():
    assert best(BASELINE) == (30, 0.9) and target(BASELINE) == 0.9


def test_steps_to_is_the_first_evaluation_that_is_as_good():
    assert [steps_to(curve, 0.9) for curve in (BASELINE, FAST, SLOW, NEVER)] == [30, 20, 60, None]


@pytest.mark.parametrize("curve, times", [(BASELINE, 1), (FAST, 1.5), (SLOW, 0.5), (NEVER, None), ([], None)])
def test_speedup_is_the_baselines_step_over_the_jobs(curve, times):
    assert speedup(curve, BASELINE) == times


@pytest.mark.parametrize("baseline", [[(10, 0.9), (20, 0.8)], [(10, 0.9), (20, 0.9)], [(10, 0.1)], []])
def test_there_is_no_speedup_over_a_baseline_that_never_got_better(baseline):
    assert not is_measurable(baseline)
    assert speedup(FAST, baseline) is None and speedup(baseline, baseline) is None


def test_without_evaluations_nothing_is_known():
    assert best([]) is None and target([]) is None and steps_to([], 0.1) is None


@pytest.mark.parametrize(
    "values, found",
    [
        ([3.0, 1.0, 2.0], (2.0, 1.0, 3.0)),
        ([4.0], (4.0, 4.0, 4.0)),
        ([1.0, 2.0], (1.5, 1.0, 2.0)),
        ([5.0, None, 1.0], (5.0, 1.0, None)),
        ([None, None, 1.0], (None, 1.0, None)),
        ([1.0, None], (None, 1.0, None)),
        ([], (None, None, None)),
    ],
)
def test_what_was_not_reached_is_the_worst_of_a_spread(values, found):
    assert spread(values, worst=math.inf) == found


def test_speedup_that_was_not_reached_is_the_lowest_and_one_that_cannot_be_measured_is_left_out():
    first_at_its_best = [(10, 0.9), (20, 0.8)]
    found = spread_of_speedups([FAST, NEVER, BASELINE, FAST], [BASELINE] * 3 + [first_at_its_best])
    assert found == (1, None, 1.5)
    assert spread_of_speedups([FAST], [first_at_its_best]) == (None, None, None)


def test_inverted_spread_is_that_of_the_inverses():
    assert Spread(2, 1, 4).inverted() == (0.5, 0.25, 1)
    assert Spread(0.5, None, 1).inverted() == (2, 1, None)
