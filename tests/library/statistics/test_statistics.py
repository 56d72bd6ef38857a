"""`jbn.moments`: values for any axis, mask and dtype, what masks hide, and the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference

SHAPE = (6, 4, 5, 3)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6, "float64": 1e-14, "complex64": 2e-6}
RNG = np.random.RandomState(1)
MASKS = {
    "no mask": None,
    "rows": RNG.rand(6, 1, 1, 1) < 0.6,
    "positions, per feature": RNG.rand(*SHAPE) < 0.6,
    "features": np.array([True, False, True]),
    "weights": RNG.gamma(1.0, size=(6, 4, 1, 1)).astype(np.float32),
    "integers": RNG.randint(0, 4, SHAPE),
}

measure = jax.jit(jbn.moments, static_argnames="axis")


def samples(shape=SHAPE, dtype="float32"):
    rng = np.random.RandomState(0)
    x = rng.normal(3, 2, shape)
    if dtype == "complex64":
        x = x + 1j * rng.normal(-3, 1, shape)
    return jnp.asarray(x, dtype)


def assert_moments(actual, expected, tolerance):
    for name, leaf, wanted in zip(("mean", "var", "count"), actual, expected):
        assert_allclose(leaf, wanted, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    "dtype, axis, masks",
    [
        ("float32", -1, MASKS),
        ("float32", (3, 1), ["no mask", "rows"]),
        *(
            pytest.param("float32", axis, ["no mask", "rows", "features"], marks=pytest.mark.slow)
            for axis in (1, (1, -1), ())
        ),
        *(
            pytest.param(dtype, -1, ["no mask", "weights"], marks=pytest.mark.slow)
            for dtype in ("bfloat16", "float64", "complex64")
        ),
    ],
)
def test_moments_are_those_of_float64_for_any_axis_mask_and_dtype(dtype, axis, masks):
    with jax.enable_x64(dtype == "float64"):
        x = samples(dtype=dtype)
        for mask in masks:
            actual = measure(x, axis=axis, mask=MASKS[mask])
            assert_moments(actual, reference.moments(x, axis, MASKS[mask]), TOLERANCE[dtype])
            real = jnp.float64 if dtype == "float64" else jnp.float32
            of_mean = jnp.complex64 if dtype == "complex64" else real
            assert [leaf.dtype for leaf in actual] == [of_mean, real, real]


def test_worked_example_means_and_biased_variances():
    mean, var, count = jbn.moments(jnp.array([[0.23, 1.26, -2.41], [0.56, 0.75, 1.00]]))
    assert_allclose(mean, [0.395, 1.005, -0.705], rtol=1e-6)
    assert_allclose(var, [0.027225, 0.065025, 2.907025], rtol=1e-5)
    assert_array_equal(count, [2, 2, 2])


def test_integer_weights_equal_repeated_rows():
    x, repeats = samples((5, 3)), np.array([2, 0, 1, 3, 1])
    expected = reference.moments(np.repeat(np.asarray(x), repeats, axis=0))
    assert_moments(measure(x, mask=repeats[:, None]), expected, 1e-6)


@pytest.mark.parametrize("mask", [np.array([1, 1, 0, 1, 1], bool), np.array([1, 1, 0, 2, 1], np.float32)])
def test_uncounted_rows_may_hold_anything_in_value_and_gradient(mask):
    x, mask = samples((5, 3)), mask[:, None]

    def loss(x):
        batch = jbn.moments(x, mask=mask)
        return jnp.sum(jnp.sin(batch.mean) + batch.var**2), batch

    f = jax.jit(jax.grad(loss, has_aux=True))
    dx, _ = f(x)
    for held in np.nan, np.inf, -np.inf, np.float32(3e38):
        poisoned_dx, batch = f(np.where(np.arange(5)[:, None] == 2, np.float32(held), x))
        assert_moments(batch, reference.moments(x, mask=mask), 1e-6)
        # The two ways to measure, in one pass and in two, lose some roundings each.
        assert_allclose(poisoned_dx, dx, rtol=1e-5, err_msg=held)
        assert_array_equal(poisoned_dx[2], 0)


def test_uncounted_rows_cost_nothing_where_the_mean_squared_overflows():
    batch = measure(np.full((5, 3), 2.0**100, np.float32), mask=np.arange(5)[:, None] < 4)
    assert_moments(batch, [np.full(3, 2.0**100), np.zeros(3), np.full(3, 4)], 0)


def test_no_samples_give_the_identity_of_merge():
    other = jbn.Moments(*np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9]]))
    merge = jax.jit(jbn.merge)
    for x, mask in (np.ones((4, 3), np.float32), np.zeros((4, 1), bool)), (np.ones((0, 3), np.float32), None):
        empty = measure(x, mask=mask)
        assert_moments(empty, np.zeros((3, 3)), 0)
        for merged in merge(empty, other), merge(other, empty):
            assert_moments(merged, other, 0)


def test_gradient_of_moments_is_that_of_the_plain_formula(x64):
    x, w = samples((7, 3), "float64"), jnp.asarray(RNG.rand(7, 3))

    def plain(x):
        mean = jnp.sum(w * x, 0) / jnp.sum(w, 0)
        return jnp.sum(jnp.sin(mean) + jnp.sum(w * (x - mean[None]) ** 2, 0) / jnp.sum(w, 0))

    def ours(x):
        mean, var, _ = jbn.moments(x, mask=w)
        return jnp.sum(jnp.sin(mean) + var)

    actual, expected = (jax.jit(lambda x, f=f: (jax.grad(f)(x), jax.hessian(f)(x)))(x) for f in (ours, plain))
    assert_allclose(actual[0], expected[0], rtol=1e-11)
    assert_allclose(actual[1], expected[1], rtol=1e-11, atol=1e-15)


def test_mask_carries_no_gradient():
    x, w = samples((5, 3)), jnp.full((5, 3), 0.5)
    assert_array_equal(jax.jit(jax.grad(lambda w: jnp.sum(jbn.moments(x, mask=w).var)))(w), 0)
