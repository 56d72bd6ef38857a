"""What the Linen and the NNX module have in common, against NumPy float64: statistics, masks and devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import flax_layers, reference
from tests.helpers.compiled import COLLECTIVES
from tests.helpers.flax_layers import WEIGHT, X, both, gradients, make
from tests.helpers.layers import random

SOME = np.arange(8)[:, None, None] > 2
assert_close = partial(assert_allclose, atol=5e-6)


@cache
def forgetful(flavour):
    """Returns a layer whose running statistics are the last batch's, compiled once for all tests."""
    return make(flavour, momentum=0.0)


def step(flavour, x, stats=None, mask=None):
    layer = forgetful(flavour)
    return layer.step(layer.params, layer.stats if stats is None else stats, x, True, mask=mask)


@both
def test_statistics_and_outputs_are_those_of_float64(flavour):
    layer = make(flavour, momentum=0.75, axis=1)
    mean, var, _ = reference.moments(X, 1)
    assert_close(layer.train(X), reference.batch_norm(X, axis=1))
    assert_allclose(layer.stats["mean"], 0.25 * mean, rtol=1e-5)
    assert_allclose(layer.stats["var"], 0.75 + 0.25 * var, rtol=1e-5)
    assert_close(layer.infer(X), reference.normalize(X, 0.25 * mean, 0.75 + 0.25 * var, axis=1))


@both
def test_several_feature_axes_have_moments_each(flavour):
    layer = make(flavour, axis=(-1, 1), momentum=0.0)
    assert_close(layer.train(X), reference.batch_norm(X, axis=(1, 2)))
    assert_allclose(layer.stats["mean"], np.mean(X, 0), rtol=1e-5)


@both
def test_momentum_may_be_traced(flavour):
    driver = forgetful(flavour)

    @jax.jit
    def mean_after(momentum):
        # Not compiled by itself, inside of what is compiled.
        layer = flavour(flavour.ours, X, momentum=momentum)
        return layer.call(driver.params, driver.stats, X, True)[1]["mean"]

    for momentum in (0.0, 0.5):
        assert_allclose(mean_after(momentum), (1 - momentum) * np.mean(X, (0, 1)), rtol=1e-5)


@both
def test_use_running_average_may_be_traced(flavour):
    layer = forgetful(flavour)
    call = jax.jit(lambda train: layer.call(layer.params, layer.stats, X, train))
    mean, var, _ = reference.moments(X)
    for train, used in {True: (mean, var), False: (np.zeros(3), np.ones(3))}.items():
        y, stats = call(train)
        assert_close(y, reference.normalize(X, *used))
        assert_allclose([stats["mean"], stats["var"]], used, rtol=1e-5)


@both
def test_running_statistics_are_constants_to_gradients(flavour):
    layer = forgetful(flavour)

    def variance_and_output(x, stats):
        return jnp.sum(layer.call(layer.params, stats, x, True)[1]["var"]) + jnp.sum(
            layer.call(layer.params, stats, X, False)[0] ** 2
        )

    zero = jax.jit(jax.grad(variance_and_output, (0, 1)))(X, layer.stats)
    jax.tree.map(lambda leaf: assert_array_equal(leaf, 0), zero)


# What a batch may hold, and what a mask hides.


@both
def test_non_finite_values_in_a_batch_leave_the_running_statistics_of_their_feature(flavour):
    _, before = step(flavour, X)
    x = 2 * X
    x[1, 1, 0], x[2, 2, 1] = np.nan, np.inf
    _, after = step(flavour, x, before)
    for name, power in (("mean", 1), ("var", 2)):
        assert_array_equal(after[name][:2], before[name][:2])
        assert_allclose(after[name][2], before[name][2] * 2**power, rtol=1e-5)


