import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn import inspection

SHAPE = (6, 4, 5, 3)
AXES = (-1, 1, (3, 1), ())
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6, "float64": 1e-13}
TRANSFORMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda *xs: jax.jit(jax.vmap(f))(*(np.stack([x, -x]) for x in xs))[0],
}


def samples(shape=SHAPE, dtype="float32", mean=1.0, sd=2.0, seed=0):
    return jnp.asarray(np.random.RandomState(seed).normal(mean, sd, shape), dtype)


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
    "dtype, axis, transform",
    [
        *(("float32", axis, "jit") for axis in AXES),
        *((dtype, -1, "jit") for dtype in ("bfloat16", "float64")),
        *(("float32", (3, 1), transform) for transform in ("plain", "vmap")),
    ],
)
@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_float64_for_any_axis_dtype_and_transform(name, dtype, axis, transform):
    measure, expected = MEASURES[name]
    with jax.enable_x64(dtype == "float64"):
        # One sample is already its own distribution, without any spread: so movement needs another axis.
        axis = (0, 1) if (name, axis) == ("movement", ()) else axis
        x, y = samples(dtype=dtype), samples(dtype=dtype, mean=3.0, seed=1)
        actual = TRANSFORMS[transform](measure(axis))(x, y)
        assert_allclose(
            actual, expected(per_feature(x, axis), per_feature(y, axis)), rtol=TOLERANCE[dtype], atol=1e-6
        )
        assert actual.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)


@pytest.mark.parametrize("name", MEASURES)
def test_nan_in_one_feature_does_not_spoil_the_others(name):
    measure, _ = MEASURES[name]
    x, y = samples(), samples(seed=1)
    measure = jax.jit(measure(-1))
    clean, spoilt = measure(x, y), measure(x.at[2, 1, 0, 1].set(jnp.nan), y)
    assert np.isnan(spoilt[..., 1]).all()
    assert_array_equal(np.asarray(spoilt)[..., [0, 2]], np.asarray(clean)[..., [0, 2]])


@pytest.mark.parametrize(
    "shape, axis, features", [((0, 3), -1, (3,)), ((4, 0), -1, (0,)), ((0,), -1, (0,)), ((), (), ())]
)
def test_empty_sizes_and_scalars_give_arrays_of_the_right_shape(shape, axis, features):
    x = jnp.ones(shape)
    assert inspection.percentiles(x, axis=axis).shape == (3, *features)
    assert inspection.percentiles(x, (), axis=axis).shape == (0, *features)
    assert inspection.movement(x, x, axis=axis).shape == features
    assert inspection.mean_slope(jnp.tanh, x, axis=axis).shape == features


def test_of_no_samples_there_is_no_percentile_and_no_slope_and_nothing_moves():
    x = jnp.ones((0, 3))
    assert np.isnan(inspection.percentiles(x)).all()
    assert np.isnan(inspection.mean_slope(jnp.tanh, x)).all()
    assert_array_equal(inspection.movement(x, x), 0)


def test_percentages_may_be_traced_and_an_infinite_sample_is_one_tail():
    x = jnp.array([[1.0], [2.0], [3.0], [4.0], [jnp.inf]])
    actual = jax.jit(lambda x, p: inspection.percentiles(x, p))(x, jnp.array([0.0, 50.0, 90.0]))
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
    spread_out = jnp.asarray(np.mean(wide, 0) + spread * (wide - np.mean(wide, 0)), jnp.float32)
    assert_allclose(movement(x, spread_out), np.abs(spread - 1), rtol=1e-4, atol=8 * step)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.sampled_from([1e-30, 1e-3, 1e3, 1e30]))
def test_movement_depends_neither_on_the_order_of_samples_nor_on_the_unit(seed, unit):
    rng = np.random.RandomState(seed)
    x, y = samples((9, 2), seed=seed), samples((9, 2), mean=0.0, seed=seed + 1)
    expected = movement(x, y)
    shuffled = movement(np.asarray(x)[rng.permutation(9)], np.asarray(y)[rng.permutation(9)])
    assert_allclose(shuffled, expected, rtol=1e-5)
    assert_allclose(movement(x * unit, y * unit), expected, rtol=1e-5)
    assert_array_equal(movement(x, np.asarray(x)[rng.permutation(9)]), 0)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999))
def test_movement_times_standard_deviation_is_a_distance(seed):
    a, b, c = (samples((7, 2), mean=i, sd=1.0 + i, seed=seed + i) for i in range(3))

    def distance(p, q):
        return movement(p, q) * np.std(p, 0)

    assert_allclose(distance(a, b), distance(b, a), rtol=1e-5)
    assert np.all(distance(a, c) <= (distance(a, b) + distance(b, c)) * (1 + 1e-5))


