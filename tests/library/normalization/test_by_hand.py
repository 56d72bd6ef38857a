"""Moments, parameters and counts that people make by hand, or bring from elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from tests.helpers.flax_layers import NNX, Linen
from tests.helpers.layers import random

X = random((8, 3))
MEAN, VAR, COUNT = map(np.float32, reference.moments(X))


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6), tuple(actual), tuple(expected))


@pytest.mark.slow
def test_moments_without_a_count_have_none_yet():
    running, batch = jbn.Moments(np.full(3, 2, np.float32), np.full(3, 4, np.float32)), (MEAN, VAR, COUNT)
    assert running.count == 0 and len(jax.tree.leaves(running)) == 3
    rules = jbn.ema(0.5), jbn.ema(0.5, debias=True), jbn.cumulative(), jbn.pooled()

    @jax.jit
    def results(running):
        new = jbn.batch_norm(X, None, running, train=True, update=jbn.pooled())[1]
        after = [rule(running, jbn.Moments(*batch)) for rule in rules]
        return jbn.normalize(X, running), new, jbn.merge(running, jbn.Moments(*batch)), after

    y, new, merged, after = results(running)
    assert_allclose(y, (np.asarray(X) - 2) / 2, rtol=1e-5, atol=1e-6)
    assert_close(new, batch)
    assert_close(merged, batch)
    # A count of zeros is the same.
    jax.tree.map(assert_array_equal, after, results(running._replace(count=np.zeros(3, np.float32)))[3])


@pytest.mark.parametrize(
    "axis", [-1, *(pytest.param(axis, marks=pytest.mark.slow) for axis in (0, (0, 1), ()))]
)
def test_a_scalar_scale_or_bias_holds_for_all_features(axis):
    features = {-1: (3,), 0: (8,), (0, 1): (8, 3), (): ()}[axis]
    running = jbn.Moments(*(np.full(features, value, np.float32) for value in (1, 2, 0)))

    @jax.jit
    def outputs(params):
        trained = [] if axis == (0, 1) else [jbn.batch_norm(X, params, running, train=True, axis=axis)[0]]
        return *trained, jbn.normalize(X, running, params, axis=axis)

    for given in (2.0, np.float32(0.5)), (np.float32(2), None):
        full = [None if value is None else np.full(features, value, np.float32) for value in given]
        actual, expected = outputs(jbn.Params(*given)), outputs(jbn.Params(*full))
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6), actual, expected)


def test_gradients_of_scalars_are_those_of_all_features_together():
    running, target = jbn.init(3)[1], np.asarray(random((8, 3), seed=1))

    @jax.jit
    def gradient(params):
        loss = lambda params: jnp.sum(jbn.batch_norm(X, params, running, train=True)[0] * target)
        return jax.grad(loss)(params)

    scalars = gradient(jbn.Params(np.float32(2), np.float32(0.5)))
    _, dscale, dbias = reference.gradients(X, target, np.full(3, 2))
    for scalar, vector in zip(scalars, (dscale, dbias)):
        assert scalar.shape == ()
        assert_allclose(scalar, vector.sum(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", [Linen, NNX])
def test_a_scalar_scale_and_bias_may_be_given_in_the_call(flavour):
    driver = flavour(flavour.ours, X, use_scale=False, use_bias=False)
    f = jax.jit(lambda x: driver.call(driver.params, driver.stats, x, True, scale=2.0, bias=np.float32(0.5)))
    assert_allclose(f(X)[0], 2 * reference.batch_norm(X) + 0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "flavour, rule, count",
    [
        (Linen, jbn.ema(0.9, debias=True), 1.0),
        pytest.param(NNX, jbn.cumulative(), 9.0, marks=pytest.mark.slow),
        *(pytest.param(flavour, jbn.pooled(), 72.0, marks=pytest.mark.slow) for flavour in (Linen, NNX)),
    ],
    ids=["debiased", "cumulative", "pooled, Linen", "pooled, NNX"],
)
def test_statistics_of_flax_count_for_what_the_layer_is_told(flavour, rule, count):
    mean, var = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    driver = flavour(flavour.ours, X, update=rule, initial_count=count)
    if flavour is Linen:
        driver.variables = driver.variables | {"batch_stats": {"mean": mean, "var": var}}
    else:
        nnx.update(driver.layer, {"mean": jnp.asarray(mean), "var": jnp.asarray(var)})
    _, new = jax.jit(lambda stats: driver.call(driver.params, stats, X, True))(driver.stats)
    # 8 samples beside 72, one batch beside nine, a weight of 0.1.
    assert_allclose(new["mean"], 0.9 * mean + 0.1 * MEAN, rtol=1e-5)
    between = 0.09 * (MEAN - mean) ** 2 if rule == jbn.pooled() else 0
    assert_allclose(new["var"], 0.9 * var + 0.1 * VAR + between, rtol=1e-5)
