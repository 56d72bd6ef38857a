"""Numbers in words."""

import math

from train.studies.results import Spread
from train.studies.sections.section import count, listed, median, number, score, times, with_range


def test_number_has_the_significant_digits_asked_for():
    for value, text in {
        **{0: "0", 0.0123: "0.0123", 49.5: "49.5", 31_000: "31,000", 1: "1.00", -1234.5: "-1,234"},
        **{9.996: "10.0", 999.6: "1,000", 0.09996: "0.100", 9.9996e-5: "0.000100"},  # rounded across a decade
        **{1.234e-5: "1.23e-05", 9_990_000: "9,990,000", 9_996_000: "1e+07", 1.25e9: "1.25e+09"},
        **{None: "-", math.nan: "-", -math.inf: "-"},
    }.items():
        assert number(value) == text
    assert [number(value, 2) for value in (3.14, 9.96, 0.5, -12.3)] == ["3.1", "10", "0.50", "-12"]
    assert (count(12_345.6), score(0.98765)) == ("12,346", "0.9877")


def test_times_says_how_many_times_more_or_less():
    for value, text in {
        **{1.049: "the same within 5 %", 1 / 1.049: "the same within 5 %", 2: "2.0 times more"},
        **{0.5: "2.0 times less", 1 / 9.96: "10 times less", 3000: "3,000 times more"},
        **{0: "0 against 1.00", math.inf: "- against 1.00"},
    }.items():
        assert times(value, 1, more="more", less="less") == text
    assert times(2, 0, more="more", less="less") == "2.00 against 0"


def test_range_is_there_where_there_is_one_and_is_not_broken_over_lines():
    spreads = {
        (2, 2, 2): "2",
        (2, 1, 3): "2 (1\xa0to\xa03)",
        (20, 10, None): "20 (10\xa0to\xa0-)",
        (None,) * 3: "-",
    }
    for spread, text in spreads.items():
        assert with_range(Spread(*spread), count) == text
    assert with_range(Spread(None, 10, None), count, missing="never") == "never (10\xa0to\xa0never)"


def test_names_are_listed_and_medians_are_of_what_was_measured():
    assert [listed(iter(names)) for names in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
    assert (median([3, None, 1, 2, None]), median([None])) == (2, None)
