"""Weights of any size: only their ratios matter to mean, variance, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import quick_jit
from flax_layers import NNX, Linen
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn

RNG = np.random.RandomState(0)
X = jnp.asarray(RNG.normal(0.02, 0.01, (16, 5, 3)), jnp.float32)
TARGET = RNG.normal(0, 1, X.shape).astype(np.float32)
# Between 0.2 and 1, some 0; so that the smallest scales leave no weight below the normal numbers.
WEIGHTS = {
    shape: (RNG.uniform(0.2, 1, shape) * (RNG.rand(*shape) < 0.8)).astype(np.float32)
    for shape in [(16, 1, 1), (16, 5, 1), (16, 5, 3), (1, 5, 1)]
}
SCALES = [1e-37, 1e-35, 1e-20, 1e20, 1e30, 1e37, 3e38]
LARGEST = np.finfo(np.float32).max
MESH = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))


def whole(x, w, **options):
    return jbn.batch_norm(x, None, jbn.init(3)[1], train=True, mask=w, update=jbn.ema(0.0), **options)


def on_devices(x, w):
    f = lambda x, w: whole(x, w, axis_name="i")
    return jax.shard_map(f, mesh=MESH, in_specs=P("i"), out_specs=(P("i"), P()))(x, w)


def in_vmap(x, w):
    y, new = jax.vmap(lambda x, w: whole(x, w, axis_name="i"), axis_name="i")(x, w)
    return y, jax.tree.map(lambda leaf: leaf[0], new)


def groups_in_vmap(x, w):
    """Both groups have half of the samples, the weights of the first 1e-30 times those of the second."""
    w = jnp.where(np.arange(16)[:, None, None] < 8, w * np.float32(1e-30), w)
    groups = [list(range(8)), list(range(8, 16))]
    f = lambda x, w: whole(x, w, axis_name="i", axis_index_groups=groups)
    y, new = jax.vmap(f, axis_name="i")(x, w)
    return y, jax.tree.map(lambda leaf: leaf[-1], new)


def module(flavour):
    layer = flavour(flavour.ours, X, momentum=0.0, use_scale=False, use_bias=False)

    def f(x, w):
        y, stats = layer.call(layer.params, layer.stats, x, True, mask=w)
        return y, jbn.Moments(**stats)

    return f


WAYS = {
    "whole": whole,
    "traced": lambda x, w: jax.vmap(
        lambda train: jbn.batch_norm(x, None, jbn.init(3)[1], train=train, mask=w, update=jbn.ema(0.0))
    )(jnp.array([True]))[0][0],
    "devices": on_devices,
    "vmap": in_vmap,
    "groups in vmap": groups_in_vmap,
    "ghosts": lambda x, w: whole(x, w, virtual_batch_size=5),
    "Linen": module(Linen),
    "NNX": module(NNX),
}


@pytest.mark.parametrize("shape", WEIGHTS)
def test_moments_are_those_of_float64_for_weights_of_any_size(shape):
    w = WEIGHTS[shape]
    mean, var, count = reference.moments(X, mask=w)
    measure = quick_jit(lambda scale: jbn.moments(X, mask=w * scale))
    in_vmap = quick_jit(jax.vmap(lambda scale: jbn.moments(X, mask=w * scale)))
    together = in_vmap(jnp.array(SCALES, jnp.float32))
    for i, scale in enumerate(SCALES):
        for actual in measure(np.float32(scale)), jbn.Moments(*(leaf[i] for leaf in together)):
            assert_allclose(actual.mean, mean, rtol=2e-6)
            assert_allclose(actual.var, var, rtol=2e-5)
            assert_allclose(actual.count, np.minimum(count * scale, LARGEST), rtol=2e-6)


@pytest.mark.parametrize(
    "way, shape",
    [("whole", (1, 5, 1)), ("whole", (16, 5, 3)), *((way, (16, 5, 1)) for way in WAYS if way != "traced")],
)
def test_outputs_states_and_gradients_are_those_of_weights_of_a_usual_size(way, shape):
    def loss(x, w):
        y, new = WAYS[way](x, w)
        return jnp.sum(jnp.sin(y) * TARGET), (y, new)

    f = quick_jit(lambda x, scale: jax.grad(loss, has_aux=True)(x, WEIGHTS[shape] * scale))
    dx, (y, new) = f(X, np.float32(1))
    for scale in SCALES:
        if way == "groups in vmap" and scale < 1:
            continue  # there the lighter group has nothing left
        actual_dx, (actual_y, actual_new) = f(X, np.float32(scale))
        assert_allclose(actual_y, y, rtol=1e-4, atol=1e-4, err_msg=scale)
        assert_allclose(actual_dx, dx, rtol=1e-3, atol=1e-3 * np.abs(dx).max(), err_msg=scale)
        assert_allclose(actual_new.mean, new.mean, rtol=1e-5)
        assert_allclose(actual_new.var, new.var, rtol=1e-4)


def test_weights_may_differ_in_size_between_features_and_devices():
    sizes = np.float32([1e-35, 1, 1e36])
    w = WEIGHTS[16, 5, 3]
    expected_mean, expected_var, _ = reference.moments(X, mask=w)
    per_feature = jbn.moments(X, mask=w * sizes)
    assert_allclose(per_feature.mean, expected_mean, rtol=2e-6)
    assert_allclose(per_feature.var, expected_var, rtol=2e-5)
    # Devices of which two have all the weight that counts.
    by_device = np.repeat(np.float32([1e-30, 1, 1e-10, 1e30, 1e30, 1e-35, 1e20, 1]), 2)[:, None, None]
    f = lambda x, w: jbn.moments(x, mask=w, axis_name="i")
    actual = quick_jit(jax.shard_map(f, mesh=MESH, in_specs=P("i"), out_specs=P()))(X, w * by_device)
    mean, var, count = reference.moments(X, mask=np.float64(w) * by_device)
    for leaf, wanted in zip(actual, (mean, var, count)):
        assert_allclose(leaf, wanted, rtol=2e-5)


@pytest.mark.parametrize("way", ["devices", "vmap", "ghosts"])
def test_members_without_weight_have_no_say_in_the_size_of_the_others(way):
    w = np.where(np.arange(16)[:, None, None] < 10, WEIGHTS[16, 5, 1], 0)
    f = quick_jit(
        jax.grad(lambda x, scale: jnp.sum(jnp.sin(WAYS[way](x, w * scale)[0]) * TARGET, where=w > 0))
    )
    expected = f(X, np.float32(1))
    for scale in (1e-36, 1e37):
        actual = f(X, np.float32(scale))
        assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(), err_msg=scale)


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e30, 1e38])
def test_moments_of_any_count_merge_by_their_shares(scale):
    rng = np.random.RandomState(1)
    means, variances, counts = rng.normal(0, 1, (5, 3)), rng.rand(5, 3), rng.uniform(0.2, 3, (5, 3))
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / count
    parts = [
        jbn.Moments(*(jnp.asarray(leaf, jnp.float32) for leaf in leaves))
        for leaves in zip(means, variances, counts * scale)
    ]
    one_by_one = jbn.init(3)[1]
    for part in parts:
        one_by_one = jbn.pooled()(one_by_one, part)
    # A count stops at the largest number, and from there on shares are those of that.
    for whole in [jbn.merge(*parts), one_by_one][: 1 if scale == 1e38 else 2]:
        assert_allclose(whole.mean, mean, rtol=1e-5, atol=1e-6)
        assert_allclose(whole.var, var, rtol=1e-5)
        assert_allclose(whole.count, np.minimum(count * scale, LARGEST), rtol=1e-6)


def test_weights_too_large_for_the_dtype_are_refused():
    for mask in (np.full((16, 5, 1), 1e39), np.full((16, 5, 1), np.inf)):
        with pytest.raises(ValueError, match="mask holds a weight that is negative or not finite in float32"):
            jbn.moments(X, mask=mask)


def test_integer_weights_count_exactly():
    w = RNG.randint(0, 5, (16, 5, 1))
    assert_array_equal(jbn.moments(X, mask=w).count, np.full(3, w.sum()))


def test_units_go_with_running_moments_that_are_wider(x64):
    running = jbn.init(3, dtype=jnp.float64)[1]
    for scale in (1e-35, 1.0):
        w = WEIGHTS[16, 5, 1] * np.float32(scale)
        _, new = jbn.batch_norm(X, None, running, train=True, mask=w, update=jbn.pooled())
        for leaf, wanted in zip(new, reference.moments(X, mask=w)):
            assert leaf.dtype == jnp.float64
            assert_allclose(leaf, wanted, rtol=2e-5)
