"""What the sections say of measurements inside networks: of lines of inspection.jsonl, from plain numbers."""

import numpy as np
import pytest

from tests.helpers.groups import NOTHING, inspected, line, points, undrawn
from train.studies.sections import covariate_shift, evaluation_gap, linear_regime, smoothness
from train.training.inspection import EDGES


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    return undrawn(monkeypatch)


def job(name, *lines, **options):
    """Make a job from changes to lines of inspection.jsonl, at steps 0, 10, ..."""
    return inspected(name, *(line(10 * at, **changes) for at, changes in enumerate(lines)), **options)


KINDS = ("batch", "running")
UNMEASURED = job("unmeasured", NOTHING, NOTHING, NOTHING, norm="batch")


def test_movement_of_a_layer_is_compared_with_the_baseline(drawn):
    moves = lambda name, *values: job(name, {}, *({"movement": [0.3, value]} for value in values))
    plain, deep = moves("plain", 0.2, 0.4), job("deep", {"layers": 3}, {"movement": [0.01, 2, 900]})
    section = covariate_shift.section([plain, moves("bn", 0.1, 0.1), moves("same", 0.31), UNMEASURED, deep])
    assert section.sentences == (
        "In a step the inputs of a typical unit of the last hidden layer moved, in standard deviations, "
        "0.300 in plain, and 0.100 in bn (3.0 times less), 0.310 in same (the same within 5 %) and 900 in "
        "deep (3,000 times more).",
    )
    assert section.header == ("movement in a step, sd", "layer 1", "layer 2", "layer 3", "drift, widths")
    assert section.rows[0] == ("plain", "0.300", "0.300", "", "0")
    assert section.rows[3:] == (("unmeasured", "-", "-", "", "-"), ("deep", "0.0100", "2.00", "900", "0"))
    assert points(drawn["Movement of a layer's inputs over steps"])["bn"] == [[0, 0.1], [10, 0.1], [20, 0.1]]
    assert covariate_shift.section([UNMEASURED, plain]).sentences == ()


def test_drift_is_how_far_the_median_of_a_typical_unit_goes_in_widths(drawn):
    first, last = [[-1.0, 0.0, 1.0]] * 3, [[-1.0, 0.0, 1.0], [0.0, 1.0, 4.0], [-1.0, 60.0, 61.0]]
    section = covariate_shift.section([job("bn", {"units": first}, NOTHING, {"units": last})])
    # Of the second unit: 1 - 0, over the median of 2 and 4. The third one's is far above, the first one's 0.
    assert section.rows[0][-1] == "0.333"
    (curve,) = points(drawn["Percentiles of a unit's inputs over steps"]).values()
    np.testing.assert_array_equal(curve, [[0, 0], [10, np.nan], [20, 0]])
    back = [{"units": [[at - 1, at, at + 1]] * 3} for at in (0.0, 3.0, 1.0)]
    assert covariate_shift.section([job("bn", *back)]).rows[0][-1] == "1.50"


def test_share_of_inputs_and_of_gradients_is_that_of_the_last_hidden_layer_first_and_last(drawn):
    shares = np.zeros(len(EDGES) - 1)
    shares[np.searchsorted(EDGES, [-1.25, -1, -0.25, 0.75, 1])] = [0.5, 0.2, 0.05, 0.15, 0.1]
    last = {"histograms": [[1 / 64] * 64, shares.tolist()], "slope": [0.1, 0.05], "identity_error": 3.14e-6}
    plain, steep = job("plain", {"inside": 0.9}, {}, last, activation="sigmoid"), {"slope": [0, 0.25]}
    others = [job(name, steep, steep, activation=name) for name in ("tanh", "relu")]
    section = linear_regime.section([plain, *others, UNMEASURED])
    assert section.rows[0] == ("plain", "90%", "40%", "80%", "20%")
    assert section.rows[1:] == (
        *((name, *("50%", "50%", "25%", "25%")) for name in ("tanh", "relu")),
        ("unmeasured", *"----"),
    )
    assert linear_regime.section([plain, *others]).sentences == (
        "At the end the activations of the last hidden layer passed on, on average, this share of the "
        "gradient that they pass where they are steepest: 20% in plain, 25% in tanh and 25% in relu.",
        "Batch norm can represent the identity: with scale = sqrt(variance + epsilon) and bias = mean it "
        "changed none of these inputs by more than 3.1e-06 of the largest.",
    )
    assert len(section.sentences) == 1 and linear_regime.section([UNMEASURED]).sentences == ()
    axes = drawn["Inputs of the activations at the end"]
    linear_regime._histograms(axes, [plain], -1)
    np.testing.assert_allclose(axes.patches[-1].get_data().values, shares / 0.5)
    np.testing.assert_allclose(np.array(points(axes)["sigmoid"])[:, 1], 1 / (1 + np.exp(-EDGES)), atol=1e-6)


