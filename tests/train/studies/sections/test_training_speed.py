"""How fast jobs come to the best test accuracy of the baseline, in words, in a table and in charts."""

from tests.helpers.groups import FAILED, REFUSED, group, points, undrawn
from train.studies.sections import training_speed

PLAIN, SLOW = {10: 0.2, 20: 0.7, 30: 0.9, 40: 0.9, 50: 0.8}, {10: 0.1, 60: 0.9}
FAST, NEVER, IDLE = {10: 0.8, 15: 0.9, 20: 0.95}, {10: 0.3, 20: 0.89}, {10: 0.1, 20: 0.12}
OF_SEEDS = [[PLAIN, {10: 0.5, 60: 0.8}], [FAST, {20: 0.7, 30: 0.9}]]
SOME_NEVER = [[PLAIN] * 3, [SLOW, NEVER, {10: 0.1, 45: 0.9}]]
BASE = "plain took 30 steps to its best test accuracy, 0.9000."


def test_baseline_and_the_fastest_of_the_others_are_in_words():
    for curves, *text in (
        ([PLAIN], BASE),
        ([PLAIN, FAST], BASE, "bn took 15 to the same: 2.0 times fewer."),
        ([PLAIN, SLOW], BASE, "bn took 60 to the same: 2.0 times more."),
        ([PLAIN, {10: 0.3, 30: 0.9}], BASE, "bn took 30 to the same: as many."),
        ([PLAIN, {10: 0.95}], BASE, "bn took 10 to the same: at least 3.0 times fewer."),
        ([PLAIN, NEVER], BASE, "The other job did not reach it."),
        ([PLAIN, REFUSED, FAILED], BASE, "No other job reached it; bn and x5 failed."),
        ([PLAIN, SLOW, FAST], BASE, "x5, the fastest of the others, took 15 to the same: 2.0 times fewer."),
        ([PLAIN, FAST, IDLE], BASE,
         "bn, the fastest of the others, took 15 to the same: 2.0 times fewer; x5 did not learn."),
        # Medians and ranges of seeds; a seed that did not reach it is the worst of them.
        (OF_SEEDS,
         "plain took 45 (30 to 60) steps to its best test accuracy, 0.8500 (0.8000 to 0.9000).",
         "bn took 22 (15 to 30) to the same: 2.0 times fewer."),
        (SOME_NEVER, BASE,
         "bn took 60 (45 to not reached) to the same: 2.0 (1.5 to not reached) times more."),
        ([[PLAIN] * 2, [FAST, NEVER]], BASE, "The other job did not reach it with most of its seeds."),
        # Baselines over which there is no speed-up.
        ([{10: 0.9, 20: 0.8}, FAST],
         "plain was at its best test accuracy, 0.9000, in its first evaluation: how many times faster "
         "others were is not known."),
        ([IDLE, FAST, NEVER],
         "plain did not learn: its best test accuracy was 0.1200, so there is no speed-up over it.",
         "The best of the others, bn, reached 0.9500."),
        ([FAILED, IDLE], "plain has no result, so there is no speed-up over it."),
    ):  # fmt: skip
        of_seeds = [each if isinstance(each, list) else [each] for each in curves]
        sentences = training_speed.sentences(
            [group(name, *c) for name, c in zip(("plain", "bn", "x5"), of_seeds)]
        )
        assert [sentence.replace("\xa0", " ") for sentence in sentences] == text


