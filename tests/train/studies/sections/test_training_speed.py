import pytest
from series_of import FAILED, REFUSED, points, series, sketch

from train.studies.sections import learning, training_speed

PLAIN = {10: 0.2, 20: 0.7, 30: 0.9, 40: 0.9, 50: 0.8}
FAST = {10: 0.8, 15: 0.9, 20: 0.95}
NEVER = {10: 0.3, 20: 0.89}
AT_ONCE = {10: 0.95, 20: 0.96}
IDLE = {10: 0.1, 20: 0.12}
BASE = "plain took 30 steps to its best accuracy, 0.9000."


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    return sketch(monkeypatch)


def said(*compared):
    return list(training_speed.section(compared).sentences)


def column(section, title):
    at = section.table.header.index(title)
    return [row[at] for row in section.table.rows]


def without_ranges(text):
    return text.replace("\xa0", " ")


@pytest.mark.parametrize(
    "curve, sentence",
    [
        (FAST, "bn took 15 steps to the same, 2.0 times fewer."),
        ({30: 0.5, 40: 0.91}, "bn took 40 steps to the same, 1.3 times more."),
        ({10: 0.3, 30: 0.9}, "bn took 30 steps to the same, as many."),
        (
            AT_ONCE,
            "bn took 10 steps to the same, 3.0 times fewer or better, for it "
            "was there at its first evaluation.",
        ),
        (NEVER, "bn did not come there; it reached 0.8900."),
    ],
)
def test_job_is_told_beside_the_baseline(curve, sentence):
    assert said(series("plain", PLAIN), series("bn", curve)) == [BASE, sentence]


def test_baseline_alone_is_told_by_itself():
    assert said(series("plain", PLAIN)) == [BASE]
    assert said(series("plain", {10: 0.9})) == ["plain was at its best, 0.9000, in its first evaluation."]


def test_every_job_that_has_learnt_has_its_sentence_in_order():
    sentences = said(series("plain", PLAIN), series("a", FAST), series("b", IDLE), series("c", NEVER))
    assert [sentence.split()[0] for sentence in sentences] == ["b", "plain", "a", "c"]


def test_several_seeds_are_medians_with_their_range():
    plain = series("plain", PLAIN, {10: 0.5, 60: 0.8}, {10: 0.5, 30: 0.7, 90: 0.95})
    bn = series("bn", FAST, {20: 0.8, 30: 0.9}, {18: 0.6, 45: 0.95})
    assert list(map(without_ranges, said(plain, bn))) == [
        "plain took 60 (30 to 90) steps to its best accuracy, 0.9000 (0.8000 to 0.9500).",
        "bn took 20 (15 to 45) steps to the same, 2.0 (2.0 to 3.0) times fewer or better, for it was "
        "there at its first evaluation.",
    ]


def test_range_of_a_slower_job_goes_from_few_times_more_to_many():
    plain, bn = (
        series("plain", *[PLAIN] * 3),
        series("bn", {10: 0.1, 60: 0.9}, {1: 0, 120: 0.9}, {1: 0, 45: 0.9}),
    )
    assert list(map(without_ranges, said(plain, bn))) == [
        BASE,
        "bn took 60 (45 to 120) steps to the same, 2.0 (1.5 to 4.0) times more.",
    ]


@pytest.mark.parametrize(
    "curves, sentence",
    [
        (
            [FAST, FAST, NEVER],
            "bn took 15 (15 to not reached) steps to the same, 2.0 (not reached to 2.0) times fewer.",
        ),
        (
            [FAST, NEVER, NEVER],
            "bn came there with 1 of 3 seeds; it reached 0.8900 (0.8900 to 0.9500).",
        ),
        # The median of two is no median of one of them and nothing.
        (
            [FAST, NEVER],
            "bn came there with 1 of 2 seeds; it reached 0.9200 (0.8900 to 0.9500).",
        ),
        ([NEVER, NEVER], "bn did not come there; it reached 0.8900."),
    ],
)
def test_seeds_that_did_not_come_to_the_best_of_the_baseline_are_told(curves, sentence):
    plain, bn = series("plain", *[PLAIN] * len(curves)), series("bn", *curves)
    assert list(map(without_ranges, said(plain, bn))) == [BASE, sentence]


def test_slower_job_of_which_a_seed_did_not_get_there_took_up_to_never():
    plain, bn = series("plain", *[PLAIN] * 3), series("bn", {10: 0.1, 60: 0.9}, NEVER, {10: 0.1, 45: 0.9})
    assert without_ranges(said(plain, bn)[1]).endswith(", 2.0 (1.5 to not reached) times more.")


def test_baseline_that_was_best_at_its_first_evaluation_has_no_speedup_over_it():
    section = training_speed.section(
        [series("plain", {10: 0.9, 20: 0.8}), series("bn", FAST), series("low", NEVER)]
    )
    assert section.sentences == (
        "plain was at its best, 0.9000, in its first evaluation, so that how many times faster or slower "
        "others came there is not known.",
        "low did not come there; it reached 0.8900.",
    )
    assert column(section, "speed-up over plain") == ["-"] * 3


