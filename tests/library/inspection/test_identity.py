"""The parameters with which a normalized layer is the layer without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn import inspection


def test_with_identity_params_normalization_gives_x_back():
    x = np.random.RandomState(0).normal(10, 2, (6, 4, 5, 3)).astype(np.float32)
    x[..., 0] = 7
    for axis, epsilon in (-1, 1e-5), ((3, 1), 0.5):

        def there_and_back(x, axis=axis, epsilon=epsilon):
            batch = jbn.moments(x, axis=axis)
            params = inspection.identity_params(batch, epsilon=epsilon)
            given = jbn.normalize(x, batch, params, axis=axis, epsilon=epsilon)
            features = jbn.init(batch.mean.shape)[1]
            return given, jbn.batch_norm(x, params, features, train=True, axis=axis, epsilon=epsilon)[0]

        for y in jax.jit(there_and_back)(x):
            assert_allclose(y, x, rtol=1e-6, atol=1e-6)


def test_identity_params_are_float32_at_least_with_a_real_scale():
    for mean, var in ("bfloat16", "bfloat16"), ("complex64", "float32"), ("int32", "int32"):
        moments = jbn.Moments(np.full(2, 2, jnp.dtype(mean)), np.full(2, 3, jnp.dtype(var)), 5.0)
        scale, bias = inspection.identity_params(moments, epsilon=1.0)
        assert scale.dtype == jnp.float32
        assert bias.dtype == (jnp.complex64 if mean == "complex64" else jnp.float32)
        assert_array_equal([scale, bias], np.full((2, 2), 2))


def test_other_moments_are_refused():
    x = np.ones(3, np.float32)
    with pytest.raises(TypeError, match="moments is a tuple; .* jbn.Moments"):
        inspection.identity_params((x, x, x))
