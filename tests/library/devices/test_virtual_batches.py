"""Virtual batches over devices: each device has its own, and only the running moments take a collective."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn
from tests.helpers import reference
from tests.helpers.compiled import collectives

DEVICES, ROWS = 8, 24
RNG = np.random.RandomState(0)
X, TARGET = (np.float32(RNG.normal(mean, 2, (ROWS, 5, 3))) for mean in (3, 0))
MASK = RNG.rand(ROWS, 1, 1).astype(np.float32)
PARAMS = jbn.Params(*np.float32(RNG.normal(1, 0.3, (2, 3))))
RUNNING = jbn.Moments(*np.float32([[0] * 3, [1] * 3, [0] * 3]))


def layer(x, size, mask=None, params=PARAMS, **options):
    return jbn.batch_norm(
        x, params, RUNNING, train=True, mask=mask, update=jbn.ema(0.5), virtual_batch_size=size, **options
    )


@cache
def expected(size, masked=False):
    """Returns output and gradients of sum(y * target), and the running moments."""
    cuts = len(X) // size if len(X) % size == 0 else -(-len(X) // size)
    parts = zip(*(np.array_split(leaf, cuts) for leaf in (X, MASK if masked else np.ones_like(MASK), TARGET)))
    y, gradients = [], []
    for x, mask, dy in parts:
        y.append(reference.batch_norm(x, *PARAMS, mask=mask))
        gradients.append(reference.gradients(x, dy, PARAMS.scale, mask=mask))
    dx, dscale, dbias = zip(*gradients)
    mean, var, _ = reference.moments(X, mask=MASK if masked else None)
    new = mean / 2, 0.5 + var / 2, np.ones(3)
    return np.concatenate(y), (np.concatenate(dx), (sum(dscale), sum(dbias))), new


def assert_close(actual, wanted, tolerance=3e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_parts_are_per_device_and_collectives_touch_only_the_running_moments():
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(AxisType.Auto,))
    f = partial(layer, size=2, axis_name="i")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=(P("i"), P()))
    y, new = jax.jit(mapped)(X)
    wanted = [
        reference.batch_norm(part, *PARAMS)
        for shard in np.split(X, DEVICES)
        for part in (shard[:2], shard[2:])
    ]
    assert_close((y, new), (np.concatenate(wanted), expected(3)[2]))
    assert collectives(mapped, X) == ["all-reduce"]
    assert collectives(jax.grad(lambda x: jnp.sum(mapped(x)[0] * TARGET)), X) == []


@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
def test_n_over_devices_gives_local_statistics_under_plain_jit(kind):
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(kind,))
    size = ROWS // DEVICES
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("i")))
        y, new = jax.jit(partial(layer, size=size))(x)
        assert_close((y, new), (expected(size)[0], expected(size)[2]))
        assert y.sharding.is_equivalent_to(x.sharding, y.ndim)

        def loss(x):
            y, _ = layer(x, size)
            return jnp.sum(y * TARGET), y

        assert collectives(jax.grad(loss, has_aux=True), x) == []  # forward and backward


@pytest.mark.slow
@pytest.mark.parametrize("size, of_x, of_mask", [(5, P("i"), P("i")), (3, P("i"), P()), (3, P(), P("i"))])
def test_parts_are_exact_however_x_and_mask_are_sharded_on_an_explicit_mesh(size, of_x, of_mask):
    def loss(x, mask, params):
        y, new = layer(x, size, mask, params)
        return jnp.sum(y * TARGET), (y, new)

    f = jax.jit(jax.grad(loss, (0, 2), has_aux=True))
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, mask = (jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in ((X, of_x), (MASK, of_mask)))
        (dx, dparams), (y, new) = f(x, mask, PARAMS)
    wanted_y, wanted_gradients, wanted_new = expected(size, masked=True)
    assert_close((y, (dx, dparams), new), (wanted_y, wanted_gradients, wanted_new))
    assert y.sharding.spec == dx.sharding.spec == P(*of_x, *[None] * (3 - len(of_x)))
