"""Each way to measure moments, for whichever target it is, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from jbn._samples import Options, measure_on, measure_samples
from jbn._xla import Target, prevent_cse, unshared_on_cpu
from tests.helpers import reference

REDUCED = (0, 1)
TARGETS = [Target(platform, sharded) for platform in ("cpu", "cuda", "tpu") for sharded in (False, True)]
FAST = Target("tpu", False)
RNG = np.random.RandomState(0)
STANDARD = RNG.normal(0, 1, (64, 48, 3))
# What decides between one pass and two, or deceives a pilot; other hard inputs are in test_numerics.
INPUTS = {
    "mean 0": STANDARD,
    "mean 2.9 sd": STANDARD + 2.9,
    "mean 3.1 sd": STANDARD - 3.1,
    "mean 1e4 sd": STANDARD + 1e4,
    "one mean of many sd": STANDARD + [0, 100, 0],
    "squares that add up beyond float32": 1e14 * STANDARD + 1e18,
    "a sixteenth far from the others": np.where(np.arange(64)[:, None, None] < 4, 1e3, 0) + STANDARD,
    "the middle far from the others": np.where(abs(np.arange(64) - 32)[:, None, None] < 4, 1e3, 0) + STANDARD,
    "first columns far away": np.where(np.arange(48)[:, None] < 3, -1e3, 0) + STANDARD,
    "sorted": np.sort((STANDARD + 20).reshape(-1, 3), 0).reshape(STANDARD.shape),
    "constant": np.full(STANDARD.shape, 0.1),
    "zero": np.zeros(STANDARD.shape),
    "one axis constant": np.broadcast_to(STANDARD[:1] + 5, STANDARD.shape),
}
EPS = np.finfo(np.float32).eps


@partial(jax.jit, static_argnums=(0, 1))
def on(target, options, *arrays):
    return measure_on(target, options, *arrays)


def measured(target, x, weights=None, *, shift=0.0, exact=True):
    arrays = [x]
    if weights is not None:
        count = np.broadcast_to(weights, (*x.shape[:2], 1)).sum(REDUCED)
        arrays += [weights, np.float32(count)]
    arrays.append(np.full(3, shift, np.float32))
    options = Options(weights is not None, REDUCED, exact, 0.0)
    mean, rest, var = map(np.asarray, on(target, options, *arrays))
    return np.float64(mean) + np.float64(rest), var


@pytest.mark.parametrize(
    "target, dtype",
    [
        (TARGETS[0], "float32"),
        *(pytest.param(target, "float32", marks=pytest.mark.slow) for target in TARGETS[1:]),
        *(pytest.param(target, "bfloat16", marks=pytest.mark.slow) for target in TARGETS[:3:2]),
    ],
)
def test_moments_are_those_of_float64_whatever_the_shift(target, dtype):
    # A CPU adds up one by one what a GPU adds up in a tree.
    in_order = 64 if target == Target("cuda", False) else 1
    for case, values in INPUTS.items():
        x = jnp.asarray(values, dtype)
        expected_mean, expected_var, _ = reference.moments(x)
        for shift in 0, expected_mean, 1e8:
            mean, var = measured(target, x, shift=shift)
            # A pilot's rounding counts 48 times at most: that is one over its share.
            atol = (EPS * np.abs(expected_mean).max()) ** 2
            message = f"{case}, shift {shift}"
            assert_allclose(var, expected_var, rtol=64 * in_order * EPS, atol=atol, err_msg=message)
            near = 4 * EPS * (in_order * np.sqrt(expected_var) + np.abs(expected_mean))
            assert np.all(np.abs(mean - expected_mean) <= near), message


@pytest.mark.parametrize("weights", [None, np.ones((64, 48, 1), np.float32)], ids=["", "with weights"])
def test_moments_about_the_nearer_of_zero_and_the_shift_are_within_the_stated_bound(weights):
    """(error of the variance / var) <= 4 roundings * (1 + (mean - nearer)^2 / var), cold, warm and misled."""
    roundings = 4 if jax.__version_info__ >= (0, 10, 2) else 10  # before, XLA adds up one by one on CPUs
    for distance in 0.0, 1.0, 30.0, 1e3, 1e5:
        x = np.float32(STANDARD + [distance, -distance, 0])
        expected_mean, expected_var, _ = reference.moments(x)
        worst = []
        for shift in 0.0, expected_mean + 0.1, -3 * expected_mean, 1e8, np.nan:
            nearest = np.fmin(np.abs(expected_mean), np.abs(expected_mean - shift))
            mean, var = measured(FAST, x, weights, shift=shift, exact=False)
            assert np.all(var >= 0)
            error, bound = np.abs(var / expected_var - 1), roundings * EPS * (1 + nearest**2 / expected_var)
            assert np.all(error <= np.minimum(bound, 1e9)), (distance, shift)
            assert np.all(np.abs(mean - expected_mean) <= 8 * EPS * (1 + np.abs(expected_mean) + nearest))
            worst.append(np.abs(var - expected_var).max())
        # Misled or not, they are never worse than about zero.
        assert max(worst) <= roundings / 2 * worst[0] + 8 * EPS * expected_var.max(), distance


@pytest.mark.slow
def test_a_pilot_is_as_near_as_64_samples_are():
    rng = np.random.RandomState(1)
    quick = jax.jit(measure_on, static_argnums=(0, 1))
    for shape in (4096, 1, 1), (1, 64, 64), (8, 3, 200), (30, 7, 2), (5000,), (3, 2), (1,):
        x = np.float32(rng.normal(1e3, 1, (*shape, 3)))
        axes, count = tuple(range(len(shape))), np.prod(shape)
        for platform in ("cuda", "tpu") if shape == (8, 3, 200) else ("cuda",):
            pilot, rest, _ = quick(Target(platform, False), Options(False, axes, True, 0.0), x)
            # Five standard deviations of a mean of so many; and of all, nothing but rounding.
            far = 1e-3 if count <= 64 else 5 / np.sqrt(min(count, 48))
            assert np.all(np.abs(rest) <= far), shape
            assert np.all(np.abs(np.float64(pilot) + rest - x.mean(axes, np.float64)) < 1e-3), shape


@settings(max_examples=40, deadline=None)
@given(st.floats(-6, 6), st.floats(-3, 3), st.integers(0, 2**31 - 1))
def test_one_pass_on_a_cpu_is_exact_for_any_mean_and_spread(mean, spread, seed):
    x = np.float32(10**spread * (np.random.RandomState(seed).normal(mean, 1, (24, 5, 3)) + [0, 3, -5]))
    expected_mean, expected_var, _ = reference.moments(x)
    mean, var = measured(TARGETS[0], x)
    assert_allclose(var, expected_var, rtol=1e-5)  # sums over few features are the least exact
    assert_allclose(mean, expected_mean, rtol=1e-6, atol=1e-6 * np.sqrt(expected_var).max())


@pytest.mark.slow
def test_what_is_not_finite_shows_in_its_own_feature_only():
    for target in TARGETS:
        expected = measured(target, np.float32(STANDARD))
        for held in np.nan, np.inf, -np.inf:
            x = np.float32(STANDARD)
            x[5, 7, 1] = held
            mean, var = measured(target, x)
            assert not np.isfinite(mean[1]) and not np.isfinite(var[1]), (target, held)
            actual = np.array([mean, var])
            assert_allclose(actual[:, ::2], np.array(expected)[:, ::2], rtol=1e-5, atol=1e-6, err_msg=target)


@pytest.mark.parametrize(
    "target, exact",
    [
        (TARGETS[0], True),
        *(pytest.param(target, True, marks=pytest.mark.slow) for target in TARGETS[1:]),
        *(pytest.param(target, False, marks=pytest.mark.slow) for target in TARGETS[-2:]),
    ],
)
def test_weights_of_zero_hide_what_they_multiply(target, exact):
    x, weights = np.float32(STANDARD), np.float32(np.arange(64) % 3).reshape(64, 1, 1)
    expected = reference.moments(x, mask=weights)[:2]
    for values in x, np.where(weights == 0, np.float32(np.nan), x):
        actual = measured(target, values, weights, exact=exact)
        assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "target, exact",
    [
        (TARGETS[2], True),
        *(pytest.param(target, True, marks=pytest.mark.slow) for target in TARGETS if target != TARGETS[2]),
        pytest.param(FAST, False, marks=pytest.mark.slow),
    ],
)
def test_domains_far_from_each_other_are_measured_each_about_its_own_mean(target, exact):
    index = np.arange(64) % 5 % 4  # of 6 domains
    means = np.array([0, 1e4, -300, 7])
    images = np.float32(STANDARD + means[index][:, None, None])
    weights = np.float32(RNG.gamma(1.0, size=(64, 1, 1)))
    shift = np.zeros((6, 3), np.float32)
    shift[:4] = means[:, None] + 0.5  # near, as FAST needs it
    for x, mask in (images, None), (images[:, 0], None), (images, weights):
        reduced = tuple(range(x.ndim - 1))
        count = []
        if mask is not None:
            sums = np.bincount(index, mask[:, 0, 0], 6)[:, None] * x.shape[1]
            count = [mask, np.float32(sums)]
        options = Options(mask is not None, reduced, exact, 0.0, 6)
        mean, rest, var = map(np.asarray, on(target, options, x, *count, index.astype(np.int32), shift))
        for domain in range(4):
            rows = index == domain
            wanted = reference.moments(x[rows], mask=None if mask is None else mask[rows])
            assert_allclose(np.float64(mean[domain]) + rest[domain], wanted[0], rtol=1e-6, atol=1e-5)
            assert_allclose(var[domain], wanted[1], rtol=3e-5)
        assert_array_equal(var[4:], 0)


@pytest.mark.slow
def test_one_branch_serves_all_members_of_a_vmap():
    x = np.float32(np.stack([STANDARD, STANDARD + 1e3]))
    f = jax.jit(jax.vmap(lambda x: measure_samples(x, None, REDUCED))).lower(x).compile()
    assert f.as_text().count("conditional(") == 1
    part = f(x)
    for member in range(2):
        mean, var, _ = reference.moments(x[member])
        assert_allclose(np.float64(part.mean[member]) + part.mean_low[member], mean, rtol=1e-5, atol=1e-5)
        assert_allclose(part.var[member], var, rtol=1e-5)


@pytest.mark.slow
def test_members_of_a_vmap_may_share_samples_weights_or_shift():
    x, weights = np.float32(np.stack([STANDARD, STANDARD + 7])), np.float32(RNG.rand(2, 64, 1, 1))
    shift = np.arange(6, dtype=np.float32).reshape(2, 3)

    def var(x, weights, shift):
        return measure_samples(x, weights, REDUCED, shift=shift).var

    for axes in (0, 0, 0), (None, 0, None), (0, None, 0), (None, None, 0), (0, 0, None):
        args = [leaf if axis == 0 else leaf[0] for leaf, axis in zip((x, weights, shift), axes)]
        mapped = jax.jit(jax.vmap(var, axes))(*args)
        for member in range(2):
            alone = [arg[member] if axis == 0 else arg for arg, axis in zip(args, axes)]
            expected = reference.moments(alone[0], mask=alone[1])[1]
            assert_allclose(mapped[member], expected, rtol=2e-5, err_msg=axes)


def test_copies_are_the_same_values_and_have_the_same_gradient():
    @jax.jit
    def copies(values):
        gradient = jax.grad(lambda x: jnp.sum(unshared_on_cpu(x) ** 2))(values[0])
        return [prevent_cse(values, times=times) for times in (1, 2, 3)], unshared_on_cpu(values[0]), gradient

    values = np.arange(3, dtype=np.float32), np.ones((2, 2), np.float32)
    copied, unshared, gradient = copies(values)
    jax.tree.map(assert_array_equal, copied, [values] * 3)
    assert_array_equal(unshared, values[0])
    assert_array_equal(gradient, 2 * values[0])