def test_smoothness_is_compared_at_equal_training_loss(drawn):
    along = lambda name, *pairs: job(name, *({"loss": loss, "smoothness": value} for loss, value in pairs))
    plain = along("plain", (2.0, 1.0), (1.0, 3.0), (0.5, 8.0))
    # bn is at 0.5 between its measurements at 0.9 and 0.1, at which its smoothness constants were 1 and 3.
    bn, slow = (
        along("bn", (2.2, 5.0), (0.9, 1.0), (0.1, 3.0), (0.01, 99.0)),
        along("slow", (2.5, 1.0), (1.5, 20.0)),
    )
    late, idle = along("late", (0.4, 1.0), (0.3, 1.0)), along("idle", (2.3, 1.0), (2.4, 1.0))
    assert smoothness.section([plain, bn, slow, late, idle, UNMEASURED]).sentences == (
        "At equal training loss, the lowest that both reached, the smoothness constant was, compared with "
        "plain, 4.0 times smaller in bn (at a loss of 0.500) and 10 times larger in slow (at a loss of "
        "1.50).",
    )
    for groups in ([plain], [plain, late, UNMEASURED], [UNMEASURED, plain]):
        assert smoothness.section(groups).sentences == ()
    axes = drawn["smoothness constant over the training loss"]
    assert points(axes)["plain"] == [[0.5, 8], [1, 3], [2, 1]] and axes.xaxis_inverted()
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_table_of_smoothness_has_medians_and_says_that_losses_are_not_equal():
    lines = [
        {
            "loss": 1.0,
            "losses": [1 - n, 1.0, 1 + n, 1.0],
            "gradient_changes": [0.0, n, 0.0, 0.0],
            "smoothness": 10 * n,
        }
        | {"gradient_shift": [99.0, n, 3 * n], "gradient_cosine": [-1.0, n, 0.0]}
        for n in (0.1, 0.7, 0.5)
    ]
    one_layer = job(
        "one layer", *[{"gradient_shift": [1]}] * 2
    )  # none below, whose step would shift its gradient
    section = smoothness.section([job("bn", *lines, NOTHING), UNMEASURED, one_layer])
    assert section.header == ("median over training, not at equal loss", *smoothness.MEASURES)
    assert section.rows[:2] == (("bn", "1.00", "0.500", "5.00", "1.00", "0.250"), ("unmeasured", *"-----"))
    assert section.rows[2][4] == "-"


def test_gap_between_statistics_is_the_largest_and_the_last_of_norms_over_the_batch(drawn):
    def gaps(name, *values, norm="batch"):
        return job(name, *({"own": 0.5 + gap, "running": 0.5} for gap in (0.4, *values)), norm=norm)

    section = evaluation_gap.section([gaps("plain", 0.3, norm="none"), gaps("bn", 0.02, -0.25, 0.125)])
    said = (
        "The largest gap was -25 points of accuracy, in bn after 20 steps; at the end it was 12 points there."
    )
    assert section.sentences == (said,) and section.rows == (("bn", "2.0", "-25", "12", "0.400", "0.300"),)
    assert points(drawn[section.charts[0].alt]) == {"bn": [[10, pytest.approx(2)], [20, -25], [30, 12.5]]}
    section = evaluation_gap.section([gaps("low", -0.3, -0.2), gaps("high", 0.25, 0.001)])
    assert (
        "was -30 points of accuracy, in low after 10 steps; at the end it was -20 points there, and below "
        in (section.sentences[0])
    )
    assert section.sentences[0].endswith("one point in 1 of 2 jobs.")
    norms = enumerate(["batch", "ghost", "flax"] * 4)
    section = evaluation_gap.section([gaps(f"{n}", n / 100, 0.001 * n, norm=norm) for n, norm in norms])
    assert "at the end it was 1.1 points there, and below one point in 10 of 12 jobs." in section.sentences[0]
    assert "Of 12 jobs the 8 with the largest gaps." in section.charts[0].caption and len(section.rows) == 12
    assert list(points(drawn[section.charts[0].alt])) == [f"{n}" for n in range(4, 12)]
    assert evaluation_gap.section([gaps("a", 0.4, norm=norm) for norm in ("none", "layer", "group")]) is None


def test_gap_of_numbers_is_of_r2_where_there_is_one():
    def numbers(name, *pairs):
        lines = (
            {f"{kind}_statistics": {"loss": 1.0, "r2": r2} for kind, r2 in zip(KINDS, pair)} for pair in pairs
        )
        return job(name, *lines, norm="batch", loss="squared_error", classes=0)

    section = evaluation_gap.section([numbers("bn", (0, 0), (0.5, 0.25), (None, None), (0.75, 0.75))])
    assert section.sentences == (
        "The largest gap was 25 points of R^2, in bn after 10 steps; at the end it was 0 points there.",
    )
    assert section.header[0] == "gap, points of R^2" and section.charts[0].alt.startswith("R^2 with batch")
    assert evaluation_gap.section([numbers("bn", (None, 0.5), (None, 0.5))]) is None
