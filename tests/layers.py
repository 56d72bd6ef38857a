"""Samples, layers and masks that the tests train with."""

import jax.numpy as jnp
import numpy as np

import jbn

MASKS = {
    "no mask": None,
    "Boolean": np.array([1, 1, 0, 1, 1, 0, 1], bool)[:, None],
    "weights, per feature": np.random.RandomState(4).gamma(1.0, size=(7, 3)),
}


def random(shape, dtype="float32", mean=3.0, sd=2.0, seed=0):
    rng = np.random.RandomState(seed)
    x = rng.normal(mean, sd, shape)
    return jnp.asarray(x + 1j * rng.normal(mean, sd, shape) if dtype.startswith("complex") else x, dtype)


def layer(features, dtype="float32"):
    params = jbn.Params(random(features, dtype, 1.0, 0.3, seed=1), random(features, dtype, 0.0, 1.0, seed=2))
    return params, jbn.init(features, dtype=dtype)[1]