def test_seeds_whose_baseline_cannot_be_measured_are_left_out():
    plain = series("plain", PLAIN, {10: 0.99, 20: 0.8}, REFUSED)
    section = training_speed.section([plain, series("bn", FAST, AT_ONCE, FAST)])
    assert section.sentences[1:] == (BASE, "bn took 15 steps to the same, 2.0 times fewer.")
    assert column(section, "speed-up over plain") == ["1.0", "2.0"]


# Jobs that do not learn


def test_baseline_that_did_not_learn_is_no_measure_of_speed():
    section = training_speed.section([series("plain", IDLE), series("bn", FAST), series("bn x5", {5: 0.97})])
    assert section.sentences == (
        "plain reached 0.1200: that is not learning, for guessing one of 10 classes gives about 0.1.",
        "bn reached 0.9500 and bn x5 reached 0.9700, where plain did not learn.",
    )
    assert column(section, "speed-up over plain") == ["-"] * 3
    assert column(section, "steps to the baseline's best") == ["-"] * 3
    assert "times" not in str(section)


def test_job_that_did_not_learn_is_told_so_and_not_compared():
    section = training_speed.section(
        [series("plain", PLAIN), series("a", IDLE), series("b", {10: 0.15, 20: 0.1})]
    )
    assert section.sentences == (
        "a reached 0.1200 and b reached 0.1500: that is not learning, for guessing one of 10 classes gives "
        "about 0.1.",
        BASE,
    )
    assert column(section, "speed-up over plain") == ["1.0", "not reached", "not reached"]


def test_nobody_that_learns_is_said_once():
    assert said(series("plain", IDLE), series("bn", IDLE)) == [
        "plain reached 0.1200 and bn reached 0.1200: that is not learning, for guessing one of 10 classes "
        "gives about 0.1."
    ]


@pytest.mark.parametrize(
    "classes, at, learns",
    [
        (10, 0.2, False),
        (10, 0.21, True),
        (2, 0.74, False),
        (2, 0.76, True),
        (100, 0.019, False),
        (100, 0.03, True),
    ],
)
def test_learning_is_to_be_clearly_better_than_guessing(classes, at, learns):
    assert learning.has_learnt(series("bn", {10: at}, classes=classes)) == learns


def test_job_that_learnt_with_few_of_its_seeds_is_told_so():
    plain, bn = series("plain", *[PLAIN] * 3), series("bn", IDLE, IDLE, FAST)
    assert [without_ranges(sentence) for sentence in said(plain, bn)] == [
        "bn learnt with 1 of 3 seeds; it reached 0.1200 (0.1200 to 0.9500).",
        BASE,
    ]
    assert [without_ranges(sentence) for sentence in said(bn, plain)] == [
        "bn learnt with 1 of 3 seeds; it reached 0.1200 (0.1200 to 0.9500).",
        "plain reached 0.9000, where bn learnt with 1 of 3 seeds.",
    ]


# Jobs that fail

WHY_FAILED = "with seed 0 failed: the loss of step 7 is not finite."
WHY_REFUSED = "with seed 0 was refused: batch_size = 2000, but there are 1293."


@pytest.mark.parametrize(
    "options, best, sentences",
    [
        (REFUSED, "-", [f"bn {WHY_REFUSED}", BASE]),
        (FAILED, "-", [f"bn {WHY_FAILED}", BASE]),
        (
            FAILED | {"curve": FAST},
            "0.9500",
            [f"bn {WHY_FAILED}", BASE, "bn took 15 steps to the same, 2.0 times fewer."],
        ),
        (
            FAILED | {"curve": IDLE},
            "0.1200",
            [
                f"bn {WHY_FAILED}",
                "bn reached 0.1200: that is not learning, for guessing one of 10 classes gives about 0.1.",
                BASE,
            ],
        ),
    ],
)
def test_job_that_failed_is_told_with_what_it_reached(options, best, sentences):
    section = training_speed.section([series("plain", PLAIN), series("bn", options)])
    assert list(section.sentences) == sentences
    assert column(section, "best test accuracy") == ["0.9000", best]


@pytest.mark.parametrize("options, why", [(REFUSED, WHY_REFUSED), (FAILED, WHY_FAILED)])
def test_baseline_without_result_is_not_said_to_have_been_slow_or_not_to_learn(options, why):
    section = training_speed.section([series("plain", options), series("bn", FAST)])
    assert section.sentences == (f"plain {why}", "bn reached 0.9500, where plain has no result.")
    assert (
        column(section, "speed-up over plain")
        == column(section, "steps to the baseline's best")
        == ["-", "-"]
    )


def test_error_of_one_sentence_ends_with_one_period():
    (sentence,) = said(series("plain", {"status": "failed", "error": "no disk."}))
    assert sentence == "plain with seed 0 failed: no disk."


@pytest.mark.parametrize("options", [REFUSED, FAILED])
def test_if_nothing_ran_there_is_a_section_still(options):
    section = training_speed.section([series("plain", options), series("bn", options, options)])
    assert len(section.sentences) == 3 and not section.pictures
    assert [set(row[3:-1]) for row in section.table.rows] == [{"-"}] * 2


