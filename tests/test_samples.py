"""Each way to measure moments, for whichever target it is, against float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from jbn._samples import Options, measure_on, measure_samples
from jbn._xla import Target, prevent_cse, unshared_on_cpu

REDUCED = (0, 1)
TARGETS = [Target(platform, sharded) for platform in ("cpu", "cuda", "tpu") for sharded in (False, True)]
FAST = Target("tpu", False)
RNG = np.random.RandomState(0)
STANDARD = RNG.normal(0, 1, (64, 48, 3))
INPUTS = {
    "mean 0": STANDARD,
    "mean 2.9 sd": STANDARD + 2.9,
    "mean 3.1 sd": STANDARD - 3.1,
    "mean 1e4 sd": STANDARD + 1e4,
    "squares that add up beyond float32": 1e14 * STANDARD + 1e18,
    "a sixteenth far from the others": np.where(np.arange(64)[:, None, None] < 4, 1e3, 0) + STANDARD,
    "the middle far from the others": np.where(abs(np.arange(64) - 32)[:, None, None] < 4, 1e3, 0) + STANDARD,
    "first columns far away": np.where(np.arange(48)[:, None] < 3, -1e3, 0) + STANDARD,
    "sorted": np.sort((STANDARD + 20).reshape(-1, 3), 0).reshape(STANDARD.shape),
    "constant": np.full(STANDARD.shape, 0.1),
    "zero": np.zeros(STANDARD.shape),
    "one axis constant": np.broadcast_to(STANDARD[:1] + 5, STANDARD.shape),
    "one mean of many sd": STANDARD + [0, 100, 0],
}
EPS = np.finfo(np.float32).eps


@partial(jax.jit, static_argnums=(0, 1))
def on(target, options, *arrays):
    return measure_on(target, options, *arrays)


def measured(target, x, weights=None, *, shift=None, exact=True, epsilon=0.0):
    arrays = [x]
    if weights is not None:
        count = np.broadcast_to(weights, (*x.shape[:2], 1)).sum(REDUCED)
        arrays += [weights, jnp.asarray(count, jnp.float32)]
    if shift is not None:
        arrays.append(jnp.asarray(np.broadcast_to(shift, 3), jnp.float32))
    mean, rest, var = on(target, Options(weights is not None, REDUCED, exact, epsilon), *arrays)
    return np.float64(mean) + np.float64(rest), var


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", TARGETS)
def test_moments_are_those_of_float64(target, dtype):
    # A CPU adds up one by one what a GPU adds up in a tree.
    in_order = 64 if target == Target("cuda", False) else 1
    for case, values in INPUTS.items():
        x = jnp.asarray(values, dtype)
        expected_mean, expected_var, _ = reference.moments(x)
        for shift in None, 0, expected_mean, 1e8:
            mean, var = measured(target, x, shift=shift)
            # A pilot's rounding counts 48 times at most: that is one over its share.
            atol = (EPS * np.abs(expected_mean).max()) ** 2
            message = f"{case}, shift {shift}"
            assert_allclose(var, expected_var, rtol=64 * in_order * EPS, atol=atol, err_msg=message)
            near = 4 * EPS * (in_order * np.sqrt(expected_var) + np.abs(expected_mean))
            assert np.all(np.abs(mean - expected_mean) <= near), message


def test_moments_about_the_nearer_of_zero_and_the_shift_are_within_the_stated_bound():
    """(error of the variance / var) <= 4 roundings * (1 + (mean - nearer)^2 / var), cold, warm and misled."""
    for distance in 0.0, 1.0, 30.0, 1e3, 1e5:
        x = jnp.asarray(STANDARD + [distance, -distance, 0], jnp.float32)
        expected_mean, expected_var, _ = reference.moments(x)
        for shift in 0.0, expected_mean + 0.1, -3 * expected_mean, 1e8, np.nan:
            nearest = np.fmin(np.abs(expected_mean), np.abs(expected_mean - shift))
            for options in {"exact": False}, {"exact": False, "weights": jnp.ones((64, 48, 1))}:
                mean, var = measured(FAST, x, shift=shift, **options)
                assert np.all(var >= 0)
                bound = 4 * EPS * (1 + nearest**2 / expected_var)
                assert np.all(np.abs(var / expected_var - 1) <= np.minimum(bound, 1e9))
                assert np.all(np.abs(mean - expected_mean) <= 8 * EPS * (1 + np.abs(expected_mean) + nearest))


def test_fast_moments_are_never_worse_than_those_about_zero():
    for distance in 0.0, 10.0, 300.0:
        x = jnp.asarray(STANDARD + distance, jnp.float32)
        expected = reference.moments(x)[1]
        for misled in 5.0, 1e3, 1e6:
            error = np.abs(measured(FAST, x, shift=misled, exact=False)[1] - expected)
            about_zero = np.abs(measured(FAST, x, shift=0.0, exact=False)[1] - expected)
            assert error.max() <= 2 * about_zero.max() + 8 * EPS * expected.max()


@pytest.mark.parametrize("target", [Target("cuda", False), Target("tpu", False)])
def test_a_pilot_is_as_near_as_64_samples_are(target):
    rng = np.random.RandomState(1)
    for shape in (4096, 1, 1), (1, 64, 64), (8, 3, 200), (30, 7, 2), (5000,), (3, 2), (1,):
        x = jnp.asarray(rng.normal(1e3, 1, (*shape, 3)), jnp.float32)
        count = math.prod(shape)
        pilot, rest, _ = on(target, Options(False, tuple(range(len(shape))), True, 0.0), x)
        # Five standard deviations of a mean of so many; and of all, nothing but rounding.
        far = 1e-3 if count <= 64 else 5 / np.sqrt(min(count, 48))
        assert np.all(np.abs(rest) <= far), shape
        assert np.all(np.abs(pilot + rest - x.mean(tuple(range(len(shape))))) < 1e-3)


@settings(max_examples=40, deadline=None)
@given(st.floats(-6, 6), st.floats(-3, 3), st.integers(0, 2**31 - 1))
def test_one_pass_on_a_cpu_is_exact_for_any_mean_and_spread(mean, spread, seed):
    x = np.float32(10**spread * (np.random.RandomState(seed).normal(mean, 1, (24, 5, 3)) + [0, 3, -5]))
    expected_mean, expected_var, _ = reference.moments(x)
    mean, var = measured(TARGETS[0], jnp.asarray(x))
    assert_allclose(var, expected_var, rtol=1e-5)  # sums over few features are the least exact
    assert_allclose(mean, expected_mean, rtol=1e-6, atol=1e-6 * np.sqrt(expected_var).max())


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_not_finite_shows_in_its_own_feature_only(target):
    x = jnp.asarray(STANDARD, jnp.float32)
    expected = measured(target, x)
    for held in np.nan, np.inf, -np.inf:
        mean, var = measured(target, x.at[5, 7, 1].set(held))
        assert not np.isfinite(mean[1]) and not np.isfinite(var[1])
        assert_allclose(np.array([mean, var])[:, ::2], np.array(expected)[:, ::2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_zero_hide_what_they_multiply(target, exact):
    x, weights = jnp.asarray(STANDARD, jnp.float32), (np.arange(64) % 3).reshape(64, 1, 1)
    hidden = jnp.where(weights == 0, np.nan, x)
    expected = reference.moments(x, mask=weights)[:2]
    for values in x, hidden:
        actual = measured(target, values, jnp.asarray(weights, jnp.float32), exact=exact)
        assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_one_branch_serves_all_members_of_a_vmap():
    x = jnp.asarray(np.stack([STANDARD, STANDARD + 1e3]), jnp.float32)
    measure = lambda x: measure_samples(x, None, REDUCED)
    f = jax.jit(jax.vmap(measure))
    assert f.lower(x).compile().as_text().count("conditional(") == 1
    part = f(x)
    for member in range(2):
        alone = measure(x[member])
        assert_allclose(part.mean[member] + part.rest[member], alone.mean + alone.rest, rtol=1e-5, atol=1e-5)
        assert_allclose(part.var[member], alone.var, rtol=1e-5)


def test_members_of_a_vmap_may_share_samples_weights_or_shift():
    x = jnp.asarray(np.stack([STANDARD, STANDARD + 7]), jnp.float32)
    weights = jnp.asarray(RNG.rand(2, 64, 1, 1), jnp.float32)
    shift = jnp.arange(6.0).reshape(2, 3)

    def var(x, weights, shift):
        return measure_samples(x, weights, REDUCED, shift=shift).var

    for axes in (0, 0, 0), (None, 0, None), (0, None, 0), (None, None, 0), (0, 0, None):
        args = [leaf if axis == 0 else leaf[0] for leaf, axis in zip((x, weights, shift), axes)]
        mapped = jax.vmap(var, axes)(*args)
        for member in range(2):
            alone = [arg[member] if axis == 0 else arg for arg, axis in zip(args, axes)]
            assert_allclose(mapped[member], var(*alone), rtol=1e-5)


def test_copies_are_the_same_values_and_have_the_same_gradient():
    values = jnp.arange(3.0), jnp.ones((2, 2))
    for times in (1, 2, 3):
        jax.tree.map(assert_array_equal, jax.jit(partial(prevent_cse, times=times))(values), values)
    assert_array_equal(jax.jit(unshared_on_cpu)(values[0]), values[0])
    gradient = jax.grad(lambda x: jnp.sum(unshared_on_cpu(x) ** 2))(values[0])
    assert_array_equal(gradient, 2 * values[0])
