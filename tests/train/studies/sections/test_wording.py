import math

import pytest

from train.studies.sections.wording import accuracy, count, listed, median, number, ratio, with_range
from train.studies.statistics import Spread


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.0123, "0.0123"),
        (49.5, "49.5"),
        (31_000, "31,000"),
        (1, "1.00"),
        (-0.05, "-0.0500"),
        (-1234.5, "-1,234"),
        # Rounded across a decade.
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.96, "100"),
        (999.6, "1,000"),
        (0.09996, "0.100"),
        (9.9996e-5, "0.000100"),
        # Tiny and huge.
        (1e-4, "0.000100"),
        (1.234e-5, "1.23e-05"),
        (-1.234e-5, "-1.23e-05"),
        (5e-324, "4.94e-324"),
        (9_990_000, "9,990,000"),
        (9_996_000, "1e+07"),
        (1.25e9, "1.25e+09"),
        (1e30, "1e+30"),
        # No numbers.
        (None, "-"),
        (math.nan, "-"),
        (math.inf, "-"),
        (-math.inf, "-"),
    ],
)
def test_number_has_three_digits_that_count(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "value, text", [(3.14, "3.1"), (9.96, "10"), (0.5, "0.50"), (-12.3, "-12"), (1e-7, "1e-07")]
)
def test_number_has_as_many_digits_as_are_asked_for(value, text):
    assert number(value, 2) == text


@pytest.mark.parametrize("value", [1.0, 0.0314, 271.8, 99_999, 3.3e-9, 6.02e23, 9.9951, 0.99949])
@pytest.mark.parametrize("digits", [2, 3, 4])
def test_number_is_within_half_a_unit_of_its_last_digit(value, digits):
    written = float(number(value, digits).replace(",", ""))
    assert written == pytest.approx(value, rel=0.5 * 10 ** (1 - digits))
    assert written == float(f"{value:.{digits - 1}e}") or written == round(value)


def test_steps_are_whole_and_accuracies_have_four_decimals():
    assert (count(12_345.5), count(0)) == ("12,346", "0")
    assert (accuracy(0.98765), accuracy(1), accuracy(0)) == ("0.9877", "1.0000", "0.0000")


@pytest.mark.parametrize(
    "value, text",
    [
        (1.0, "the same within 5 %"),
        (1.049, "the same within 5 %"),
        (1 / 1.049, "the same within 5 %"),
        (1.06, "1.1 times more"),
        (1 / 1.06, "1.1 times less"),
        (2, "2.0 times more"),
        (0.5, "2.0 times less"),
        (1 / 9.96, "10 times less"),
        (3000, "3,000 times more"),
        (0, "0 beside 1.00"),
        (-1, "-1.00 beside 1.00"),
        (math.inf, "- beside 1.00"),
    ],
)
def test_ratio_says_how_many_times_more_or_less(value, text):
    assert ratio(value, 1, more="more", less="less") == text


@pytest.mark.parametrize("value, base", [(2.0, 7.0), (1e-30, 3.0), (5, 4.9)])
def test_ratio_the_other_way_round_says_the_opposite(value, base):
    there, back = ratio(value, base, more="+", less="-"), ratio(base, value, more="-", less="+")
    assert there == back


def test_ratio_to_nothing_is_no_ratio():
    assert ratio(2, 0, more="more", less="less") == "2.00 beside 0"


def test_range_is_told_where_there_is_one_and_is_not_broken_over_lines():
    assert with_range(Spread(2, 2, 2)) == "2.00"
    assert with_range(Spread(2, 1, 3), count) == "2 (1\xa0to\xa03)"
    assert with_range(Spread(20, 10, None), count, missing="not reached") == "20 (10\xa0to\xa0not reached)"
    assert with_range(Spread(None, 10, None), count, missing="never") == "never (10\xa0to\xa0never)"
    assert with_range(Spread(None, None, None), missing="never") == "never"
    assert with_range(Spread(None, None, None)) == "-"


@pytest.mark.parametrize(
    "names, text", [("a", "a"), ("ab", "a and b"), ("abc", "a, b and c"), ("abcd", "a, b, c and d")]
)
def test_names_are_listed_as_one_would(names, text):
    assert listed(iter(names)) == text


def test_median_is_of_what_was_measured():
    assert median([3, None, 1, 2, None]) == 2 and median(iter([1, 2])) == 1.5
    assert median([None, None]) is None and median([]) is None