def test_a_constant_feature_has_moved_not_at_all_or_infinitely_far():
    x = jnp.full((7, 2), 1234.5)
    assert_array_equal(movement(x, x + jnp.array([[0.0, 1.0]])), [0, np.inf])


def test_a_large_mean_costs_movement_no_accuracy():
    x = jnp.asarray(np.float32(1e6) + np.arange(5000)[:, None] % 16 / 8, jnp.float32)
    assert_allclose(movement(x, x + 0.5), 0.5 / np.std(np.float64(x), 0), rtol=1e-5)


def test_slope_is_a_quarter_at_most_for_a_sigmoid_and_the_active_fraction_for_relu():
    x = samples((1000, 2), mean=0.0)
    assert np.all(inspection.mean_slope(jax.nn.sigmoid, x) < 0.25)
    assert_allclose(inspection.mean_slope(jax.nn.sigmoid, jnp.zeros((3, 1))), 0.25)
    assert_allclose(inspection.mean_slope(jax.nn.sigmoid, 50 * jnp.sign(x)), 0, atol=1e-6)
    assert_allclose(inspection.mean_slope(jax.nn.relu, x), np.mean(np.asarray(x) > 0, 0), rtol=1e-6)


def test_an_activation_with_parameters_per_feature_sees_the_layout_of_x():
    slopes = jnp.array([0.1, 0.2, 0.3])
    x = -jnp.ones((2, 3, 4))
    leaky = lambda x: jnp.where(x > 0, x, slopes[None, :, None] * x)
    assert_allclose(inspection.mean_slope(leaky, x, axis=1), slopes, rtol=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("axis, dtype, epsilon", [(-1, "float32", 1e-5), ((3, 1), "float32", 0.5)])
def test_with_identity_params_normalization_gives_x_back(transform, axis, dtype, epsilon):
    def there_and_back(x):
        batch = jbn.moments(x, axis=axis)
        params = inspection.identity_params(batch, epsilon=epsilon)
        return jbn.normalize(x, batch, params, axis=axis, epsilon=epsilon)

    x = samples(mean=10.0).at[..., 0].set(7.0)
    assert_allclose(TRANSFORMS[transform](there_and_back)(x), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean, var", [("bfloat16", "bfloat16"), ("complex64", "float32"), (None, None)])
def test_identity_params_are_float32_at_least_with_a_real_scale(mean, var):
    as_given = lambda value, dtype: np.full(2, value) if dtype is None else jnp.full(2, value, dtype)
    moments = jbn.Moments(as_given(2, mean), as_given(3, var), 5.0)
    scale, bias = inspection.identity_params(moments, epsilon=1.0)
    assert (scale.dtype, bias.dtype) == (jnp.float32, jnp.complex64 if mean == "complex64" else jnp.float32)
    assert_array_equal(scale, 2)
    assert_array_equal(bias, 2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: inspection.percentiles(x.astype(int)), TypeError, r"x has dtype int32; wanted a real.*as"),
        (lambda x: inspection.percentiles(x.astype(jnp.complex64)), TypeError, "x has dtype complex64"),
        (lambda x: inspection.percentiles(x, axis=2), ValueError, "axis=2 is out of range"),
        (lambda x: inspection.percentiles(x, 50), ValueError, r"percentages has shape \(\); wanted one axis"),
        (lambda x: inspection.percentiles(x, (0, 101)), ValueError, r"percentages=\[0, 101\]; wanted each"),
        (lambda x: inspection.percentiles(x, (np.nan,)), ValueError, r"percentages=\[nan\]; wanted each"),
        (
            lambda x: inspection.movement(x, x[:3]),
            ValueError,
            r"after has shape \(3, 3\); wanted that of before, \(4, 3\)",
        ),
        (lambda x: inspection.movement(x, x.astype(int)), TypeError, "after has dtype int32"),
        (lambda x: inspection.movement(x, x, axis=(0, 0)), ValueError, "names a feature axis twice"),
        (
            lambda x: inspection.mean_slope(jnp.sum, x),
            ValueError,
            r"activation\(x\) has shape \(\); wanted that of x, \(4, 3\): elementwise",
        ),
        (lambda x: inspection.mean_slope(lambda x: x > 0, x), TypeError, r"activation\(x\) has dtype bool"),
        (
            lambda x: inspection.identity_params((x, x, x)),
            TypeError,
            "moments is a tuple; wanted jbn.Moments",
        ),
        (
            lambda x: inspection.identity_params(jbn.moments(x), epsilon=0),
            ValueError,
            "epsilon=0.0; expected a number > 0",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((4, 3)))
