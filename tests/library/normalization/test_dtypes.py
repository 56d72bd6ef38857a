"""Which dtypes are computed in, and the floats of 8 bits and fewer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn._dtypes import arithmetic_dtype, promote, real_dtype
from tests.helpers import reference
from tests.helpers.flax_layers import NNX, Linen

# All that JAX has and XLA for CPUs computes with.
NARROW = [
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]


def narrow(dtype):
    return jnp.asarray(np.random.RandomState(0).normal(1, 1, (16, 3)).clip(0.25), dtype)


@pytest.mark.parametrize(
    "given, promoted, computed_in",
    [
        (["bfloat16"], "bfloat16", "float32"),
        (["float16", "bfloat16"], "float32", "float32"),
        (["bfloat16", "float64"], "float64", "float64"),
        (["complex64", "bfloat16"], "complex64", "complex64"),
        (["complex64", "float64"], "complex128", "complex128"),
        (["float8_e4m3fn"], "float8_e4m3fn", "float32"),
        (["float8_e4m3fn", "float8_e4m3fn"], "float8_e4m3fn", "float32"),
        (["float8_e5m2", "float8_e4m3fn"], "bfloat16", "float32"),
        (["float4_e2m1fn", "float16"], "float32", "float32"),
        (["float8_e5m2", "float64"], "float64", "float64"),
    ],
)
def test_promotion_works_in_strict_mode_and_arithmetic_is_float32_at_least(x64, given, promoted, computed_in):
    for values in given, [jax.ShapeDtypeStruct((2,), dtype) for dtype in given]:
        assert promote(*values) == promoted
        assert arithmetic_dtype(*values) == computed_in


def test_real_dtype_is_that_of_the_real_part():
    for dtype, real in {"complex64": "float32", "complex128": "float64", "bfloat16": "bfloat16"}.items():
        assert real_dtype(dtype) == real


@pytest.mark.parametrize(
    "dtype",
    [d if d == "float8_e4m3fn" else pytest.param(d, marks=pytest.mark.slow) for d in NARROW],
)
def test_narrow_floats_are_computed_with_in_float32(dtype):
    x = narrow(dtype)
    values = np.float32(x)
    params, running = jbn.init(3)

    def f(x, dtype="float32"):
        return jbn.batch_norm(x, params, running, train=True, update=jbn.ema(0.0), dtype=dtype)

    @jax.jit
    def results(x):
        y, new = f(x)
        masked = jbn.moments(x, mask=np.arange(16)[:, None] < 9)
        return y, new, f(x, None)[0], y.astype(dtype), jbn.normalize(x, new, dtype=jnp.bfloat16), masked

    y, new, rounded, y_rounded, normalized, masked = results(x)
    expected = reference.batch_norm(values)
    assert_allclose(y, expected, atol=1e-5)
    assert_allclose(new.var, reference.moments(values)[1], rtol=1e-5)
    assert rounded.dtype == dtype
    assert_array_equal(np.float32(rounded), np.float32(y_rounded))
    assert_allclose(np.float32(normalized), expected, atol=0.02)
    assert_allclose(masked.mean, values[:9].mean(0), rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(f(x)[0])))
    assert jax.eval_shape(gradient, x).dtype == dtype
    if dtype == "float8_e4m3fn":
        dx, _, _ = reference.gradients(values, np.cos(expected))
        assert_allclose(np.float32(jax.jit(gradient)(x)), dx, rtol=0.07, atol=2e-3)  # rounded to 4 bits


@pytest.mark.parametrize("flavour", [Linen, pytest.param(NNX, marks=pytest.mark.slow)])
def test_modules_compute_with_narrow_floats_in_float32_or_as_told(flavour):
    x = narrow("float8_e4m3fn")
    for result in (jnp.bfloat16, None):
        layer = flavour(flavour.ours, x, dtype=result)
        y = jax.jit(lambda x, layer=layer: layer.call(layer.params, layer.stats, x, True)[0])(x)
        assert y.dtype == (result or jnp.float32)
        assert_allclose(np.float32(y), reference.batch_norm(np.float32(x)), atol=0.02)


@pytest.mark.slow
def test_narrow_floats_give_what_flax_gives(standard_promotion):
    x = narrow("float8_e4m3fn")
    layers = [NNX(kind, x, dtype=jnp.bfloat16) for kind in (NNX.ours, NNX.flax)]
    ours, theirs = jax.jit(lambda x: [layer.call(layer.params, layer.stats, x, True)[0] for layer in layers])(
        x
    )
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    assert_allclose(np.float32(ours), np.float32(theirs), atol=0.04)
