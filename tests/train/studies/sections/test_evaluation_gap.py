import pytest
from series_of import REFUSED, inspected, line, points, series, sketch

from train.studies.sections import evaluation_gap


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    return sketch(monkeypatch)


def job(name, *gaps, norm="batch", start=0.9):
    """Makes a job whose accuracy with its own statistics is greater by `gaps`, after an untrained step 0."""
    lines = [line(1000 * at, own=0.5 + gap, running=0.5) for at, gap in enumerate((start, *gaps))]
    return inspected(name, *lines, norm=norm)


def told(*jobs):
    return evaluation_gap.section(jobs).sentences[1:]


@pytest.mark.parametrize(
    "compared",
    [
        [series("plain", {10: 0.9}), series("bn", REFUSED, norm="batch")],
        [job(norm, 0.1, norm=norm) for norm in ("none", "layer", "group")],
    ],
)
def test_without_inspections_or_running_statistics_there_is_nothing_to_say(compared):
    assert evaluation_gap.section(compared) is None


@pytest.mark.parametrize(
    "jobs, largest, end",
    [
        (
            [job("bn", 0.3, 0.125, 0.005)],
            "The largest gap was 30 points of accuracy, in bn after 1,000 steps.",
            "At the end it was 0.50 points in bn.",
        ),
        (
            [job("bn", -0.01, -0.25, -0.125)],  # the running statistics do better
            "The largest gap was -25 points of accuracy, in bn after 2,000 steps.",
            "At the end it was -12 points in bn.",
        ),
        (
            [
                job("a", 0.002, 0.001),
                job("b", 0.02, 0.02),
                job("c", 0.1, 0.0),
                job("plain", 0.4, norm="none"),
            ],
            "The largest gap was 10 points of accuracy, in c after 1,000 steps.",
            "At the end it was below one point in 2 of 3 jobs.",
        ),
        (
            [job("bn", 0.0, 0.0)],
            "The largest gap was 0 points of accuracy, in bn after 1,000 steps.",
            "At the end it was 0 points in bn.",
        ),
        (
            [job("bn", 0.010001)],
            "The largest gap was 1.0 points of accuracy, in bn after 1,000 steps.",
            "At the end it was 1.0 points in bn.",
        ),
        (
            [job("bn", start=0.03)],  # it failed before it was evaluated
            "The largest gap was 3.0 points of accuracy, in bn after 0 steps.",
            "At the end it was 3.0 points in bn.",
        ),
    ],
)
def test_largest_gap_and_the_last_ones_are_told(jobs, largest, end):
    assert told(*jobs) == (largest, end)


@pytest.mark.parametrize("norm", ["batch", "ghost", "flax"])
def test_each_norm_with_running_statistics_is_in_the_table_and_none_without(norm):
    section = evaluation_gap.section(
        [job("plain", 0.3, norm="none"), job("bn", 0.02, -0.04, 0.01, norm=norm)]
    )
    assert section.table.header == (
        "gap, points of accuracy",
        "first",
        "largest",
        "last",
        "loss, running",
        "loss, own",
    )
    assert section.table.rows == (("bn", "2.0", "-4.0", "1.0", "0.400", "0.300"),)


def test_picture_has_the_gap_in_points_without_step_0(drawn):
    evaluation_gap.section([job("a", 0.25, 0.125), job("b", -0.5)])
    (axes,) = drawn.values()
    assert points(axes) == {"a": [(1000, 25), (2000, 12.5)], "b": [(1000, -50)]}


def test_loss_that_is_no_number_has_no_digits():
    nothing = line(
        10,
        running_statistics={"loss": None, "accuracy": 0.1},
        batch_statistics={"loss": None, "accuracy": 0.1},
    )
    section = evaluation_gap.section([inspected("bn", line(0), nothing, norm="batch")])
    assert section.table.rows == (("bn", "0", "0", "0", "-", "-"),)
