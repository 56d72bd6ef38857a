"""Devices and members of a vmap that share among their group only, and the names that they share under."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn._collectives import NamedAxes, named_axes, smallest_group
from tests.helpers.layers import layer, on_devices, per_example, random, train

SHAPE = (16, 5, 3)
GROUPS = [[0, 5, 2], [1, 3, 4, 6, 7]]


def of_devices(x, mask, params, running):
    def f(*args):
        y, new = train(*args, axis_name=("a", "b"), axis_index_groups=GROUPS)
        return y, jax.tree.map(lambda leaf: leaf[None], new)

    return on_devices(f, ("a", "b"), out_specs=P(("a", "b")))(x, mask, params, running)


def in_vmap(x, mask, params, running):
    f = partial(train, axis_name="i", axis_index_groups=GROUPS)
    shards = lambda x: x.reshape(8, 2, *x.shape[1:])
    y, new = jax.vmap(f, (0, 0, None, None), axis_name="i")(shards(x), shards(mask), params, running)
    return y.reshape(x.shape), new


def in_vmap_in_shard_map(x, mask, params, running):
    def f(x, mask, params, running):
        g = partial(train, axis_name=("a", "i"), axis_index_groups=GROUPS)
        return jax.vmap(g, (0, 0, None, None), axis_name="i")(x, mask, params, running)

    shards = lambda x: x.reshape(8, 2, *x.shape[1:])
    mapped = on_devices(f, "a", check_vma=False, out_specs=P("a"))
    y, new = mapped(shards(x), shards(mask), params, running)
    return y.reshape(x.shape), new


def one_after_the_other(x, mask, params, running):
    y, new = jnp.zeros_like(x), [None] * 8
    for group in GROUPS:
        rows = np.concatenate([np.arange(16).reshape(8, -1)[i] for i in group])
        y_group, new_group = train(x[rows], mask[rows], params, running)
        y = y.at[rows].set(y_group)
        for i in group:
            new[i] = new_group
    return y, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)


@cache
def program(way):
    """Returns loss, `y`, the running moments of each member, and gradients."""

    def loss(x, params, mask, running, target):
        y, new = way(x, mask, params, running)
        return jnp.sum(jnp.sin(y) * target), (y, new)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def batch():
    params, running = layer(3, "float64")
    weights = np.random.RandomState(7).gamma(1.0, size=SHAPE)
    x, target = random(SHAPE, "float64"), random(SHAPE, "float64", 0.0, 1.0, seed=3)
    return np.array(x), params, weights, running, np.asarray(target)


@pytest.mark.parametrize(
    "way",
    [
        of_devices,
        pytest.param(in_vmap, marks=pytest.mark.slow),
        pytest.param(in_vmap_in_shard_map, marks=pytest.mark.slow),
    ],
)
def test_groups_of_any_sizes_share_among_themselves_only(x64, way):
    actual, expected = (program(f)(*batch()) for f in (way, one_after_the_other))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-11, atol=1e-11), actual, expected)


def test_nan_in_one_group_does_not_reach_another(x64):
    x, params, mask, *rest = batch()
    x[0] = np.nan  # of member 0, in the first group
    y, new = jax.tree.map(np.asarray, program(of_devices)(x, params, mask, *rest)[0][1])
    first = np.isin(np.arange(8), GROUPS[0])
    assert np.isnan(y[np.repeat(first, 2)]).all() and np.isfinite(y[np.repeat(~first, 2)]).all()
    assert_array_equal(new.mean[first], 0)
    assert np.all(new.mean[~first] != 0)


# Arguments.


def test_bad_names_and_groups_are_named():
    x, (params, running) = random((4, 5, 3)), layer(3)
    partition = "0 to 3, in exactly one group, and no empty group"
    for options, message in [
        (
            {"axis_name": "nowhere"},
            "axis_name='nowhere': 'nowhere' is not bound here.*shard_map.*jax.vmap.*axis_name=None",
        ),
        ({"axis_name": ("i", "there")}, "'there' is not bound"),
        ({"axis_name": ("i", "i")}, "names an axis twice"),
        ({"axis_name": "i", "axis_index_groups": [[0, 1]]}, partition),
        ({"axis_name": "i", "axis_index_groups": [[0, 1], [1, 2, 3]]}, partition),
        ({"axis_name": "i", "axis_index_groups": [[], [0, 1, 2, 3]]}, partition),
        ({"axis_name": "i", "axis_index_groups": [[0, 1, 2, 3], ()]}, partition),
        (
            {"axis_name": "i", "axis_index_groups": [0, 1, 2, 3]},
            r"\[0, 1, 2, 3\] with axis_name='i'; expected each",
        ),
        ({"axis_index_groups": [[0, 1]]}, "needs axis_name, which is None"),
    ]:
        for call in (
            partial(train, mask=None, params=params, running=running, **options),
            partial(jbn.moments, **options),
        ):
            with pytest.raises(ValueError, match=message):
                jax.vmap(call, axis_name="i")(x)


@pytest.mark.skipif(jax.__version_info__ < (0, 8, 2), reason="JAX fails later, outside of the layer")
def test_vmap_axis_in_a_checked_shard_map_names_the_way_out():
    x, (params, running) = random(SHAPE), layer(3)
    for f in per_example(["i"]), per_example(["i"], over=("i", "a")):
        with pytest.raises(ValueError, match="names a vmap axis inside a jax.shard_map.*check_vma=False"):
            jax.eval_shape(on_devices(f, "a"), x, None, params, running)


def test_names_and_groups_are_hashable_and_counted():
    def f(x):
        one = named_axes("i", None)
        assert one == NamedAxes(("i",)) and smallest_group(one) == 8
        grouped = named_axes(["i"], np.array([[0, 1, 2], [3, 4, 5]]).tolist() + [[6, 7]])
        assert grouped == NamedAxes(("i",), ((0, 1, 2), (3, 4, 5), (6, 7))) and smallest_group(grouped) == 2
        assert hash(grouped) == hash(NamedAxes(("i",), ((0, 1, 2), (3, 4, 5), (6, 7))))
        assert smallest_group(named_axes(None, None)) == 1
        return x

    jax.vmap(f, axis_name="i")(jnp.arange(8.0))
