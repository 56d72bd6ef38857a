"""What a sweep says of its values: which line is the best, where it is, and where lines fail."""

import pytest

from tests.helpers.groups import FAILED, REFUSED, line, points, run, undrawn
from train.studies.results import group
from train.studies.sections import sweep

RATE, NORM, SIZE = "optimizer.learning_rate", "model.norm", "batch_size"


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    return undrawn(monkeypatch)


def study(*found):
    """Make the groups of (values, final accuracy or options of `run`), with a seed for each of several."""
    runs = []
    for values, *ends in found:
        name = ", ".join(f"{key} = {value}" for key, value in values.items())
        for seed, end in enumerate(ends):
            options = end if isinstance(end, dict) else {"curve": {10: 0.99, 20: end}}
            runs.append(
                run(**{"norm": values.get(NORM, "none")} | options, name=name, values=values, seed=seed)
            )
    return group(runs)


def rates(norm, *ends):
    return [({NORM: norm, RATE: rate}, end) for rate, end in zip((0.1, 1.0, 10.0), ends)]


def test_norms_are_compared_by_their_best_and_by_where_they_are_near_it(drawn):
    # 0.41 is better than guessing, and a failure still.
    over, jobs = sweep.sections(study(*rates("none", 0.95, 0.41, FAILED), *rates("batch", 0.9, 0.97, 0.96)))
    assert over.title == "Over the learning rate" and over.sentences == (
        "The best final test accuracy over the learning rate was 0.9500 with norm = none (at 0.1) and "
        "0.9700 with norm = batch (at 1).",
        "Within 5 points of the best of all were norm = none at 1 of 3 values (not at 1 and 10) and norm = "
        "batch at 2 of 3 values (not at 0.1).",
    )
    assert over.header == ("final test accuracy at learning rate", "0.1", "1", "10")
    assert over.rows[0] == ("norm = none", "0.9500", "0.4100", "unfinished")
    accuracy, error = (drawn[f"Final test {kind} over the learning rate"] for kind in ("accuracy", "error"))
    assert points(accuracy)["norm = batch"] == [[0.1, 0.9], [1, 0.97], [10, 0.96]]
    assert str(points(error)["norm = none"]) == "[[0.1, 0.05], [1.0, 0.59], [10.0, nan]]"
    assert (accuracy.get_xscale(), accuracy.get_yscale(), error.get_yscale()) == ("log", "linear", "log")
    assert [text.get_text() for text in accuracy.get_xticklabels()] == ["0.1", "1", "10"]
    assert jobs.title == "All jobs" and jobs.sentences == jobs.charts == ()
    assert jobs.rows[2][1:] == ("-", "-", "1.50", "failed: the loss of step 7 is not finite")


def test_each_key_of_numbers_has_a_section_with_a_line_for_each_combination_of_the_others(drawn):
    pairs = [
        ({RATE: rate, SIZE: size, "seed": 0}, 0.5 + rate / size) for rate in (0.1, 0.2) for size in (1, 2)
    ]
    found = {section.title: [row[0] for row in section.rows] for section in sweep.sections(study(*pairs))}
    assert found["Over the learning rate"] == ["batch size = 1", "batch size = 2"] and len(found) == 3
    assert found["Over the batch size"] == ["learning rate = 0.1", "learning rate = 0.2"]
    for values, numeric in (
        ((True, False), 0),
        ("ab", 0),
        (((64,), (64, 32)), 0),
        ((3, 3), 0),
        ((0, 0.5), 1),
    ):
        assert len(sweep.sections(study(*(({SIZE: value}, 0.9) for value in values)))) == numeric + 1, values
    (over, _) = sweep.sections(study(({SIZE: 2}, 0.9), ({SIZE: 1}, 0.8)))
    assert over.rows == (("norm = none", "0.8000", "0.9000"),)
    assert points(drawn["Final test accuracy over the batch size"])["norm = none"] == [[1, 0.8], [2, 0.9]]
    inside = {"curve": {10: 0.9}, "lines": [line(0), line(10, own=0.95)]}
    titles = [section.title for section in sweep.sections(study(*rates("batch", *[inside] * 3)))]
    assert titles == ["Over the learning rate", "Training and evaluation", "All jobs"]


