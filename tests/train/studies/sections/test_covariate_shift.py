import math

import pytest
from series_of import REFUSED, inspected, line, points, series, sketch

from train.studies.sections import covariate_shift


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    return sketch(monkeypatch)


def job(name, *movements, middles=(0.0, 0.0, 0.0), width=2.0, **model):
    """Makes a job with these movements of its last layer; percentiles of a unit lie around its middles."""
    percentiles = [[[at - width / 2, at, at + width / 2]] * 3 for at in middles]
    lines = [
        line(10 * at, movement=[0.3, moved], units=units)
        for at, (moved, units) in enumerate(zip(movements, percentiles))
    ]
    return inspected(name, *lines, **model)


def test_without_inspections_there_is_nothing_to_say():
    assert covariate_shift.section([series("plain", {10: 0.9}), series("bn", REFUSED)]) is None


PLAIN = job("plain", 9.0, 0.2, 0.4, middles=(0, 1, 3))


@pytest.mark.parametrize(
    "bn, sentence",
    [
        (
            job("bn", 9.0, 0.1, 0.1, middles=(0.5, 0.5, 0.0)),
            "moved 0.100 of their sd in a step (plain: 0.300; 3.0 times less). Over the whole run their "
            "median wandered by 0.250 times their width (plain: 1.50; 6.0 times less).",
        ),
        (
            job("bn", 0.0, 0.9, 0.9, middles=(0, 12, 0)),
            "moved 0.900 of their sd in a step (plain: 0.300; 3.0 times more). Over the whole run their "
            "median wandered by 6.00 times their width (plain: 1.50; 4.0 times more).",
        ),
        (
            job("bn", 0.0, 0.31, 0.31, middles=(-3, 0, 0)),
            "moved 0.310 of their sd in a step (plain: 0.300; the same within 5 %). Over the whole run their "
            "median wandered by 1.50 times their width (plain: 1.50; the same within 5 %).",
        ),
        (
            job("bn", 0.0, 0.0, 0.0),
            "moved 0 of their sd in a step (plain: 0.300; 0 beside 0.300). Over the whole run their "
            "median wandered by 0 times their width (plain: 1.50; 0 beside 1.50).",
        ),
    ],
)
def test_movement_is_told_beside_the_baseline_whether_it_is_less_or_more(bn, sentence):
    explained, told = covariate_shift.section([PLAIN, bn]).sentences
    assert told == f"In bn the inputs of a typical unit of the last hidden layer {sentence}"
    assert "bn" not in explained


def test_step_0_counts_where_nothing_else_was_measured():
    _, told = covariate_shift.section([PLAIN, job("bn", 0.6)]).sentences
    assert "moved 0.600 of their sd in a step (plain: 0.300; 2.0 times more)" in told


def test_table_has_the_median_of_each_layer_for_networks_of_any_depth():
    deep = inspected("deep", line(0, layers=3), line(10, layers=3, movement=[0.01, 2, 1000]))
    section = covariate_shift.section([PLAIN, deep])
    assert section.table.header[1:] == ("layer 1", "layer 2", "layer 3", "wandering, widths")
    assert section.table.rows == (
        ("plain", "0.300", "0.300", "", "1.50"),
        ("deep", "0.0100", "2.00", "1,000", "0"),
    )


def test_wandering_is_that_of_a_typical_unit():
    units = [[[-1.0, 0.0, 1.0]] * 3, [[-1.0, 0.0, 1.0], [0.0, 1.0, 4.0], [-1.0, 60.0, 61.0]]]
    section = covariate_shift.section([inspected("bn", *(line(n, units=at) for n, at in enumerate(units)))])
    # Of the second unit: 1 - 0, over the median of 2 and 4. The third one's is far above, the first one's 0.
    assert section.table.rows[0][-1] == "0.333" and len(section.sentences) == 1


def test_pictures_have_the_percentiles_of_each_job_and_how_far_all_of_them_moved(drawn):
    bn = job("bn", 0.1, 0.2, middles=(0.5, 0.75))
    section = covariate_shift.section([PLAIN, bn])
    assert [picture.caption.partition(":")[0] for picture in section.pictures[:2]] == ["plain", "bn"]
    axes = drawn["Percentiles of the inputs of units in bn"]
    assert points(axes) == {f"unit {n}": [(0, 0.5), (10, 0.75)] for n in (1, 2, 3)}
    edges = [list(each.get_ydata()) for each in axes.lines if each.get_linewidth() == 0.8]
    assert edges == [[-0.5, -0.25], [1.5, 1.75]] * 3 and axes.get_title() == "bn"
    moved = drawn["Movement of input distributions over steps"]
    assert points(moved) == {"plain": [(0, 9), (10, 0.2), (20, 0.4)], "bn": [(0, 0.1), (10, 0.2)]}
    assert moved.get_yscale() == "log"


def test_network_of_one_hidden_layer_has_its_line(drawn):
    section = covariate_shift.section(
        [inspected("bn", line(0, layers=1), line(10, layers=1, movement=[0.5]))]
    )
    assert section.table.rows == (("bn", "0.500", "0"),)
    assert points(drawn["Movement of input distributions over steps"])["bn"] == [(0, 0.1), (10, 0.5)]


NOTHING = dict(units=[[None] * 3] * 3, movement=[None, None])


def test_what_is_no_number_is_a_gap(drawn):
    lines = [line(0), line(10, movement=[0.2, 0.4]), line(20, **NOTHING), line(30, movement=[0.2, 0.6])]
    section = covariate_shift.section([PLAIN, inspected("bn", *lines)])
    assert "moved 0.500 of their sd in a step" in section.sentences[1]
    assert section.table.rows[1] == ("bn", "0.200", "0.500", "0")
    shown = points(drawn["Percentiles of the inputs of units in bn"])["unit 1"]
    assert math.isnan(shown[2][1]) and [y for x, y in shown if x != 20] == [0, 0, 0]


def test_line_at_whose_learning_rate_of_0_there_is_no_step_still_has_its_percentiles():
    last = line(20, movement=[None, None], units=[[1.0, 2.0, 3.0]] * 3)
    section = covariate_shift.section([inspected("bn", line(0), line(10, movement=[0.2, 0.4]), last)])
    assert section.table.rows == (("bn", "0.200", "0.400", "1.00"),)


@pytest.mark.parametrize("at", [0, 1])
def test_job_that_is_no_number_all_along_is_in_the_table_but_in_no_sentence(at):
    compared = [PLAIN, PLAIN._replace(name="bn")]
    compared[at] = inspected("nan", line(0, **NOTHING), line(10, **NOTHING))
    section = covariate_shift.section(compared)
    assert section.table.rows[at] == ("nan", "-", "-", "-") and len(section.sentences) == 1


def test_unit_without_width_is_left_out():
    units = [[[0.0, 0.0, 0.0], [at - 1.0, at, at + 1.0], [at - 1.0, at, at + 1.0]] for at in (0.0, 1.0)]
    section = covariate_shift.section([inspected("bn", *(line(n, units=at) for n, at in enumerate(units)))])
    assert section.table.rows[0][-1] == "0.500"


def test_jobs_without_inspections_are_left_out():
    section = covariate_shift.section([series("plain", {10: 0.9}), job("a", 0, 0.1), job("b", 0, 0.2)])
    assert [row[0] for row in section.table.rows] == ["a", "b"]
    assert "(a: 0.100; 2.0 times more)" in section.sentences[1]
