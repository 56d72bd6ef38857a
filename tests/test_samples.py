"""Each way to measure moments, whichever platform takes it, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from jbn._samples import about_a_sixteenth, in_one_pass_if_exact, measure_samples, unshared

REDUCED = (0, 1)
WAYS = {
    "one pass if exact": jax.jit(in_one_pass_if_exact(REDUCED)),
    "about a sixteenth, of any axis": jax.jit(partial(about_a_sixteenth, REDUCED, REDUCED)),
    "about a sixteenth, not of the batch": jax.jit(partial(about_a_sixteenth, REDUCED[1:], REDUCED)),
    "two passes": jax.jit(partial(about_a_sixteenth, (), REDUCED)),
}
RNG = np.random.RandomState(0)
STANDARD = RNG.normal(0, 1, (64, 48, 3))
INPUTS = {
    "mean 0": STANDARD,
    "mean 2.9 sd": STANDARD + 2.9,
    "mean 3.1 sd": STANDARD - 3.1,
    "mean 1e4 sd": STANDARD + 1e4,
    "a sixteenth far from the others": np.where(np.arange(64)[:, None, None] < 4, 1e3, 0) + STANDARD,
    "all but a sixteenth far away": np.where(np.arange(64)[:, None, None] < 4, 0, 1e3) + STANDARD,
    "first columns far away": np.where(np.arange(48)[:, None] < 3, -1e3, 0) + STANDARD,
    "sorted": np.sort((STANDARD + 20).reshape(-1, 3), 0).reshape(STANDARD.shape),
    "constant": np.full(STANDARD.shape, 0.1),
    "zero": np.zeros(STANDARD.shape),
    "one axis constant": np.broadcast_to(STANDARD[:1] + 5, STANDARD.shape),
    "one mean of many sd": STANDARD + [0, 100, 0],
}


def measured(way, x, weights=None):
    count = np.sum(
        np.broadcast_to(1 if weights is None else weights, (*x.shape[:2], 1)), REDUCED, keepdims=True
    )
    unit = None if weights is None else jnp.ones_like(count, jnp.float32)
    part = WAYS[way](x, weights, jnp.asarray(count, jnp.float32), unit)
    return np.float64(part.mean[0, 0]) + np.float64(part.rest[0, 0]), part.var[0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("way", WAYS)
def test_moments_are_those_of_float64(way, case, dtype):
    x = jnp.asarray(INPUTS[case], dtype)
    mean, var = measured(way, x)
    expected_mean, expected_var, _ = reference.moments(x)
    eps = np.finfo(np.float32).eps
    # The rounding of a sum counts 16 times at most.
    assert_allclose(var, expected_var, rtol=40 * eps, atol=(eps * np.abs(expected_mean).max()) ** 2)
    assert np.all(np.abs(mean - expected_mean) <= 4 * eps * (np.sqrt(expected_var) + np.abs(expected_mean)))


@settings(max_examples=40, deadline=None)
@given(st.floats(-6, 6), st.floats(-3, 3), st.integers(0, 2**31 - 1))
def test_one_pass_is_exact_for_any_mean_and_spread(mean, spread, seed):
    x = np.float32(10**spread * (np.random.RandomState(seed).normal(mean, 1, (24, 5, 3)) + [0, 3, -5]))
    expected_mean, expected_var, _ = reference.moments(x)
    mean, var = measured("one pass if exact", jnp.asarray(x))
    assert_allclose(var, expected_var, rtol=1e-5)  # sums over few features are the least exact
    assert_allclose(mean, expected_mean, rtol=1e-6, atol=1e-6 * np.sqrt(expected_var).max())


@pytest.mark.parametrize("held", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_shows_in_its_own_feature_only(way, held):
    x = jnp.asarray(STANDARD, jnp.float32)
    mean, var = measured(way, x.at[5, 7, 1].set(held))
    expected = measured(way, x)
    assert not np.isfinite(mean[1]) and not np.isfinite(var[1])
    assert_allclose(np.array([mean, var])[:, ::2], np.array(expected)[:, ::2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_zero_hide_what_they_multiply(way):
    x, weights = jnp.asarray(STANDARD, jnp.float32), (np.arange(64) % 3).reshape(64, 1, 1)
    hidden = jnp.where(weights == 0, np.nan, x)
    expected = reference.moments(x, mask=weights)[:2]
    for values in x, hidden:
        actual = measured(way, values, jnp.asarray(weights, jnp.float32))
        assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_members_of_a_vmap_take_no_branch():
    x = jnp.asarray(np.stack([STANDARD, STANDARD + 1e3]), jnp.float32)
    f = jax.jit(jax.vmap(partial(measure_samples, REDUCED), (0, None)))
    assert "conditional(" not in f.lower(x, None).compile().as_text()
    part = f(x, None)
    for member in range(2):
        alone = measure_samples(REDUCED, x[member], None)
        assert_allclose(part.mean[member] + part.rest[member], alone.mean + alone.rest, rtol=1e-5, atol=1e-5)
        assert_allclose(part.var[member], alone.var, rtol=1e-5)


def test_unshared_values_are_the_same_values():
    values = jnp.arange(3.0), jnp.ones((2, 2))
    for level in (1, 2, 3):
        jax.tree.map(assert_array_equal, jax.jit(partial(unshared, level=level))(values), values)
    gradient = jax.grad(lambda x: jnp.sum(unshared(x) ** 2))(values[0])
    assert_array_equal(gradient, 2 * values[0])