def test_seeds_are_a_median_and_a_range_in_which_one_that_failed_is_the_worst(drawn):
    over, _ = sweep.sections(study(({SIZE: 1}, 0.5, 0.7, 0.6), ({SIZE: 2}, 0.8, 0.9, FAILED)))
    assert over.rows == (("norm = none", "0.6000", "0.8000 (unfinished\xa0to\xa00.9000)"),)
    for kind, shade in (("accuracy", {0.5, 0.7}), ("error", {0.3, 0.5})):
        corners = drawn[f"Final test {kind} over the batch size"].collections[0].get_paths()[0].vertices
        assert {round(y, 9) for x, y in corners if x == 1} == shade
    assert "median of 3 seeds; the shade is their range" in over.charts[0].caption
    over, _ = sweep.sections(study(({SIZE: 1}, 0.5, FAILED), ({SIZE: 2}, FAILED, 0.9)))
    assert over.sentences == ("At no value did most seeds finish.",)


def test_of_many_lines_the_best_and_the_worst_are_named():
    jobs = [({"model.widths": (n,), SIZE: size}, 0.9 - n / 50) for n in range(6) for size in (1, 2)]
    assert sweep.sections(study(*jobs))[0].sentences == (
        "The best final test accuracy over the batch size was, of 6 lines the highest and the lowest, "
        "0.9000 with widths = 0 (at 1) and 0.8000 with widths = 5 (at 1).",
        "Within 5 points of the best of all were, of 6 lines the highest and the lowest, widths = 0 at 2 of "
        "2 values and widths = 5 at 0 of 2 values (not at 1 and 2).",
    )


def test_sweep_without_numbers_compares_its_jobs(drawn):
    (jobs,) = sweep.sections(study(({NORM: "none"}, 0.9), ({NORM: "batch"}, 0.97)))
    said = "The final test accuracy was 0.9000 with model.norm = none and 0.9700 with model.norm = batch."
    assert jobs.sentences == (said,) and jobs.rows[1] == (
        "model.norm = batch",
        "0.9700",
        "0.9900",
        "1.50",
        "finished",
    )
    assert jobs.header == ("job", "final test accuracy", "best of the test curve", "seconds", "ended")
    assert points(drawn["Test accuracy over steps"])["model.norm = batch"] == [[10, 0.99], [20, 0.97]]
    (jobs,) = sweep.sections(study(({SIZE: 1}, FAILED | {"curve": {10: 0.9}}), ({SIZE: 2}, REFUSED)))
    assert jobs.sentences == ("No job finished.",)


def test_jobs_of_numbers_are_compared_by_r2_and_their_error_is_what_it_lacks_to_1(drawn):
    ends = [{"curve": {10: end}, "loss": "squared_error", "classes": 0} for end in (0.5, 0.75, -3.0)]
    over, jobs = sweep.sections(study(*(({SIZE: size}, end) for size, end in zip((1, 2, 4), ends))))
    assert over.sentences == (
        "The best final test R^2 over the batch size was 0.7500 with norm = none (at 2).",
        "Within 5 points of the best of all were norm = none at 1 of 3 values (not at 1 and 4).",
    )
    assert over.header[0] == "final test R^2 at batch size" and jobs.header[1] == "final test R^2"
    assert points(drawn["Final test error over the batch size"])["norm = none"] == [
        [1, 0.5],
        [2, 0.25],
        [4, 4],
    ]
    assert drawn["Final test R^2 over the batch size"].get_ylabel() == "final test R^2"
    assert "1 - R^2" in over.charts[1].caption


def test_balanced_accuracy_of_the_last_step_has_a_column_where_it_was_measured():
    balanced = [{"curve": {10: 0.9}, "last": {"balanced_accuracy": value}} for value in (0.5, 0.625)]
    (jobs,) = sweep.sections(study(({NORM: "none"}, balanced[0]), ({NORM: "batch"}, balanced[1])))
    assert jobs.header[3] == "final balanced accuracy" and [row[3] for row in jobs.rows] == [
        "0.5000",
        "0.6250",
    ]


def test_values_near_1_are_apart_from_each_other(drawn):
    momenta = ({"optimizer.momentum": momentum} for momentum in (0.9, 0.99, 0.999))
    sweep.sections(study(*((values, 0.9) for values in momenta)))
    axes = drawn["Final test accuracy over the momentum"]
    assert axes.get_xscale() == "logit"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.9", "0.99", "0.999"]
