"""Percentiles, movement and slopes, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from jbn import inspection

SHAPE = (6, 4, 5, 3)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6, "float64": 1e-13}


def samples(shape=SHAPE, dtype="float32", mean=1.0, sd=2.0, seed=0):
    x = np.random.RandomState(seed).normal(mean, sd, shape)
    return np.asarray(x, jnp.dtype(dtype))


def per_feature(x, axis):
    """Returns (n, features...) in NumPy float64."""
    kept = sorted(a % x.ndim for a in np.atleast_1d(axis).astype(int))
    x = np.moveaxis(np.float64(x), kept, range(x.ndim - len(kept), x.ndim))
    return x.reshape(-1, *x.shape[x.ndim - len(kept) :])


def sigmoid_slope(x):
    return np.exp(-x) / (1 + np.exp(-x)) ** 2


def moved(a, b):
    return np.sqrt(np.mean((np.sort(a, 0) - np.sort(b, 0)) ** 2, 0)) / np.std(a, 0)


MEASURES = {
    "percentiles": (
        lambda axis: lambda x, _: inspection.percentiles(x, (0, 15, 50, 99.5), axis=axis),
        lambda x, _: np.percentile(x, (0, 15, 50, 99.5), axis=0),
    ),
    "movement": (lambda axis: lambda x, y: inspection.movement(x, y, axis=axis), moved),
    "mean_slope": (
        lambda axis: lambda x, _: inspection.mean_slope(jax.nn.sigmoid, x, axis=axis),
        lambda x, _: np.mean(sigmoid_slope(x), 0),
    ),
}


@pytest.mark.parametrize(
    "dtype, axis",
    [
        ("float32", (3, 1)),
        *(pytest.param("float32", axis, marks=pytest.mark.slow) for axis in (-1, 1, ())),
        *(pytest.param(dtype, -1, marks=pytest.mark.slow) for dtype in ("bfloat16", "float64")),
    ],
)
@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_float64_for_any_axis_and_dtype(name, dtype, axis):
    measure, expected = MEASURES[name]
    with jax.enable_x64(dtype == "float64"):
        # One sample is already its own distribution, without any spread: so movement needs another axis.
        axis = (0, 1) if (name, axis) == ("movement", ()) else axis
        x, y = samples(dtype=dtype), samples(dtype=dtype, mean=3.0, seed=1)
        actual = jax.jit(measure(axis))(x, y)
        wanted = expected(per_feature(x, axis), per_feature(y, axis))
        assert_allclose(actual, wanted, rtol=TOLERANCE[dtype], atol=1e-6)
        assert actual.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
def test_measures_in_a_vmap_are_those_of_each_member(name):
    measure, expected = MEASURES[name]
    x, y = (np.stack([leaf, -leaf]) for leaf in (samples(), samples(mean=3.0, seed=1)))
    actual = jax.jit(jax.vmap(measure((3, 1))))(x, y)
    for i in range(2):
        wanted = expected(per_feature(x[i], (3, 1)), per_feature(y[i], (3, 1)))
        assert_allclose(actual[i], wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_nan_in_one_feature_does_not_spoil_the_others(name):
    measure, _ = MEASURES[name]
    x, y = np.array(samples()), samples(seed=1)
    measure = jax.jit(measure(-1))
    clean = np.asarray(measure(x, y))
    x[2, 1, 0, 1] = np.nan
    spoilt = np.asarray(measure(x, y))
    assert np.isnan(spoilt[..., 1]).all()
    assert_array_equal(spoilt[..., [0, 2]], clean[..., [0, 2]])


def test_empty_sizes_and_scalars_give_arrays_of_the_right_shape():
    for shape, axis, features in ((0, 3), -1, (3,)), ((4, 0), -1, (0,)), ((0,), -1, (0,)), ((), (), ()):

        def measures(x, axis=axis):
            few = inspection.percentiles(x, axis=axis), inspection.percentiles(x, (), axis=axis)
            return *few, inspection.movement(x, x, axis=axis), inspection.mean_slope(jnp.tanh, x, axis=axis)

        # Compiled, since an empty maximum may show only then.
        shapes = [result.shape for result in jax.jit(measures)(np.ones(shape, np.float32))]
        assert shapes == [(3, *features), (0, *features), features, features]


def test_of_no_samples_there_is_no_percentile_and_no_slope_and_nothing_moves():
    measures = lambda x: (
        inspection.percentiles(x),
        inspection.mean_slope(jnp.tanh, x),
        inspection.movement(x, x),
    )
    percentiles, slope, moved = jax.jit(measures)(np.ones((0, 3), np.float32))
    assert np.isnan(percentiles).all() and np.isnan(slope).all()
    assert_array_equal(moved, 0)


def test_percentages_may_be_traced_and_an_infinite_sample_is_one_tail():
    x = np.float32([[1], [2], [3], [4], [np.inf]])
    actual = jax.jit(lambda x, p: inspection.percentiles(x, p))(x, np.float32([0, 50, 90]))
    assert_array_equal(actual, [[1], [3], [np.inf]])


# The algebra of movement.

movement = jax.jit(inspection.movement)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.floats(-50, 50, width=32), st.floats(0.125, 8, width=32), st.floats(-1e3, 1e3))
def test_movement_of_a_shift_and_of_a_change_of_spread(seed, shift, spread, mean):
    x = samples((20, 3), mean=mean, sd=1.0, seed=seed)
    wide = np.float64(x)
    sd, step = np.std(wide, 0), np.spacing(np.float32(1100))
    assert_allclose(movement(x, x + shift), np.abs(shift) / sd, rtol=1e-4, atol=4 * step)
    spread_out = np.float32(np.mean(wide, 0) + spread * (wide - np.mean(wide, 0)))
    assert_allclose(movement(x, spread_out), np.abs(spread - 1), rtol=1e-4, atol=8 * step)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.sampled_from([1e-30, 1e-3, 1e3, 1e30]))
def test_movement_depends_neither_on_the_order_of_samples_nor_on_the_unit(seed, unit):
    rng = np.random.RandomState(seed)
    x, y = samples((9, 2), seed=seed), samples((9, 2), mean=0.0, seed=seed + 1)
    expected = movement(x, y)
    shuffled = movement(x[rng.permutation(9)], y[rng.permutation(9)])
    assert_allclose(shuffled, expected, rtol=1e-5)
    assert_allclose(movement(x * unit, y * unit), expected, rtol=1e-5)
    assert_array_equal(movement(x, x[rng.permutation(9)]), 0)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999))
def test_movement_times_standard_deviation_is_a_distance(seed):
    a, b, c = (samples((7, 2), mean=i, sd=1.0 + i, seed=seed + i) for i in range(3))

    def distance(p, q):
        return movement(p, q) * np.std(p, 0)

    assert_allclose(distance(a, b), distance(b, a), rtol=1e-5)
    assert np.all(distance(a, c) <= (distance(a, b) + distance(b, c)) * (1 + 1e-5))


def test_a_constant_feature_has_moved_not_at_all_or_infinitely_far():
    x = np.full((7, 2), 1234.5, np.float32)
    assert_array_equal(movement(x, x + np.float32([0, 1])), [0, np.inf])


def test_a_large_mean_costs_movement_no_accuracy():
    x = np.float32(1e6 + np.arange(5000)[:, None] % 16 / 8)
    assert_allclose(movement(x, x + np.float32(0.5)), 0.5 / np.std(np.float64(x), 0), rtol=1e-5)


def test_slope_is_a_quarter_at_most_for_a_sigmoid_and_the_active_fraction_for_relu():
    x = samples((1000, 2), mean=0.0)
    sigmoid = jax.jit(lambda x: inspection.mean_slope(jax.nn.sigmoid, x))
    assert np.all(sigmoid(x) < 0.25)
    assert_allclose(sigmoid(0 * x), 0.25)
    assert_allclose(sigmoid(50 * np.sign(x)), 0, atol=1e-6)
    relu = jax.jit(lambda x: inspection.mean_slope(jax.nn.relu, x))
    assert_allclose(relu(x), np.mean(x > 0, 0), rtol=1e-6)


def test_an_activation_with_parameters_per_feature_sees_the_layout_of_x():
    slopes = np.float32([0.1, 0.2, 0.3])
    leaky = lambda x: jnp.where(x > 0, x, slopes[None, :, None] * x)
    slope = jax.jit(lambda x: inspection.mean_slope(leaky, x, axis=1))
    assert_allclose(slope(-np.ones((2, 3, 4), np.float32)), slopes, rtol=1e-6)


def test_bad_input_is_named():
    x = np.ones((4, 3), np.float32)
    for error, message, call, *args in (
        (TypeError, r"x has dtype int32; .* a real.*as", inspection.percentiles, x.astype(np.int32)),
        (TypeError, "x has dtype complex64", inspection.percentiles, x.astype(np.complex64)),
        (ValueError, r"percentages has shape \(\); .* one axis", inspection.percentiles, x, 50),
        (ValueError, r"percentages=\[0, 101\]; .* each", inspection.percentiles, x, (0, 101)),
        (ValueError, r"percentages=\[nan\]; .* each", inspection.percentiles, x, (np.nan,)),
        (ValueError, r"after has shape \(3, 3\); .* \(4, 3\)", inspection.movement, x, x[:3]),
        (TypeError, "after has dtype int32", inspection.movement, x, x.astype(np.int32)),
        (ValueError, r"activation\(x\) has shape \(\); .*elementwise", inspection.mean_slope, jnp.sum, x),
        (TypeError, r"activation\(x\) has dtype bool", inspection.mean_slope, lambda x: x > 0, x),
    ):
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda call=call, args=args: call(*args))
    for error, message, call in (
        (ValueError, "axis=2 is out of range", lambda: inspection.percentiles(x, axis=2)),
        (ValueError, "names a feature axis twice", lambda: inspection.movement(x, x, axis=(0, 0))),
    ):
        with pytest.raises(error, match=message):
            call()
