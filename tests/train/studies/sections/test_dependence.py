import math

import pytest
from series_of import FAILED, REFUSED, points, run, series, sketch

from train.studies.sections import dependence

RATE, SIZE = "optimizer.learning_rate", "batch_size"


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    return sketch(monkeypatch)


def sections(**found):
    """Makes the sections of jobs: a keyword is a key with its values job by job, `at` what they reached."""
    reached = found.pop("at")
    keys = {"rate": RATE, "size": SIZE, "norm": "model.norm", "seed": "seed"}
    values = [dict(zip((keys.get(key, key) for key in found), each)) for each in zip(*found.values())]
    return dependence.sections(values, [made(each) for each in reached])


def made(reached):
    return run(**reached) if isinstance(reached, dict) else run({10: 0.99, 20: reached})


def told(**found):
    (section,) = sections(**found)
    return list(section.sentences)


# What is a line


def test_there_is_a_section_for_each_key_of_numbers_in_order():
    found = sections(size=[1, 1, 2, 2], norm=["batch"] * 4, rate=[0.1, 0.2] * 2, at=[0.9] * 4)
    assert [section.title for section in found] == ["Over the batch size", "Over the learning rate"]


@pytest.mark.parametrize(
    "values",
    [(True, False), ("a", "b"), ((64,), (64, 32)), (None, 2), (1, "2"), (3, 3), (0.5,)],
    ids=str,
)
def test_no_section_for_what_is_no_number_or_only_one(values):
    assert sections(size=values, at=[0.9] * len(values)) == []


@pytest.mark.parametrize("values", [(1, 2), (0.5, 1), (-1.0, 0)])
def test_whole_numbers_and_others_are_numbers(values):
    assert len(sections(size=values, at=[0.9, 0.9])) == 1


def test_seeds_are_no_axis():
    assert sections(seed=[0, 1], at=[0.9, 0.8]) == []


def test_sweep_without_keys_has_no_section():
    assert dependence.sections([{}], [run({10: 0.9})]) == []


def test_there_is_a_line_for_each_combination_of_other_keys(drawn):
    (section,) = sections(
        norm=["batch", "batch", "none", "none"], rate=[1, 0.1, 0.1, 1], at=[0.6, 0.9, 0.8, 0.7], seed=[0] * 4
    )
    assert section.sentences == (
        "With norm = batch the best final test accuracy was 0.9000, at a learning rate of 0.1; it learnt at "
        "every value, and ended at 0.6000 at the worst.",
        "With norm = none the best final test accuracy was 0.8000, at a learning rate of 0.1; it learnt at "
        "every value, and ended at 0.7000 at the worst.",
    )
    assert points(drawn["Final test accuracy over learning rate"]) == {
        "norm = batch": [(0.1, 0.9), (1, 0.6)],
        "norm = none": [(0.1, 0.8), (1, 0.7)],
    }


def test_two_keys_of_numbers_are_lines_of_each_other(drawn):
    rates, sizes = sections(rate=[0.1, 0.1, 0.2, 0.2], size=[8, 16] * 2, at=[0.5, 0.6, 0.7, 0.8])
    assert rates.sentences[1].startswith(
        "With batch size = 16 the best final test accuracy was 0.8000, at a l"
    )
    assert points(drawn["Final test accuracy over batch size"]) == {
        "learning rate = 0.1": [(8, 0.5), (16, 0.6)],
        "learning rate = 0.2": [(8, 0.7), (16, 0.8)],
    }


def test_seeds_are_a_median_and_a_range(drawn):
    reached = [0.5, 0.9, 0.6, 0.8, 0.7, 0.4]
    (section,) = sections(seed=[0, 0, 1, 1, 2, 2], rate=[1, 2] * 3, at=reached)
    assert section.sentences == (
        "Here the best final test accuracy was 0.8000, at a learning rate of 2; it learnt at every value, "
        "and ended at 0.6000 at the worst.",
    )
    axes = drawn["Final test accuracy over learning rate"]
    assert points(axes) == {"test": [(1, 0.6), (2, 0.8)]}
    assert {tuple(at) for at in axes.collections[0].get_paths()[0].vertices} == {
        (1, 0.5),
        (1, 0.7),
        (2, 0.4),
        (2, 0.9),
    }
    errors = drawn["Final test error over learning rate"]
    assert points(errors)["test"] == [(1, pytest.approx(0.4)), (2, pytest.approx(0.2))]
    low, high = sorted({round(y, 9) for x, y in errors.collections[0].get_paths()[0].vertices if x == 2})
    assert (low, high) == (0.1, 0.6)


def test_accuracy_is_that_of_the_end_and_not_the_best():
    assert (
        "was 0.3000, at a batch size of 2" in told(size=[1, 2], at=[{"curve": {10: 0.9, 20: 0.25}}, 0.3])[0]
    )


# Jobs that fail

GAP = dict(FAILED, curve={10: 0.9})


