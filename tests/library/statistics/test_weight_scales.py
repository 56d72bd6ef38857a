"""Weights of any size: only their ratios matter to mean, variance, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference

RNG = np.random.RandomState(0)
X = RNG.normal(0.02, 0.01, (16, 5, 3)).astype(np.float32)
TARGET = RNG.normal(0, 1, X.shape).astype(np.float32)
# Between 0.2 and 1, some 0; so that the smallest scales leave no weight below the normal numbers.
WEIGHTS = {
    shape: (RNG.uniform(0.2, 1, shape) * (RNG.rand(*shape) < 0.8)).astype(np.float32)
    for shape in [(16, 1, 1), (16, 5, 1), (16, 5, 3), (1, 5, 1)]
}
SCALES = np.float32([1e-37, 1e-35, 1e-20, 1e20, 1e30, 1e37, 3e38])
LARGEST = np.finfo(np.float32).max
MESH = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))

measure = jax.jit(lambda w: jbn.moments(X, mask=w))


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


WAYS = {
    "whole": whole,
    "devices": on_devices,
    "vmap": in_vmap,
    "groups in vmap": groups_in_vmap,
    "ghosts": lambda x, w: whole(x, w, virtual_batch_size=5),
}


def test_moments_are_those_of_float64_for_weights_of_any_size():
    for shape, w in WEIGHTS.items():
        mean, var, count = reference.moments(X, mask=w)
        results = [measure(w * scale) for scale in SCALES]
        if shape == (16, 5, 1):
            in_vmap = jax.jit(jax.vmap(lambda w: jbn.moments(X, mask=w)))
            results += zip(*in_vmap(w * SCALES[:, None, None, None]))
        for scale, actual in zip([*SCALES] * 2, results):
            assert_allclose(actual[0], mean, rtol=2e-6, err_msg=(shape, scale))
            assert_allclose(actual[1], var, rtol=2e-5, err_msg=(shape, scale))
            expected = np.minimum(count * np.float64(scale), LARGEST)
            assert_allclose(actual[2], expected, rtol=2e-6, err_msg=(shape, scale))


@pytest.mark.parametrize(
    "way", ["whole", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "whole")]
)
def test_outputs_states_and_gradients_are_those_of_weights_of_a_usual_size(way):
    def loss(x, w, target):
        y, new = WAYS[way](x, w)
        return jnp.sum(jnp.sin(y) * target), (y, new)

    f = jax.jit(jax.grad(loss, has_aux=True))
    # In groups the lighter one has nothing left of small weights.
    cases = [(WEIGHTS[16, 5, 1], SCALES[SCALES > 1] if way == "groups in vmap" else SCALES)]
    if way in ("devices", "vmap", "ghosts"):
        # Members without weight have no say in the size of the others.
        some = np.where(np.arange(16)[:, None, None] < 10, WEIGHTS[16, 5, 1], 0)
        cases.append((some, np.float32([1e-36, 1e37])))
    for w, scales in cases:
        target = TARGET * (w > 0)
        dx, (y, new) = f(X, w, target)
        for scale in scales:
            actual_dx, (actual_y, actual_new) = f(X, w * scale, target)
            assert_allclose(actual_y, y, rtol=1e-4, atol=1e-4, err_msg=scale)
            assert_allclose(actual_dx, dx, rtol=1e-3, atol=1e-3 * np.abs(dx).max(), err_msg=scale)
            assert_allclose(actual_new.mean, new.mean, rtol=1e-5, err_msg=scale)
            assert_allclose(actual_new.var, new.var, rtol=1e-4, err_msg=scale)


def test_weights_may_differ_in_size_between_features():
    w = WEIGHTS[16, 5, 3]
    mean, var, _ = reference.moments(X, mask=w)
    batch = measure(w * np.float32([1e-35, 1, 1e36]))
    assert_allclose(batch.mean, mean, rtol=2e-6)
    assert_allclose(batch.var, var, rtol=2e-5)


@pytest.mark.slow
def test_weights_may_differ_in_size_between_devices():
    # Two of them have all the weight that counts.
    by_device = np.repeat(np.float32([1e-30, 1, 1e-10, 1e30, 1e30, 1e-35, 1e20, 1]), 2)[:, None, None]
    w = WEIGHTS[16, 5, 3]
    f = lambda x, w: jbn.moments(x, mask=w, axis_name="i")
    actual = jax.jit(jax.shard_map(f, mesh=MESH, in_specs=P("i"), out_specs=P()))(X, w * by_device)
    for leaf, expected in zip(actual, reference.moments(X, mask=np.float64(w) * by_device)):
        assert_allclose(leaf, expected, rtol=2e-5)


def test_moments_of_any_count_merge_by_their_shares():
    rng = np.random.RandomState(1)
    means, variances, counts = rng.normal(0, 1, (5, 3)), rng.rand(5, 3), rng.uniform(0.2, 3, (5, 3))
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / count
    merge, pool = jax.jit(jbn.merge), jax.jit(jbn.pooled())
    for scale in 1e-35, 1e-20, 1e20, 1e30, 1e38:
        parts = [jbn.Moments(*map(np.float32, leaves)) for leaves in zip(means, variances, counts * scale)]
        wholes = [merge(*parts)]
        if scale < 1e38:  # a count stops at the largest number, and from there on shares are those of that
            one_by_one = jbn.init(3)[1]
            for part in parts:
                one_by_one = pool(one_by_one, part)
            wholes.append(one_by_one)
        for whole in wholes:
            assert_allclose(whole.mean, mean, rtol=1e-5, atol=1e-6, err_msg=scale)
            assert_allclose(whole.var, var, rtol=1e-5, err_msg=scale)
            assert_allclose(whole.count, np.minimum(count * scale, LARGEST), rtol=1e-6, err_msg=scale)


def test_weights_too_large_for_the_dtype_are_refused():
    for mask in (np.full((16, 5, 1), 1e39), np.full((16, 5, 1), np.inf)):
        with pytest.raises(ValueError, match="mask holds a weight that is negative or not finite in float32"):
            jbn.moments(X, mask=mask)


def test_integer_weights_count_exactly():
    w = RNG.randint(0, 5, (16, 5, 1))
    assert_array_equal(measure(w).count, np.full(3, w.sum()))


def test_units_go_with_running_moments_that_are_wider(x64):
    running = jbn.Moments(np.zeros(3), np.ones(3), np.zeros(3))
    f = jax.jit(
        lambda w: jbn.batch_norm(X, None, running, train=True, mask=w, update=jbn.pooled())[1],
    )
    for scale in (1e-35, 1.0):
        w = WEIGHTS[16, 5, 1] * np.float32(scale)
        for leaf, wanted in zip(f(w), reference.moments(X, mask=w)):
            assert leaf.dtype == jnp.float64
            assert_allclose(leaf, wanted, rtol=2e-5)
