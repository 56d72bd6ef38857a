"""Hard inputs against float64, beside a careful two-pass computation in jbn's precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference


def normal(mean, sd, shape=(4096, 4), seed=0):
    return np.random.RandomState(seed).normal(mean, sd, shape)


# What decides between the ways to measure has tests of its own, in test_samples.
INPUTS = {
    "mean 0, sd 1": normal(0, 1),
    "mean 1e4, sd 1": normal(1e4, 1),
    "mean 1e6, sd 1": normal(1e6, 1),
    "mean 100, sd 1e-3": normal(100, 1e-3),
    "one far from the others": np.concatenate([normal(0, 1)[1:], [[1e6, -1e6, 1e3, 0]]]),
    "sorted": np.sort(normal(1e3, 1), 0),
    "constant": np.broadcast_to([0.1, 1234.5, -1e6, 3e-5], (4096, 4)),
    "mixed magnitudes across features": normal(1, 1) * [1e-9, 1e-3, 1e3, 1e9],
    "at float16's limit": normal(0, 2e4).clip(-65504, 65504),
}


@jax.jit
def measured(x):
    batch = jbn.moments(x)
    return *batch, jbn.normalize(x, batch, dtype=batch.mean.dtype)


def two_pass(x):
    """Mean and variance as a careful programmer would write them, and the samples that they normalize."""
    x = np.asarray(x)
    x = x.astype(np.result_type(x.dtype, np.float32)) if x.dtype.kind in "fc" else x.astype(np.float32)
    columns = np.ascontiguousarray(x.T)  # NumPy adds pairwise along contiguous axes
    mean = columns.mean(1)
    var = (np.abs(columns - mean[:, None]) ** 2).mean(1)
    return mean, var, (x - mean) / np.sqrt(var + x.real.dtype.type(1e-5))


def assert_as_exact_as_two_passes(x, case=""):
    """Errors are 4 times those of two passes, and 4 roundings of the result, at most."""
    mean, var, count = reference.moments(x)
    y = reference.normalize(x, mean, var)
    *actual, actual_y = jax.device_get(measured(x))
    assert_array_equal(actual[2], count)
    sd = np.sqrt(var + 1e-5)
    eps = np.finfo(actual[1].dtype).eps
    # What one rounding of the mean does to each of the three; float64 is the reference's own precision.
    step = eps * np.abs(mean)
    squared = step**2 * (1 if eps < 1e-15 else eps)
    floors = step + eps * sd, 2 * eps * var + squared, eps * (1 + np.abs(y)) + step / sd
    for name, ours, theirs, exact, floor in zip(
        ("mean", "var", "y"), (*actual[:2], actual_y), two_pass(x), (mean, var, y), floors
    ):
        error, allowed = np.abs(ours - exact), 4 * (np.abs(theirs - exact) + floor)
        assert np.all(error <= allowed), f"{case}, {name}: {np.max(error - allowed)} more than is allowed"


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        *(
            pytest.param(dtype, marks=pytest.mark.slow)
            for dtype in ("float16", "bfloat16", "float64", "complex64")
        ),
    ],
)
def test_errors_are_those_of_two_passes(dtype):
    for case, x in INPUTS.items():
        if dtype == "float16" and np.abs(x).max() > 65504:
            x = x / np.abs(x).max(0) * 6e4
        if dtype == "complex64":
            x = x - 0.5j * x[::-1]
        with jax.enable_x64(dtype == "float64"):
            assert_as_exact_as_two_passes(jnp.asarray(x, dtype), case)


def test_errors_of_few_rows_are_those_of_two_passes():
    assert_as_exact_as_two_passes(jnp.asarray(normal(-1e6, 1, (5, 4)), jnp.float32))


@pytest.mark.slow
def test_millions_of_rows_are_as_exact_as_few():
    for mean, sd in (3.0, 2.0), (1e6, 1.0):
        assert_as_exact_as_two_passes(jnp.asarray(normal(mean, sd, (2_000_003, 1)), jnp.float32))


def test_mean_of_a_million_costs_the_variance_nothing():
    # Two passes lose the square of the mean's rounding, up to 1e-3 of a variance of 1.
    x = np.float32(normal(1e6, 1))
    assert_allclose(measured(x)[1], reference.moments(x)[1], rtol=1e-6)


@pytest.mark.parametrize(
    "dtype, rows",
    [
        ("float32", 2),
        *(pytest.param(dtype, 1000, marks=pytest.mark.slow) for dtype in ("float16", "float32", "complex64")),
    ],
)
def test_nothing_is_nan_and_no_variance_negative_at_the_limits_of_a_dtype(dtype, rows):
    finfo, rng = jnp.finfo(dtype), np.random.RandomState(rows)
    largest = 0.99 * np.float64(finfo.max)  # a mean of the largest may round to infinity
    signs = rng.choice([-1, 1], (rows, 1))
    x = np.concatenate(
        [
            np.full((rows, 1), largest),
            np.full((rows, 1), -largest),
            signs * largest,
            signs * np.float64(finfo.smallest_subnormal),
            rng.rand(rows, 1) * np.float64(finfo.tiny),
            signs * largest * rng.rand(rows, 1),
            np.where(signs > 0, largest, finfo.tiny),
            np.full((rows, 1), 1e-30),
        ],
        axis=1,
    )
    x = jnp.asarray(x + 0.5j * x if dtype == "complex64" else x, dtype)
    params, running = jbn.init(8, dtype=dtype)

    def loss(x, params):
        y, new = jbn.batch_norm(x, params, running, train=True, update=jbn.pooled())
        return jnp.sum(jnp.sin(y).real), (y, new)

    f = jax.jit(lambda x, params: (jbn.moments(x), *jax.grad(loss, (0, 1), has_aux=True)(x, params)))
    batch, dx_dparams, (y, new) = jax.device_get(f(x, params))
    assert np.isfinite(batch.mean).all()
    assert np.all(batch.var >= 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((dx_dparams, y, new)))
    if dtype != "float16":  # whose squares float32 can hold
        assert np.isinf(batch.var[2])
        assert_array_equal(y[:, 2], 0)
        assert_array_equal(new.count[2], 0)


def test_constant_feature_is_its_mean_whatever_its_size():
    normalize = jax.jit(jbn.normalize)
    for value in 1e38, -3e38, 1e30, 1e-30, 7e4, 1234.5:
        x = np.full((4096, 4), value, np.float32)
        mean, var, _, _ = measured(x)
        # The sum of the largest overflows.
        assert_allclose(mean, x[0], rtol=3e-7 if abs(value) < 1e35 else 2e-6)
        if abs(value) < 1e10:
            assert_allclose(var, 0, atol=(1e-7 * value) ** 2)
            y = normalize(x[:3], jbn.Moments(mean, np.zeros(4, np.float32), 1.0))
            assert_allclose(y, 0, atol=4e-7 * abs(value) / np.sqrt(1e-5))
