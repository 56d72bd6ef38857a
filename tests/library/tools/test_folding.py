"""Inference as an affine map, and folded into a kernel, against float64; and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jbn
from tests.helpers import reference

RNG = np.random.RandomState(0)
X, KERNEL, BIAS = (RNG.normal(0, 1, shape) for shape in ((9, 5), (5, 4), 4))
MEAN, VAR, SCALE, BETA = RNG.normal(0, 1, 4), RNG.gamma(1, 1, 4), RNG.normal(1, 0.5, 4), RNG.normal(0, 1, 4)


def of(dtype, *values):
    return [None if value is None else jnp.asarray(value, dtype) for value in values]


def expected(x, scale, beta, epsilon=1e-5, mean=MEAN, var=VAR):
    return reference.normalize(x, mean, var, scale, beta, epsilon=epsilon)


def test_affine_map_is_inference_in_float32_at_least():
    for scale in (None, SCALE):
        for beta in (None, BETA):
            for dtype, wide in (("float32", "float32"), ("bfloat16", "float32"), ("complex64", "complex64")):
                params, running = jbn.Params(*of(dtype, scale, beta)), jbn.Moments(*of("float32", MEAN, VAR))
                a, b = jbn.as_affine(params, running, epsilon=1e-3)
                assert a.dtype == b.dtype == (wide if jax.tree.leaves(params) else "float32")
                rounded = [None if leaf is None else np.asarray(leaf, np.complex128) for leaf in params]
                y = expected(BIAS + 0j, *rounded, epsilon=1e-3)
                assert_allclose(np.asarray(a) * BIAS + np.asarray(b), y, rtol=1e-5, atol=1e-5)
    assert_allclose(
        jbn.as_affine(None, jbn.Moments(jnp.zeros((2, 3)), jnp.ones((2, 3))), epsilon=3.0)[0], 0.5
    )


def test_variances_from_the_smallest_to_infinity_and_large_means_stay_within_the_bound_of_the_docstring():
    var = np.array([0.0, 1e-35, 1e35, 3e38])
    a, b = jbn.as_affine(None, jbn.Moments(*of("float32", MEAN, var)), epsilon=1e-30)
    assert_allclose(a, 1 / np.sqrt(var + 1e-30), rtol=1e-6)
    assert_allclose(b, -MEAN / np.sqrt(var + 1e-30), rtol=1e-6)
    a, b = jbn.as_affine(None, jbn.Moments(jnp.array([np.inf]), jnp.array([np.inf])))
    assert (a, b) == (0, 0)  # as `jbn.normalize`: the output is the bias

    mean, var = np.full(4, 1e4, np.float32), np.full(4, 1.7, np.float32)
    x = mean + RNG.normal(0, 1, (1000, 4)).astype(np.float32)
    a, b = map(np.asarray, jbn.as_affine(None, jbn.Moments(mean, var)))
    worst = np.max(np.abs(x * a + b - expected(x, None, None, mean=mean, var=var)))
    assert 1e-4 < worst < 2e-7 * 1e4 / np.sqrt(1.7)


def test_folded_kernel_and_bias_compute_layer_and_norm():
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        for bias in (None, BIAS):
            for scale, beta in ((None, None), (SCALE, None), (None, BETA), (SCALE, BETA)):
                given = of(dtype, KERNEL, bias)
                params, running = (
                    jbn.Params(*of("float32", scale, beta)),
                    jbn.Moments(*of("float32", MEAN, VAR)),
                )
                kernel, new = jbn.fold(*given, params, running)
                assert kernel.dtype == new.dtype == dtype
                y = expected(X @ KERNEL + (0 if bias is None else bias), scale, beta)
                actual = X @ np.asarray(kernel, np.float64) + np.asarray(new, np.float64)
                assert_allclose(actual, y, rtol=0, atol=tolerance * np.max(np.abs(y)))
                turned, same = jbn.fold(given[0].T, given[1], params, running, axis=0)
                assert jnp.array_equal(turned.T, kernel) and jnp.array_equal(same, new)
    # Once, at the end, is all that bfloat16 is rounded.
    kernel, _ = jbn.fold(*of("bfloat16", KERNEL, None), None, running)
    exact = np.asarray(jnp.asarray(KERNEL, "bfloat16"), np.float64) / np.sqrt(VAR + 1e-5)
    assert jnp.array_equal(kernel, jnp.asarray(exact, "bfloat16"))


def test_a_bias_near_the_mean_is_as_exact_as_the_norm_itself():
    running = jbn.Moments(jnp.array([1e4]), jnp.array([1e-4]))
    _, bias = jbn.fold(jnp.ones((1, 1)), jnp.array([1e4 + 1.0]), None, running, epsilon=1e-6)
    assert_allclose(bias, 1 / np.sqrt(1e-4 + 1e-6), rtol=1e-6)


@pytest.mark.slow
def test_complex_kernels_fold_and_gradients_reach_everything():
    running = jbn.Moments(*of("float32", MEAN, VAR))
    kernel, bias = jbn.fold(*of("complex64", 1j * KERNEL, None), None, running)
    assert_allclose(kernel, 1j * KERNEL / np.sqrt(VAR + 1e-5), rtol=1e-5)
    assert bias.dtype == "complex64"

    def loss(*given):
        kernel, bias = jbn.fold(*given)
        return jnp.sum(kernel) + jnp.sum(bias)

    given = (
        *of("float32", KERNEL, BIAS),
        jbn.Params(*of("float32", SCALE, BETA)),
        jbn.Moments(*running[:2], count=0.0),
    )
    *grads, of_moments = jax.grad(loss, (0, 1, 2, 3))(*given)
    assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves((grads, of_moments.mean, of_moments.var)))


def test_what_does_not_fit_is_refused_by_its_name():
    kernel, running = jnp.ones((5, 4)), jbn.Moments(jnp.zeros(4), jnp.ones(4))
    complex_running = running._replace(mean=jnp.zeros(4, "complex64"))
    for arguments, options, message in (
        ((kernel, None, None, running), {"axis": 0}, r"running.mean: expected shape \(5,\), .* got \(4,\)"),
        ((kernel, None, None, running), {"axis": 2}, "axis: expected one of the kernel's 2 axes, got 2"),
        ((kernel, jnp.ones(3), None, running), {}, r"bias: expected shape \(4,\), .* got \(3,\)"),
        ((kernel, None, jbn.Params(jnp.ones(1), None), running), {}, r"params.scale: expected shape \(4,\)"),
        (
            (kernel, None, None, running._replace(var=1.0)),
            {},
            r"running.var: expected shape .* got \(\)",
        ),
        ((kernel, None, None, running), {"epsilon": 0}, "epsilon=0"),
        ((kernel, None, running, running), {}, "params: expected jbn.Params, got a Moments"),
        ((kernel, None, None, None), {}, "running: expected jbn.Moments, got a NoneType"),
        ((jnp.ones((5, 4), int), None, None, running), {}, "kernel: expected a floating point"),
        ((kernel, None, None, complex_running), {}, "kernel: expected a complex dtype"),
        ((kernel, None, None, running), {"eps": 1e-3}, "expected epsilon"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            jbn.fold(*arguments, **options)