@both
def test_masked_values_that_are_not_finite_reach_neither_values_nor_gradients(flavour):
    poisoned, weight = np.where(SOME, X, np.nan), np.where(SOME, WEIGHT, 0)
    derive = jax.jit(partial(gradients, forgetful(flavour), mask=SOME))
    clean, dirty = (derive(v, weight) for v in (X, poisoned))
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-5), dirty[0], clean[0])
    assert_allclose(dirty[1][3:], clean[1][3:], rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(dirty[1]))
    y, stats = step(flavour, poisoned, mask=SOME)
    assert_close(y[3:], reference.batch_norm(X, mask=SOME)[3:])
    assert_allclose(stats["var"], reference.moments(X, mask=SOME)[1], rtol=1e-5)


@both
def test_a_batch_without_samples_leaves_the_running_statistics(flavour):
    _, before = step(flavour, X)
    y, after = step(flavour, X, before, np.zeros_like(SOME))
    assert np.all(np.isfinite(y))
    jax.tree.map(assert_array_equal, after, before)
    y, after = step(flavour, X[:0], before)
    assert y.shape == (0, 4, 3)
    jax.tree.map(assert_array_equal, after, before)


@both
def test_real_weights_in_the_mask_are_frequencies(flavour):
    weights = np.random.RandomState(2).gamma(1.0, size=(8, 4, 1))
    y, stats = step(flavour, X, mask=weights)
    assert_close(y, reference.batch_norm(X, mask=weights))
    assert_allclose(stats["var"], reference.moments(X, mask=weights)[1], rtol=1e-5)


@both
def test_one_value_per_feature_warns_in_training_alone(flavour):
    x = np.ones((1, 3), np.float32)
    layer = flavour(flavour.ours, x)
    jax.eval_shape(layer.infer, x)
    with pytest.warns(jbn.OneValueWarning, match="one value per feature") as warned:
        assert_array_equal(layer.train(x), 0)
    assert [warning.filename for warning in warned] == [flax_layers.__file__]  # where the layer is called


# Devices.


@both
def test_devices_merge_unequal_masks_by_count(flavour):
    x, mask = random((16, 3), mean=5.0), np.arange(16)[:, None] < 10  # rows 8 and 2, of two devices
    layer = make(flavour, x, axis_name="i", momentum=0.0)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    f = lambda stats, x, mask: layer.call(layer.params, stats, x, True, mask=mask)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("i"), P("i")), out_specs=(P("i"), P()))
    y, stats = jax.jit(mapped)(layer.stats, x, mask)
    mean, var, _ = reference.moments(x, mask=mask)
    assert_allclose(stats["mean"], mean, rtol=1e-5)
    assert_allclose(stats["var"], var, rtol=1e-5)
    assert_close(y, reference.batch_norm(x, mask=mask))


@pytest.mark.slow
@both
def test_devices_share_within_their_groups_alone(flavour):
    x = random((16, 3), mean=5.0)
    layer = make(flavour, x, axis_name="i", axis_index_groups=[[0, 1], [2, 3]])
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    f = lambda x: layer.call(layer.params, layer.stats, x, True)[0]
    y = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i")))(x)
    assert_close(y, np.concatenate([reference.batch_norm(part) for part in np.split(x, 2)]))


@pytest.mark.slow
@both
def test_statistics_are_local_to_a_device_under_sharded_jit(flavour):
    layer = make(flavour, virtual_batch_size=1, momentum=0.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = [jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (X, WEIGHT)]
    compiled = jax.jit(lambda x, weight: gradients(layer, x, weight)[1]).lower(*sharded).compile()
    assert not [name for name in COLLECTIVES.split("|") if name in compiled.as_text()]
    alone = jax.jit(lambda x, weight: gradients(forgetful(flavour), x, weight)[1])
    parts = [alone(X[i : i + 1], WEIGHT[i : i + 1]) for i in range(8)]
    assert_allclose(compiled(*sharded), np.concatenate(parts), rtol=1e-4, atol=1e-5)
