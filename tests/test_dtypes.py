import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from flax_layers import NNX, Linen
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn._dtypes import arithmetic_dtype, promote, real_dtype

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
    for values in given, [jnp.zeros(2, dtype) for dtype in given]:
        assert promote(*values) == promoted
        assert arithmetic_dtype(*values) == computed_in


@pytest.mark.parametrize(
    "dtype, real", [("complex64", "float32"), ("complex128", "float64"), ("bfloat16", "bfloat16")]
)
def test_real_dtype_is_that_of_the_real_part(dtype, real):
    assert real_dtype(dtype) == real


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_floats_are_computed_with_in_float32(dtype):
    x = jnp.asarray(np.random.RandomState(0).normal(1, 1, (16, 3)).clip(0.25), dtype)
    values = x.astype(jnp.float32)
    params, running = jbn.init(3)
    expected = reference.batch_norm(values)
    y, new = jbn.batch_norm(x, params, running, train=True, update=jbn.ema(0.0), dtype=jnp.float32)
    assert_allclose(y, expected, atol=1e-5)
    assert_allclose(new.var, reference.moments(values)[1], rtol=1e-5)
    rounded = jbn.batch_norm(x, params, running, train=True)[0]
    assert_array_equal(np.float32(rounded), np.float32(y.astype(dtype)))
    assert_allclose(jbn.normalize(x, new, dtype=jnp.bfloat16), expected, atol=0.02)
    masked = jbn.moments(x, mask=np.arange(16)[:, None] < 9)
    assert_allclose(masked.mean, values[:9].mean(0), rtol=1e-6)
    dx = jax.grad(
        lambda x: jnp.sum(jnp.sin(jbn.batch_norm(x, params, running, train=True, dtype="float32")[0]))
    )(x)
    assert dx.dtype == dtype
    for flavour in Linen, NNX:
        for result in (jnp.bfloat16, None):
            layer = flavour(flavour.ours, x, dtype=result)
            y = layer.train(x)
            assert y.dtype == (result or jnp.float32)
            assert_allclose(np.float32(y), expected, atol=0.02)


def test_narrow_floats_give_what_flax_gives(standard_promotion):
    x = jnp.asarray(np.random.RandomState(0).normal(1, 1, (16, 3)), "float8_e4m3fn")
    ours, theirs = (
        kind(3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x) for kind in (jbn.nnx.BatchNorm, nnx.BatchNorm)
    )
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    assert_allclose(np.float32(ours), np.float32(theirs), atol=0.04)