@pytest.mark.parametrize("curves", [(REFUSED, FAST, FAST), (FAST, REFUSED, FAST)])
def test_seed_without_data_does_not_hide_the_others(curves):
    plain, bn = series("plain", *[PLAIN] * 3), series("bn", *curves)
    refused, _, sentence = said(plain, bn)
    assert "was refused: batch_size = 2000, but there are 1293." in refused
    assert without_ranges(sentence) == (
        "bn took 15 (15 to not reached) steps to the same, 2.0 (not reached to 2.0) times fewer."
    )
    assert said(bn, plain)[1:] == [
        "bn took 20 steps to its best accuracy, 0.9500.",
        "plain did not come there; it reached 0.9000.",
    ]


def test_idle_job_with_a_seed_that_has_no_result_reached_what_the_other_did():
    assert said(series("plain", IDLE, REFUSED))[1].startswith("plain reached 0.1200: that is not learning")


# Table and pictures


def test_table_has_a_speedup_over_the_baseline_and_over_each_job_without_norm():
    compared = [
        series("bn", FAST, norm="batch", rate=0.5),
        series("plain", PLAIN, seconds=75.0),
        series("layer", {10: 0.5, 60: 0.97}, norm="layer"),
        series("lecun", {12: 0.4, 24: 0.6}),
    ]
    section = training_speed.section(compared)
    assert section.table.header == (
        *("job", "norm", "learning rate", "best test accuracy", "steps to the baseline's best"),
        *("speed-up over bn", "speed-up over plain", "speed-up over lecun", "seconds"),
    )
    assert section.table.rows == (
        ("bn", "batch", "0.5", "0.9500", "20", "1.0", "2.0", "2.4", "1.50"),
        ("plain", "none", "0.1", "0.9000", "not reached", "not reached", "1.0", "1.2", "75.0"),
        ("layer", "layer", "0.1", "0.9700", "60", "0.33", "0.50", "0.40", "1.50"),
        ("lecun", "none", "0.1", "0.6000", "not reached", "not reached", "not reached", "1.0", "1.50"),
    )


def test_table_of_seeds_has_medians_and_ranges():
    plain, bn = series("plain", PLAIN, PLAIN), series("bn", FAST, {15: 0.5, 30: 0.91}, norm="batch")
    row = [without_ranges(cell) for cell in training_speed.section([plain, bn]).table.rows[1]]
    assert row[3:] == ["0.9300 (0.9100 to 0.9500)", "22 (15 to 30)", "1.5 (1.0 to 2.0)", "1.50"]


def test_picture_has_the_curves_and_the_level_of_the_baseline(drawn):
    section = training_speed.section([series("plain", PLAIN), series("bn", FAST)])
    assert len(section.pictures) == 2 and section.pictures[1].caption == "The same, above 0.75."
    axes = drawn["Test accuracy over steps"]
    assert points(axes) == {
        "plain": list(PLAIN.items()),
        "bn": list(FAST.items()),
        "best of plain": [(0, 0.9), (1, 0.9)],
    }
    assert drawn["Test accuracy near the best"].get_ylim()[0] == 0.75 and len(axes.collections) == 0
    assert section.pictures[0].caption == "Test accuracy over steps."


def test_picture_of_seeds_has_the_median_and_range_of_those_that_came_there(drawn):
    section = training_speed.section(
        [series("plain", PLAIN), series("bn", {10: 0.2, 20: 0.9, 30: 0.9}, {10: 0.4, 20: 0.8})]
    )
    axes = drawn["Test accuracy over steps"]
    assert points(axes)["bn"] == [(10, pytest.approx(0.3)), (20, pytest.approx(0.85)), (30, 0.9)]
    corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices}
    assert corners == {(10, 0.2), (10, 0.4), (20, 0.8), (20, 0.9), (30, 0.9)}
    caption = "Median of 2 seeds, or of those that came there; the shade is their range."
    assert section.pictures[0].caption.endswith(caption)


@pytest.mark.parametrize(
    "plain, bn, caption",
    [
        (PLAIN, NEVER, "The same, above 0.72."),
        (PLAIN, {10: 0.5}, None),  # one that is far below would not be in it
        ({10: 0.5, 20: 0.6}, FAST, None),  # all of them, as the first picture shows
        ({10: 0.5, 20: 1.0}, {10: 1.0}, "The same, above 0.99."),
        (IDLE, FAST, None),
        (REFUSED, FAST, None),
        (PLAIN, REFUSED, "The same, above 0.75."),
    ],
)
def test_picture_near_the_best_is_there_where_it_shows_more(plain, bn, caption, drawn):
    _, *near = training_speed.section([series("plain", plain), series("bn", bn)]).pictures
    assert [picture.caption for picture in near] == [caption] * bool(caption)
    if caption:
        low, high = drawn["Test accuracy near the best"].get_ylim()
        assert f"{low:.2f}" in caption and low < high