@pytest.mark.parametrize(
    "reached, end",
    [
        ([0.9, 0.8, 0.7], "it learnt at every value, and ended at 0.7000 at the worst."),
        ([0.9, 0.8, 0.2], "at 4 it did not learn."),
        ([0.9, 0.8, GAP], "at 4 it did not come to its end."),
        ([0.1, 0.9, REFUSED], "at 1 it did not learn; at 4 it did not come to its end."),
        (
            [0.9, {"curve": {5: 0.8}, "status": "stopped"}, 0.9],
            "at 2 it did not come to its end.",
        ),
        ([0.1, 0.12, 0.1], "at 1, 2 and 4 it did not learn."),
    ],
)
def test_values_at_which_it_did_not_learn_or_failed_are_named(reached, end):
    (sentence,) = told(size=[1, 2, 4], at=reached)
    assert sentence.partition("; ")[2] == end


def test_failed_job_is_a_gap(drawn):
    sections(size=[1, 2, 4], at=[0.9, GAP, 0.8])
    for axes in drawn.values():
        assert [math.isnan(y) for _, y in points(axes)["test"]] == [False, True, False]


def test_seed_that_failed_counts_as_the_worst():
    at = [0.7, GAP, 0.9, 0.6, GAP, 0.8]
    (sentence,) = told(seed=[0, 0, 0, 1, 1, 1], size=[1, 2, 4] * 2, at=at)
    assert sentence == (
        "Here the best final test accuracy was 0.8500, at a batch size of 4; at 2 it did not come to its end."
    )
    (sentence,) = told(seed=[0, 1, 2] * 2, size=[1] * 3 + [2] * 3, at=[0.9, GAP, 0.7, 0.5, 0.5, 0.5])
    assert "0.7000, at a batch size of 1; at 1 (with 1 of 3 seeds) it did not come to its end." in sentence


def test_line_of_which_nothing_came_to_its_end_says_so():
    norms, at = ["none", "none", "batch", "batch"], [GAP, REFUSED, 0.9, 0.8]
    first, second = told(norm=norms, rate=[1, 10] * 2, at=at)
    assert first == "With norm = none no job came to its end." and second.startswith(
        "With norm = batch the best"
    )


def test_if_no_job_came_as_far_as_its_data_there_is_no_section():
    assert sections(size=[1, 2], at=[REFUSED, REFUSED]) == []


def test_learning_is_more_than_guessing_of_few_classes():
    at = [{"curve": {10: reached}, "classes": 2} for reached in (0.7, 0.8)]
    assert told(size=[1, 2], at=at)[0].endswith("; at 1 it did not learn.")


# Axes


@pytest.mark.parametrize(
    "values, scale",
    [
        ((0.1, 1), "log"),
        ((1, 100), "log"),
        ((1, 3.9), "linear"),
        ((0, 100), "linear"),
        ((-10, 100), "linear"),
    ],
)
def test_axis_is_logarithmic_for_positive_values_that_grow_by_factors(values, scale, drawn):
    sections(size=values, at=[0.9, 0.8])
    assert {axes.get_xscale() for axes in drawn.values()} == {scale}
    assert [axes.get_yscale() for axes in drawn.values()] == ["linear", "log"]
    assert {axes.get_xlabel() for axes in drawn.values()} == {"batch size"}


def test_few_values_of_a_logarithmic_axis_are_its_only_numbers(drawn):
    sections(size=[4, 32], at=[0.9, 0.8])
    for axes in drawn.values():
        ticks = axes.get_xticklabels(), axes.get_xticklabels(minor=True)
        assert [[text.get_text() for text in labels] for labels in ticks] == [["4", "32"], []]


def test_all_right_and_all_wrong_are_shown(drawn):
    (section,) = sections(size=[1, 2, 3], at=[1.0, 0.0, 0.9])
    assert section.sentences[0] == (
        "Here the best final test accuracy was 1.0000, at a batch size of 1; at 2 it did not learn."
    )
    assert points(drawn["Final test error over batch size"])["test"] == [
        (1, 0),
        (2, 1),
        (3, pytest.approx(0.1)),
    ]


# Names and the table


def test_jobs_are_named_by_what_they_differ_in_but_for_the_seed():
    point = {"model.norm": "batch", "seed": 3, RATE: 1e-5, "model.widths": (64, 32), "data.flip": True}
    named = dependence.name(point)
    assert named == "norm = batch, learning rate = 1e-05, widths = 64 32, flip = True"
    assert dependence.name({"seed": 3}) == dependence.name({}) == ""


def test_table_says_how_each_job_ended():
    compared = [
        series("a", {10: 0.9, 20: 0.8}),
        series("b", {10: 0.9, 20: 0.8}, {10: 0.6}, {10: 0.7}),
        series("c", GAP, {10: 0.7}, REFUSED),
        series("d", REFUSED),
    ]
    section = dependence.results(compared)
    assert section.table.header == ("job", "status", "final test accuracy", "best")
    assert [tuple(cell.replace("\xa0", " ") for cell in row) for row in section.table.rows] == [
        ("a", "finished", "0.8000", "0.9000"),
        ("b", "finished", "0.7000 (0.6000 to 0.8000)", "0.7000 (0.6000 to 0.9000)"),
        ("c", "failed, finished and refused", "- (- to 0.7000)", "0.7000 (- to 0.9000)"),
        ("d", "refused", "-", "-"),
    ]
