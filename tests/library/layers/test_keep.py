"""`jbn.keep` is a layer without running statistics: it updates nothing, keeps no count, and costs nothing."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ScopeCollectionNotFound
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
import jbn.nnx
from tests.helpers.compiled import OPTIMIZED
from tests.helpers.layers import random

X = np.asarray(random((16, 3), "float32", mean=2, sd=3))
PARAMS = {"scale": np.float32([1, 2, 3]), "bias": np.float32([0, 1, 2])}
STATS = {"mean": np.float32([5, 6, 7]), "var": np.float32([1, 2, 3])}
EXPECTED = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5) * PARAMS["scale"] + PARAMS["bias"]


@pytest.fixture(autouse=True)
def _standard_promotion(standard_promotion):
    yield


def test_pure_function_returns_the_running_moments_it_was_given():
    running = jbn.Moments(*STATS.values(), np.float32([3, 0, 1]))
    keeping = partial(jbn.batch_norm, train=True, update=jbn.keep())
    batch_norm = jax.jit(keeping, static_argnames="virtual_batch_size")
    for options in ({}, {"virtual_batch_size": 4}, {"mask": np.arange(16)[:, None] < 9}):
        y, new = batch_norm(X, jbn.Params(**PARAMS), running, **options)
        jax.tree.map(assert_array_equal, new, running)
    _, same = batch_norm(X + np.complex64(1j), None, running)  # which others refuse
    assert_array_equal(same.mean, running.mean)
    assert jbn.keep()(running, jbn.moments(X)) is running  # as a part of a rule of one's own
    assert jbn.keep() == jbn.keep() and hash(jbn.keep()) == hash(jbn.keep()) and jbn.keep() != jbn.pooled()
    y, _ = jax.jit(jbn.batch_norm, static_argnames="update")(
        X, jbn.Params(**PARAMS), running, train=jnp.array(False), update=jbn.keep()
    )
    assert_allclose(y, (X - STATS["mean"]) / np.sqrt(STATS["var"] + 1e-5) * [1, 2, 3] + [0, 1, 2], atol=1e-5)


def test_linen_needs_nothing_mutable_and_takes_a_checkpoint_of_flax_or_parameters_alone():
    layer = jbn.linen.BatchNorm(use_running_average=False, update=jbn.keep())
    of_flax = jax.eval_shape(nn.BatchNorm(use_running_average=False).init, jax.random.key(0), X)
    assert jax.eval_shape(layer.init, jax.random.key(0), X) == of_flax
    variables = {"params": PARAMS, "batch_stats": STATS}
    for given in (variables, {"params": PARAMS}):
        assert_allclose(layer.apply(given, X), EXPECTED, atol=2e-5)
    _, updated = layer.apply(variables, X, mutable=["batch_stats"])
    jax.tree.map(assert_array_equal, updated, {"batch_stats": STATS})
    with pytest.raises(ScopeCollectionNotFound):  # nobody could know them
        layer.clone(use_running_average=True).apply({"params": PARAMS}, X)


@pytest.mark.slow
def test_nnx_needs_no_model_that_is_an_argument_and_no_count_when_it_is_set_later():
    layer = jbn.nnx.BatchNorm(3, update=jbn.keep(), rngs=nnx.Rngs(0))
    assert set(nnx.state(layer)) == {"scale", "bias", "mean", "var"}
    nnx.update(layer, PARAMS | STATS)
    later = nnx.clone(layer)
    later.update = None
    later.set_attributes(update=jbn.keep())
    for each in (layer, later):
        assert_allclose(nnx.jit(each)(X), EXPECTED, atol=2e-5)
        y = jax.vmap(each)(jnp.stack([X, 2 * X + 1]))  # members that share it
        assert_allclose(y[1], EXPECTED, atol=2e-5)
        assert_array_equal(each.mean[...], STATS["mean"])


def test_a_momentum_of_1_keeps_the_statistics_as_in_flax():
    for module in (nn.BatchNorm, jbn.linen.BatchNorm):
        layer = module(use_running_average=False, momentum=1.0)
        y, updated = layer.apply({"params": PARAMS, "batch_stats": STATS}, X, mutable=["batch_stats"])
        assert_allclose(y, EXPECTED, atol=1e-4)
        jax.tree.map(assert_array_equal, updated["batch_stats"], STATS)


@pytest.mark.slow
def test_compiled_training_does_nothing_for_running_statistics():
    def operations(loss):
        step = jax.jit(jax.grad(loss, has_aux=True)).lower(PARAMS, STATS, X)
        return step.compile(OPTIMIZED).as_text().count(" = ")

    def pure(update, params, stats, x):
        y, new = jbn.batch_norm(x, jbn.Params(**params), jbn.Moments(**stats), train=True, update=update)
        return (y**3).sum(), new[:2]

    def linen(update, params, stats, x):
        layer = jbn.linen.BatchNorm(use_running_average=False, update=update)
        y, updated = layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return (y**3).sum(), updated["batch_stats"]

    def dropping(function, ema, params, stats, x):
        return function(ema, params, stats, x)[0], stats

    for function, ema in ((pure, jbn.ema()), (linen, None)):
        # As few as in a program that drops what another rule returns.
        dropped = operations(partial(dropping, function, ema))
        assert operations(partial(function, jbn.keep())) == dropped
        assert dropped < operations(partial(function, ema)) - 20
