"""Plain jit over a mesh: statistics of a sharded batch are global, with no axis name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn

SHAPE = (16, 4, 6)
KINDS = {"Auto": (AxisType.Auto,) * 2, "Explicit": (AxisType.Explicit,) * 2, "the default": None}
SPECS = {
    "batch": P("data"),
    "features": P(None, None, "model"),
    "batch and features": P("data", None, "model"),
    "batch and positions": P("data", "model"),
    "batch over both": P(("data", "model")),
}


def step(x, params, running, mask, target, train):
    def loss(x, params):
        y, new = jbn.batch_norm(x, params, running, train=train, mask=mask, update=jbn.ema(0.5))
        return jnp.sum(jnp.sin(y) * target), (y, new)

    return jax.grad(loss, (0, 1), has_aux=True)(x, params)


@pytest.mark.parametrize(
    "spec, train",
    [*((spec, True) for spec in SPECS), *(("batch and features", train) for train in (False, "traced"))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_batch_is_the_batch_on_one_device(kind, spec, train):
    rng, spec = np.random.RandomState(0), SPECS[spec]
    x, target = np.float32(rng.normal(3, 2, SHAPE)), np.float32(rng.normal(0, 1, SHAPE))
    mask = np.float32(rng.rand(*SHAPE[:2], 1)) if spec != SPECS["features"] else None
    params = jbn.Params(np.float32(rng.normal(1, 0.3, 6)), np.float32(rng.normal(0, 1, 6)))
    _, running = jbn.init(6)
    static = {} if train == "traced" else {"static_argnums": 5}
    flag = jnp.asarray(True) if train == "traced" else train
    expected = jax.jit(step, **static)(x, params, running, mask, target, flag)

    options = {} if KINDS[kind] is None else {"axis_types": KINDS[kind]}
    mesh = jax.make_mesh((4, 2), ("data", "model"), **options)
    with jax.set_mesh(mesh):
        samples, features = NamedSharding(mesh, spec), NamedSharding(mesh, P(*spec[2:]))
        args = [
            jax.device_put(x, samples),
            *jax.device_put((params, running), features),
            None if mask is None else jax.device_put(mask, NamedSharding(mesh, P(*spec[:2]))),
            jax.device_put(target, samples),
            flag,
        ]
        actual = jax.jit(step, **static)(*args)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=3e-5, atol=3e-5), actual, expected)
    (dx, dparams), (y, new) = actual
    assert dx.sharding.is_equivalent_to(samples, 3) and y.sharding.is_equivalent_to(samples, 3)
    for leaf in jax.tree.leaves((dparams, new)):
        assert leaf.sharding.is_equivalent_to(features, 1)
    if train is True:
        assert_allclose(y, reference.batch_norm(x, *params, mask=mask), atol=2e-5)


@pytest.mark.parametrize("train", [True, False, "traced"])
@pytest.mark.parametrize("jit", [True, False])
def test_state_that_is_not_sharded_stays_so_beside_sharded_features(jit, train):
    x = np.float32(np.random.RandomState(0).normal(3, 2, SHAPE))
    params, running = jbn.init(6)
    flag = jnp.asarray(True) if train == "traced" else train

    def steps(x):
        def step(running, _):
            y, new = jbn.batch_norm(x, params, running, train=flag, update=jbn.ema(0.5))
            return new, y

        return jax.lax.scan(step, running, None, length=2)

    expected = steps(x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
        new, y = (jax.jit(steps) if jit else steps)(sharded)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), (new, y), expected)
    assert y.sharding.spec == P(None, "data", None, "model")


def test_moments_of_a_sharded_batch_have_the_sharding_of_the_features():
    x = np.float32(np.random.RandomState(0).normal(3, 2, SHAPE))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        batch = jax.jit(jbn.moments)(jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))))
        whole = jax.jit(jbn.merge)(batch, batch)
    for moments in batch, whole:
        assert [leaf.sharding.spec for leaf in moments] == [P("model")] * 3
        assert_allclose(moments.var, reference.moments(x)[1], rtol=1e-5)


def test_shard_map_over_one_axis_of_a_mesh_leaves_the_others_to_the_compiler():
    x = np.float32(np.random.RandomState(0).normal(3, 2, SHAPE))
    params, running = jbn.init(6)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        f = lambda x: jbn.batch_norm(x, params, running, train=True, axis_name="data")
        mapped = jax.shard_map(f, in_specs=P("data"), out_specs=(P("data"), P()), axis_names={"data"})
        y, new = jax.jit(mapped)(jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))))
    assert_allclose(y, reference.batch_norm(x), atol=2e-5)
    assert_allclose(new.mean, 0.01 * reference.moments(x)[0], rtol=1e-5)
