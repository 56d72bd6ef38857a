import numpy as np
import pytest
from series_of import REFUSED, inspected, line, series, sketch

from train.studies.sections import linear_regime
from train.training.inspection import EDGES


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    return sketch(monkeypatch)


def job(name, first, last, **model):
    return inspected(name, line(0, **first), line(10, inside=0.1), line(20, **last), **model)


PLAIN = job(
    "plain",
    {"inside": 0.9, "slope": [0.1, 0.2]},
    {"inside": 0.25, "slope": [0.1, 0.05]},
    activation="sigmoid",
)
BN = job("bn", {"inside": 0.68}, {"inside": 0.312}, norm="batch", activation="sigmoid")
ERROR = (
    "Batch norm can give back what it is given: with scale = sqrt(variance + epsilon) and bias = mean it "
    "changed none of these inputs by more than {} of the largest."
)


def test_without_inspections_there_is_nothing_to_say():
    assert linear_regime.section([series("plain", {10: 0.9}), series("bn", REFUSED)]) is None


def test_sentence_tells_what_share_lay_where_the_activation_is_steep_with_normalization():
    explained, share, passing, error = linear_regime.section([PLAIN, BN]).sentences
    assert passing == (
        "Of the gradient that passes an activation at its steepest, at the end 20% in plain and 80% in bn "
        "passed on average."
    )
    assert share == (
        "In bn 68% of these inputs lay between -1 and 1 while scale was 1 and bias 0, and 31% once "
        "both had learnt."
    )
    assert error == ERROR.format("1e-07") and "bn" not in explained


def test_share_is_that_of_the_last_hidden_layer_between_minus_1_and_1():
    histogram = np.zeros(len(EDGES) - 1)
    histogram[np.searchsorted(EDGES, [-1.25, -1, -0.25, 0.75, 1])] = [0.4, 0.2, 0.05, 0.15, 0.2]
    other = np.full(len(EDGES) - 1, 1 / (len(EDGES) - 1))
    lines = [line(step, histograms=[other.tolist(), histogram.tolist()]) for step in (0, 10)]
    section = linear_regime.section([inspected("bn", *lines, norm="batch")])
    assert section.table.rows[0][1:3] == ("40%", "40%")  # 0.2 + 0.05 + 0.15


def test_table_has_shares_and_what_passes_of_a_gradient_at_first_and_at_the_end():
    section = linear_regime.section([PLAIN, BN])
    assert section.table.rows == (
        ("plain", "90%", "25%", "80%", "20%"),  # of the steepest derivative, which is 1/4
        ("bn", "68%", "31%", "80%", "80%"),
    )


@pytest.mark.parametrize("activation, shown", [("sigmoid", "100%"), ("tanh", "25%"), ("relu", "25%")])
def test_any_activation_is_drawn_and_its_gradient_is_a_share_of_its_steepest(activation, shown, drawn):
    bn = inspected(
        "bn", line(0, slope=[0, 0.25]), line(9, slope=[0, 0.25]), norm="batch", activation=activation
    )
    section = linear_regime.section([bn])
    assert section.table.rows[0][3:] == (shown, shown)
    axes = drawn["Inputs of the activations of bn"]
    (curve,) = [each for each in axes.lines if each.get_label() == activation]
    x, y = curve.get_data()
    expected = {"sigmoid": (1 + np.tanh(x / 2)) / 2, "tanh": np.tanh(x), "relu": np.clip(x, 0, None)}
    np.testing.assert_allclose(y, expected[activation], atol=1e-12)
    low, high = axes.get_ylim()
    assert (x[0], x[-1]) == (-8, 8) and low < min(0, y.min()) and high > 1
    steepest = np.diff(y).max() / np.diff(x)[0]
    assert steepest == pytest.approx(linear_regime.STEEPEST[activation], rel=0.01)


def test_picture_has_the_last_hidden_layer_before_training_and_at_the_end(drawn):
    linear_regime.section([BN])
    axes = drawn["Inputs of the activations of bn"]
    outlines = {patch.get_label()[1:]: patch for patch in axes.patches if patch.get_label()[1:]}
    first, last = (outlines[name].get_data() for name in ("before training", "at the end"))
    assert (first.values[32], last.values[32]) == (1, pytest.approx(0.312 / 0.688))
    assert (first.values[-1], last.values[-1]) == (pytest.approx(0.32 / 0.68), 1)
    np.testing.assert_array_equal(first.edges, EDGES)


def test_error_is_the_largest_of_all_lines():
    lines = [line(0), line(10, identity_error=3.14e-6), line(20)]
    assert linear_regime.section([BN, inspected("a", *lines)]).sentences[-1] == ERROR.format("3.1e-06")


def test_one_error_that_is_no_number_silences_the_sentence():
    section = linear_regime.section([BN, inspected("a", line(0), line(10, identity_error=None))])
    assert not any("give back" in sentence for sentence in section.sentences)


def test_job_that_ended_before_its_first_evaluation_is_not_said_to_have_learnt():
    section = linear_regime.section([inspected("bn", line(0), norm="batch")])
    assert not any("In bn" in sentence for sentence in section.sentences)
    assert section.table.rows == (("bn", "50%", "50%", "20%", "20%"),)


def test_what_is_no_number_is_left_out(drawn):
    nothing = line(10, histograms=[[None] * 64] * 2, slope=[None] * 2)
    section = linear_regime.section([inspected("bn", line(0), nothing, norm="batch"), BN])
    assert section.table.rows[0] == ("bn", "50%", "-", "20%", "-")
    assert [sentence[:10] for sentence in section.sentences[1:]] == ["In bn 68% ", "Of the gra", "Batch norm"]
    assert "Inputs of the activations of bn" in drawn


def test_networks_of_any_depth_are_seen_at_their_last_hidden_layer():
    jobs = [inspected(f"{n}", line(0, layers=n, inside=n / 10), line(9, layers=n)) for n in (1, 2, 7)]
    rows = linear_regime.section(jobs).table.rows
    assert [row[:3] for row in rows] == [("1", "10%", "50%"), ("2", "20%", "50%"), ("7", "70%", "50%")]