def test_table_has_a_speed_up_over_the_baseline_and_over_each_job_that_learns_without_norm():
    layer = group("layer", {10: 0.5, 60: 0.97}, FAILED, norm="layer")
    plain = group("plain", PLAIN, seconds=75.0)
    section = training_speed.section(
        [group("bn", FAST, norm="batch", rate=0.5), plain, group("idle", IDLE), layer]
    )
    assert section.header == (
        *("job", "norm", "learning rate", "best of the test curve", "at the best validation"),
        *("steps to the baseline's best", "speed-up", "speed-up over plain", "seconds", "ended"),
    )
    assert [" | ".join(row).replace("\xa0", " ") for row in section.rows] == [
        "bn | batch | 0.5 | 0.9500 | 0.9400 | 20 | 1.0 | 2.0 | 1.50 | finished",
        "plain | none | 0.1 | 0.9000 | 0.8900 | not reached | not reached | 1.0 | 75.0 | finished",
        "idle | none | 0.1 | 0.1200 | 0.1100 | - | - | - | 1.50 | finished",
        "layer | layer | 0.1 | - (- to 0.9700) | - (- to 0.9600) | - | - | - | 1.50 | finished (1 of 2 "
        "seeds); failed: the loss of step 7 is not finite (1 of 2 seeds)",
    ]


def test_charts_have_medians_and_ranges_the_level_of_the_baseline_and_the_upper_end_where_it_shows_more(
    monkeypatch,
):
    drawn = undrawn(monkeypatch)
    bn = group("bn", {10: 0.5, 20: 0.875, 30: 0.9}, {10: 0.25, 20: 0.875}, position=1)
    first, near = training_speed.curves([group("plain", PLAIN), bn], baseline=group("plain", PLAIN))
    axes = drawn["Test accuracy over steps"]
    assert points(axes)["bn"] == [[10, 0.375], [20, 0.875], [30, 0.9]]
    assert points(axes)["best of plain"] == [[0, 0.9], [1, 0.9]]
    assert {tuple(at) for at in axes.collections[0].get_paths()[0].vertices} >= {
        (10, 0.25),
        (10, 0.5),
        (30, 0.9),
    }
    assert first.caption == "Test accuracy over steps. Median of 2 seeds; the shade is their range."
    assert near.caption == "The same, above 0.71."
    assert drawn["Test accuracy over steps, near the best"].get_ylim()[0] == 0.71
    for curves, count in (
        ([PLAIN, IDLE], 2),
        ([{10: 0.8, 20: 0.75}], 1),  # above 0.5 there is all of it
        ([PLAIN, {10: 0.5}], 1),
        ([{10: 1.0}], 1),
        ([IDLE], 1),
        ([REFUSED], 0),
    ):
        assert len(training_speed.curves([group("job", curve) for curve in curves])) == count, curves


def test_jobs_of_numbers_are_compared_by_r2_of_which_a_chart_has_no_more_than_helps(monkeypatch):
    drawn, numbers = undrawn(monkeypatch), {"loss": "squared_error", "classes": 0}
    plain = group("plain", {10: -250.0, 20: 0.5, 30: 0.75}, **numbers)
    section = training_speed.section([plain, group("bn", {10: 0.75}, **numbers), group("i", IDLE, **numbers)])
    assert section.sentences == (
        "plain took 30 steps to its best test R^2, 0.7500.",
        "bn, the fastest of the others, took 10 to the same: at least 3.0 times fewer.",
    )
    axes = drawn["Test R^2 over steps"]
    assert (axes.get_ylabel(), axes.get_ylim()[0]) == ("test R^2", -1)
    assert section.charts[0].caption == "Test R^2 over steps. What is below -1 is left out."
    assert points(axes)["plain"][0] == [10, -250]


def test_balanced_accuracy_has_a_column_where_it_was_measured():
    weighted = group("weighted", FAST, chosen={"balanced_accuracy": 0.625})
    section = training_speed.section([group("plain", PLAIN), weighted])
    assert section.header[4:6] == ("at the best validation", "balanced accuracy at the best validation")
    assert [row[4:6] for row in section.rows] == [("0.8900", "-"), ("0.9400", "0.6250")]


def test_each_rendering_has_a_column_where_there_are_several():
    shown = group("shown", FAST, chosen={"rendering_accuracy": {"inverted": 0.5, "original": 0.75}})
    section = training_speed.section([shown, group("plain", PLAIN)])
    assert section.header[5:7] == ("original at the best validation", "inverted at the best validation")
    assert [row[5:7] for row in section.rows] == [("0.7500", "0.5000"), ("-", "-")]
