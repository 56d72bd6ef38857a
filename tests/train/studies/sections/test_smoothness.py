import math

import pytest
from series_of import REFUSED, inspected, line, points, series, sketch

from train.studies.sections import smoothness


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    return sketch(monkeypatch)


def job(name, *constants, rate=0.1, norm="batch", **changes):
    lines = [line(10 * at, smoothness=value, **changes) for at, value in enumerate(constants)]
    return inspected(name, *lines, rate=rate, norm=norm)


PLAIN = job("plain", 1, 3, 9, norm="none")  # median 3


def test_without_inspections_there_is_nothing_to_say():
    assert smoothness.section([series("plain", {10: 0.9}), series("bn", REFUSED)]) is None


@pytest.mark.parametrize(
    "changes, told",
    [
        # plain's: 2.0 - 1.6 = 0.4, 3 and 0.5.
        (
            dict(losses=[2.0, 1.9, 1.95, 2.0], smoothness=0.3, gradient_shift=[0.0, 0.2, 0.3]),
            "the range of the loss was 4.0 times smaller, the smoothness constant was 10 times smaller, the "
            "shift of the gradient was 2.0 times smaller",
        ),
        (
            dict(losses=[1.0, 0.0, 1.0, 2.0], smoothness=30.0, gradient_shift=[9.0, 1.0, 1.0]),
            "the range of the loss was 5.0 times larger, the smoothness constant was 10 times larger, the "
            "shift of the gradient was 2.0 times larger",
        ),
        (
            {},
            "the range of the loss was the same within 5 %, the smoothness constant was the same within 5 %, "
            "the shift of the gradient was the same within 5 %",
        ),
        (
            dict(losses=[2.0] * 4, smoothness=0.0, gradient_shift=[0.0, 0.0, 0.0]),
            "the range of the loss was 0 beside 0.400, the smoothness constant was 0 beside "
            "3.00, the shift of the gradient was 0 beside 0.500",
        ),
        (dict(loss=None, smoothness=None), "the shift of the gradient was the same within 5 %"),
        # A network without hidden layers has no layers below that could shift its gradient.
        (dict(loss=None, gradient_shift=[0.0]), "the smoothness constant was the same within 5 %"),
    ],
)
def test_job_is_told_beside_the_baseline_whether_it_is_smoother_or_not(changes, told):
    bn = inspected("bn", line(0, **changes), line(10, **changes), norm="batch", rate=0.5)
    assert smoothness.section([PLAIN, bn]).sentences[1:] == (f"In bn, beside plain, {told}.",)


@pytest.mark.parametrize(
    "others, verdict",
    [
        ([job("bn", 1, 1)], "bn had the smoother loss, as Santurkar et al. found."),
        ([job("bn", 9, 9)], "bn did not have the smoother loss that Santurkar et al. found."),
        (
            [job("bn", 2.9, 2.9)],
            "bn did not have the smoother loss that Santurkar et al. found.",
        ),  # within 5 %
        ([job("bn", 0)], "bn had the smoother loss, as Santurkar et al. found."),
        (
            [job("a", 1), job("b", 4), job("c", 2, norm="ghost"), job("d", 1, norm="flax")],
            "a, c and d had the smoother loss, as Santurkar et al. found; b did not have the smoother loss "
            "that Santurkar et al. found.",
        ),
        ([job("a", 1), job("x5", 1, rate=0.5)], "a had the smoother loss, as Santurkar et al. found."),
        # Nothing to be said of other learning rates, of no normalization or another one, of nothing measured.
        ([job("x5", 1, rate=0.5)], None),
        ([job("lecun", 1, norm="none"), job("layer", 1, norm="layer"), job("group", 1, norm="group")], None),
        ([job("bn", None, None)], None),
        ([], None),
    ],
)
def test_verdict_is_on_batch_norm_at_the_learning_rate_of_the_baseline(others, verdict):
    told = smoothness.section([PLAIN, *others]).sentences[1:]
    found = [sentence for sentence in told if "Santurkar" in sentence]
    assert found == ([f"At the learning rate of plain, {verdict}"] if verdict else [])
    assert told[len(told) - len(found) :] == tuple(found)


def test_there_is_no_verdict_where_the_baseline_is_normalized_itself():
    assert "Santurkar" not in str(smoothness.section([job("bn", 9), job("ghost", 1)]).sentences)


def test_table_has_the_median_of_each_measure():
    lines = [
        line(
            step,
            loss=1.0,
            losses=[1.0 - size, 1.0, 1.0 + size, 1.0],
            gradient_changes=[0.0, size, 0.0, 0.0],
            smoothness=10 * size,
            gradient_shift=[99.0, size, 3 * size],
            gradient_cosine=[-1.0, size, 0.0],
        )
        for step, size in ((0, 0.1), (10, 0.7), (20, 0.5))
    ]
    section = smoothness.section([inspected("bn", *lines)])
    assert section.table.header == ("median", *smoothness.MEASURES)
    assert section.table.rows == (("bn", "1.00", "0.500", "5.00", "1.00", "0.250"),)


def test_each_measure_has_its_picture_over_steps(drawn):
    section = smoothness.section([PLAIN, job("bn", 1, 2)])
    assert len(section.pictures) == len(drawn) == 5
    axes = drawn["smoothness constant over steps"]
    assert points(axes) == {"plain": [(0, 1), (10, 3), (20, 9)], "bn": [(0, 1), (10, 2)]}
    assert [axes.get_yscale() for axes in drawn.values()] == ["log"] * 4 + ["linear"]
    assert (
        [axes.get_ylabel() for axes in drawn.values()]
        == list(smoothness.MEASURES)
        == list(smoothness.CAPTIONS)
    )


@pytest.mark.parametrize(
    "nothing, gaps",
    [
        (dict(loss=None), ["range of the loss"]),
        (
            dict(losses=[1.0, None, 2.0, 3.0], gradient_changes=[None] * 4),
            ["range of the loss", "change of the gradient"],
        ),
        (
            dict(smoothness=None, gradient_shift=[0, None, 1], gradient_cosine=[None] * 3),
            ["smoothness constant", "shift of the gradient", "cosine of the shift"],
        ),
    ],
)
def test_what_is_no_number_is_a_gap_and_not_in_the_median(nothing, gaps, drawn):
    section = smoothness.section([inspected("bn", line(0), line(10, **nothing), line(20))])
    assert section.table.rows == (("bn", "0.400", "0.400", "3.00", "0.500", "0.900"),)
    shown = {axes.get_ylabel(): [y for _, y in points(axes)["bn"]] for axes in drawn.values()}
    assert [measure for measure, values in shown.items() if math.isnan(values[1])] == gaps
    assert not any(math.isnan(values[0] + values[2]) for values in shown.values())


def test_job_that_is_no_number_all_along_is_in_the_table_but_in_no_sentence():
    nothing = dict(
        loss=None, smoothness=None, gradient_shift=[None], gradient_cosine=[None], gradient_changes=[None]
    )
    section = smoothness.section([PLAIN, inspected("nan", line(0, **nothing), norm="batch")])
    assert section.table.rows[1] == ("nan", *"-----") and "nan" not in str(section.sentences)
    section = smoothness.section([inspected("nan", line(0, **nothing)), job("bn", 1)])
    assert len(section.sentences) == 1


def test_networks_may_have_different_numbers_of_layers():
    deep = inspected("deep", line(0, layers=7), norm="batch")
    assert smoothness.section([PLAIN, deep]).table.rows[1][4:] == ("0.500", "0.900")
