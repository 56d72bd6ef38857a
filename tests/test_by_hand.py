"""Moments, parameters and counts that people make by hand, or bring from elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import NNX, Linen
from layers import random
from numpy.testing import assert_allclose, assert_array_equal

import jbn

X = random((8, 3))
both = pytest.mark.parametrize("flavour", [Linen, NNX])


def test_moments_without_a_count_have_none_yet():
    mean, var = jnp.full(3, 2.0, jnp.float32), jnp.full(3, 4.0, jnp.float32)
    running = jbn.Moments(mean, var)
    assert running.count == 0 and len(jax.tree.leaves(running)) == 3
    assert_allclose(jbn.normalize(X, running), (X - 2) / 2, rtol=1e-5, atol=1e-6)
    y, new = jax.jit(lambda running: jbn.batch_norm(X, None, running, train=True, update=jbn.pooled()))(
        running
    )
    batch = jbn.moments(X)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6), new, batch)
    for rule in (jbn.ema(0.5), jbn.ema(0.5, debias=True), jbn.cumulative(), jbn.pooled()):
        jax.tree.map(
            assert_array_equal, rule(running, batch), rule(running._replace(count=jnp.zeros(3)), batch)
        )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6), jbn.merge(running, batch), batch)


@pytest.mark.parametrize(
    "scale, bias", [(2.0, 0.5), (jnp.float32(2), jnp.float32(0.5)), (np.float64(2), None)]
)
@pytest.mark.parametrize("axis", [-1, 0, (0, 1), ()])
def test_a_scalar_scale_or_bias_holds_for_all_features(scale, bias, axis):
    features = {-1: (3,), 0: (8,), (0, 1): (8, 3), (): ()}[axis]
    running = jbn.init(features)[1]
    full = jbn.Params(*(None if v is None else jnp.full(features, v, jnp.float32) for v in (scale, bias)))
    for train in (True, False) if axis != (0, 1) else (False,):
        call = lambda params, train=train: jbn.batch_norm(X, params, running, train=train, axis=axis)[0]
        assert_allclose(call(jbn.Params(scale, bias)), call(full), rtol=1e-6)
    scalars, vectors = (
        jbn.normalize(X, running, params, axis=axis) for params in (jbn.Params(scale, bias), full)
    )
    assert_allclose(scalars, vectors, rtol=1e-6)


def test_gradients_of_scalars_are_those_of_all_features_together():
    running, target = jbn.init(3)[1], random((8, 3), seed=1)
    loss = lambda params: jnp.sum(jbn.batch_norm(X, params, running, train=True)[0] * target)
    scalars = jax.grad(loss)(jbn.Params(jnp.float32(2), jnp.float32(0.5)))
    vectors = jax.grad(loss)(jbn.Params(jnp.full(3, 2.0), jnp.full(3, 0.5)))
    for scalar, vector in zip(scalars, vectors):
        assert scalar.shape == ()
        assert_allclose(scalar, vector.sum(), rtol=1e-5)


@both
def test_a_scalar_scale_and_bias_may_be_given_in_the_call(flavour):
    driver = flavour(flavour.ours, X, use_scale=False, use_bias=False)
    y = driver.train(X)
    assert_allclose(driver.train(X, scale=2.0, bias=jnp.float32(0.5)), 2 * y + 0.5, rtol=1e-5, atol=1e-5)


# Statistics of Flax, in a layer that counts.


@both
@pytest.mark.parametrize(
    "rule, count",
    [(jbn.ema(0.9, debias=True), 1.0), (jbn.cumulative(), 9.0), (jbn.pooled(), 72.0)],
    ids=["debiased", "cumulative", "pooled"],
)
def test_statistics_of_flax_count_for_what_the_layer_is_told(flavour, rule, count):
    mean, var = jnp.array([1.0, 2, 3]), jnp.array([4.0, 5, 6])
    driver = flavour(flavour.ours, X, update=rule, initial_count=count)
    if flavour is Linen:
        driver.variables = driver.variables | {"batch_stats": {"mean": mean, "var": var}}
    else:
        nnx.update(driver.layer, {"mean": mean, "var": var})
    driver.train(X)
    new = driver.stats
    batch = jbn.moments(X)
    # 8 samples beside 72, one batch beside nine, a weight of 0.1.
    assert_allclose(new["mean"], 0.9 * mean + 0.1 * batch.mean, rtol=1e-5)
    between = 0.09 * (batch.mean - mean) ** 2 if rule == jbn.pooled() else 0
    assert_allclose(new["var"], 0.9 * var + 0.1 * batch.var + between, rtol=1e-5)
