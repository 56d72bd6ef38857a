"""Domains over devices, and over the members of a `vmap`: merged by count, domain by domain."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn
from benchmarks.devices import all_reduces
from tests.helpers.compiled import collectives
from tests.helpers.layers import random

X = random((16, 2, 3))
INDEX = np.random.RandomState(0).randint(0, 3, 16)
MASK = (
    np.random.RandomState(1).gamma(1.0, size=(16, 2, 1)).astype(np.float32)
    * (np.arange(16) != 4)[:, None, None]
)
TARGET = np.asarray(random((16, 2, 3), seed=7))
PARAMS, RUNNING = jbn.init(3)[0], jbn.init((4, 3))[1]


def train(x, index, mask, running=RUNNING, **options):
    return jbn.batch_norm(
        x, PARAMS, running, train=True, domain=index, mask=mask, update=jbn.ema(0.5), **options
    )


def with_gradient(f):
    """Return the outputs, the new running moments, and the gradient to `x`."""

    def g(x, *args):
        (y, new), pull = jax.vjp(lambda x: f(x, *args), x)
        return y, new, pull((TARGET, jax.tree.map(jnp.zeros_like, new)))[0]

    return jax.jit(g)


def mapped(check_vma, **options):
    """Train on 8 devices, of which each has two examples of whatever domains."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    specs = dict(in_specs=(P("d"),) * 3, out_specs=(P("d"), P()), check_vma=check_vma)
    return jax.shard_map(partial(train, axis_name="d", **options), mesh=mesh, **specs)


def per_example(x, index, mask):
    one = partial(train, axis_name="i")
    return jax.vmap(one, (0, 0, 0), (0, None), axis_name="i")(x, index, mask)


def per_pair(x, index, mask):
    halves = [leaf.reshape(8, 2, *leaf.shape[1:]) for leaf in (x, index, mask)]
    y, new = jax.vmap(partial(train, axis_name="i"), 0, (0, None), axis_name="i")(*halves)
    return y.reshape(x.shape), new


WAYS = {
    "shard_map": mapped(True),
    "shard_map, unchecked": mapped(False),
    "shard_map, groups of all": mapped(False, axis_index_groups=[list(range(8))]),
    "vmap of examples": per_example,
    "vmap of pairs": per_pair,
}


@pytest.fixture(scope="module")
def on_one_device():
    return with_gradient(train)(X, INDEX, MASK)


@pytest.mark.parametrize(
    "way", ["shard_map", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "shard_map")]
)
def test_a_batch_in_parts_is_the_batch(way, on_one_device):
    actual = with_gradient(WAYS[way])(X, INDEX, MASK)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=3e-5, atol=3e-5), actual, on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_batch_that_is_sharded_is_the_batch_on_one_device(kind, on_one_device):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType[kind],))
    with jax.set_mesh(mesh):
        sharded = jax.device_put((X, INDEX, MASK), NamedSharding(mesh, P("d")))
        with_target = jax.device_put(TARGET, NamedSharding(mesh, P("d")))

        def step(x, index, mask, target):
            (y, new), pull = jax.vjp(lambda x: train(x, index, mask), x)
            return y, new, pull((target, jax.tree.map(jnp.zeros_like, new)))[0]

        for index in sharded[1], INDEX:
            actual = jax.jit(step)(sharded[0], index, sharded[2], with_target)
            jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=3e-5, atol=3e-5), actual, on_one_device)
            assert actual[0].sharding.is_equivalent_to(sharded[0].sharding, 3)


@pytest.mark.slow
def test_groups_of_devices_keep_their_domains_apart():
    groups = [[0, 1, 2], [3, 4, 5, 6, 7]]
    f = jax.shard_map(
        partial(train, axis_name="d", axis_index_groups=groups),
        mesh=jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)),
        in_specs=(P("d"),) * 3,
        out_specs=(P("d"), P("d")),
        check_vma=False,
    )
    y, new = jax.jit(f)(X, INDEX, MASK)
    for rows, device in (slice(0, 6), 0), (slice(6, 16), 7):
        wanted, moments = train(X[rows], INDEX[rows], MASK[rows])
        assert_allclose(y[rows], wanted, rtol=3e-5, atol=3e-5)
        for leaf, own in zip(new, moments):
            assert_allclose(leaf.reshape(8, 4, 3)[device], own, rtol=1e-5)


def test_a_layer_takes_one_collective_each_way():
    forward = mapped(True)
    assert len(collectives(forward, X, INDEX, MASK)) == 1
    assert len(collectives(with_gradient(forward), X, INDEX, MASK)) == 2


def test_a_sharded_batch_under_plain_jit_sends_sums_and_no_examples():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x, index = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("d")))
        for shape, dtype in (((1024, 2, 3), "float32"), ((1024,), "int32"))
    )

    def step(x, index):
        (y, new), pull = jax.vjp(lambda x: train(x, index, None), x)
        return y, new, pull((y, jax.tree.map(jnp.zeros_like, new)))[0]

    sent = list(all_reduces(jax.jit(step).lower(x, index).compile().as_text()))
    always = [size for size, in_branch in sent if not in_branch]
    # The two sums of the forward pass and the counts, and those of the backward pass, of 4 domains.
    assert len(always) <= 4 and max(always) <= 3 * 4 * 3 * 4
    assert set(collectives(step, x, index)) == {"all-reduce"}


@pytest.mark.parametrize("kind", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)])
def test_statistics_are_local_to_a_device_by_ghost_batches(kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType[kind],))
    local = partial(train, mask=None, virtual_batch_size=2)
    with jax.set_mesh(mesh):
        x, index, target = jax.device_put((X, INDEX, TARGET), NamedSharding(mesh, P("d")))
        y = np.asarray(jax.jit(local)(x, index)[0])

        def loss(x, index, target):
            y, _ = local(x, index)
            return jnp.sum(y * target), y

        assert collectives(jax.grad(loss, has_aux=True), x, index, target) == []
    for i in range(0, 16, 2):
        assert_allclose(y[i : i + 2], train(X[i : i + 2], INDEX[i : i + 2], None)[0], rtol=3e-5, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_weights_that_examples_share_count_for_each_on_a_mesh_too(kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType[kind],))
    mask = np.float32([1, 0, 2])
    wanted = train(X, INDEX, mask)
    with jax.set_mesh(mesh):
        x, index = jax.device_put((X, INDEX), NamedSharding(mesh, P("d")))
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=3e-5, atol=3e-5), jax.jit(train)(x, index, mask), wanted
        )


@pytest.mark.slow
def test_programs_for_batches_of_any_size_take_domains():
    n, *_ = export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, 2, 3), "float32"), jax.ShapeDtypeStruct((n,), "int32")
    step = jax.jit(lambda x, index: train(x, index, None))
    exported = export.export(step, platforms=("cpu", "cuda", "tpu"))(*shapes)
    y, new = exported.call(X, INDEX.astype(np.int32))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), (y, new), train(X, INDEX, None))
