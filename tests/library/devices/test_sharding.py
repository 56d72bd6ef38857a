"""Plain jit over a mesh: statistics of a sharded batch are global, with no axis name."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn
from tests.helpers import reference
from tests.helpers.layers import layer, random

X = np.asarray(random((16, 4, 6)))
TARGET, MASK = np.asarray(random(X.shape, mean=0, sd=1, seed=1)), np.random.RandomState(0).rand(16, 4, 1)
KINDS = {"Auto": (AxisType.Auto,) * 2, "Explicit": (AxisType.Explicit,) * 2, "the default": None}
SPECS = {
    "batch": P("data"),
    "features": P(None, None, "model"),
    "batch and features": P("data", None, "model"),
    "batch and positions": P("data", "model"),
    "batch over both": P(("data", "model")),
}
slow = pytest.mark.slow


def mesh(kind):
    options = {} if KINDS[kind] is None else {"axis_types": KINDS[kind]}
    return jax.make_mesh((4, 2), ("data", "model"), **options)


def step_of(train):
    def step(x, params, running, mask, target, flag):
        def loss(x, params):
            y, new = jbn.batch_norm(
                x, params, running, train=flag if train == "traced" else train, mask=mask, update=jbn.ema(0.5)
            )
            return jnp.sum(jnp.sin(y) * target), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    return jax.jit(step)


@cache
def on_one_device(train, masked):
    return step_of(train)(X, *layer(6), np.float32(MASK) if masked else None, TARGET, True)


@pytest.mark.parametrize(
    "kind, spec, train",
    [
        ("Auto", "batch", True),
        ("Explicit", "batch and features", True),
        pytest.param("Explicit", "batch", True, marks=slow),
        pytest.param("Explicit", "features", True, marks=slow),
        pytest.param("Explicit", "batch and positions", True, marks=slow),
        pytest.param("Explicit", "batch over both", True, marks=slow),
        pytest.param("Explicit", "batch and features", False, marks=slow),
        pytest.param("Explicit", "batch and features", "traced", marks=slow),
        pytest.param("Auto", "batch and features", "traced", marks=slow),
        pytest.param("the default", "batch and features", True, marks=slow),
    ],
)
def test_sharded_batch_is_the_batch_on_one_device(kind, spec, train):
    spec, masked = SPECS[spec], spec != "features"
    params, running = layer(6)
    here = mesh(kind)
    with jax.set_mesh(here):
        samples, features = NamedSharding(here, spec), NamedSharding(here, P(*spec[2:]))
        args = [
            jax.device_put(X, samples),
            *jax.device_put((params, running), features),
            jax.device_put(np.float32(MASK), NamedSharding(here, P(*spec[:2]))) if masked else None,
            jax.device_put(TARGET, samples),
            jnp.asarray(True),
        ]
        actual = step_of(train)(*args)
    expected = on_one_device(bool(train), masked)  # traced, it is True
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=3e-5, atol=3e-5), actual, expected)
    (dx, dparams), (y, new) = actual
    assert dx.sharding.is_equivalent_to(samples, 3) and y.sharding.is_equivalent_to(samples, 3)
    for leaf in jax.tree.leaves((dparams, new)):
        assert leaf.sharding.is_equivalent_to(features, 1)
    if train is True:
        assert_allclose(y, reference.batch_norm(X, *params, mask=MASK if masked else None), atol=2e-5)


@slow
@pytest.mark.parametrize("train, jit", [(True, True), ("traced", True), (True, False), (False, True)])
def test_state_that_is_not_sharded_stays_so_beside_sharded_features(train, jit):
    params, running = jbn.init(6)
    flag = jnp.asarray(True) if train == "traced" else train

    def steps(x):
        def step(running, _):
            y, new = jbn.batch_norm(x, params, running, train=flag, update=jbn.ema(0.5))
            return new, y

        return jax.lax.scan(step, running, None, length=2)

    here = mesh("Explicit")
    with jax.set_mesh(here):
        sharded = jax.device_put(X, NamedSharding(here, P("data", None, "model")))
        new, y = (jax.jit(steps) if jit else steps)(sharded)
    mean, var, _ = reference.moments(X)
    used, expected = (
        ((mean, var), (0.75 * mean, 0.25 + 0.75 * var)) if train else ((0 * mean, 1 + 0 * var),) * 2
    )
    assert_allclose(y, [reference.normalize(X, *used)] * 2, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), tuple(new[:2]), expected)
    assert y.sharding.spec == P(None, "data", None, "model")


def test_moments_of_a_sharded_batch_have_the_sharding_of_the_features():
    here = mesh("Explicit")
    with jax.set_mesh(here):
        batch = jax.jit(jbn.moments)(jax.device_put(X, NamedSharding(here, P("data", None, "model"))))
        whole = jax.jit(jbn.merge)(batch, batch)
    for moments in batch, whole:
        assert [leaf.sharding.spec for leaf in moments] == [P("model")] * 3
        assert_allclose(moments.var, reference.moments(X)[1], rtol=1e-5)


@slow
def test_shard_map_over_one_axis_of_a_mesh_leaves_the_others_to_the_compiler():
    params, running = jbn.init(6)
    here = mesh("Auto")
    with jax.set_mesh(here):
        f = lambda x: jbn.batch_norm(x, params, running, train=True, axis_name="data")
        mapped = jax.shard_map(f, in_specs=P("data"), out_specs=(P("data"), P()), axis_names={"data"})
        y, new = jax.jit(mapped)(jax.device_put(X, NamedSharding(here, P("data", None, "model"))))
    assert_allclose(y, reference.batch_norm(X), atol=2e-5)
    assert_allclose(new.mean, 0.01 * reference.moments(X)[0], rtol=1e-5)
