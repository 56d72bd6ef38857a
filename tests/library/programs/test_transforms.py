"""Every transform of JAX, and every pair with a derivative, gives what the plain formula gives in float64."""

from functools import cache
from itertools import combinations_with_replacement, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn

MESH = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
ROWS, FEATURES = 8, 2
THETA = np.array([0.3, -0.7])
DIRECTION = np.array([1.0, 0.5])


def data():
    rng = np.random.RandomState(0)
    # samples, how theta moves them, weights, and what the loss wants
    return {
        "x": rng.normal(2, 1.5, (ROWS, 3, FEATURES)),
        "slope": rng.normal(0, 1, (ROWS, 3, FEATURES)),
        "weights": rng.gamma(1.0, size=(ROWS, 3, FEATURES)),
        "target": rng.normal(0, 1, (ROWS, 3, FEATURES)),
    }


def moved(theta, data):
    return data["x"] + jnp.sin(data["slope"] * theta[None, None])


def ours(theta, data, names):
    """A vector of which every entry depends on x, scale and bias, and they on theta."""
    y, _ = jbn.batch_norm(
        moved(theta, data),
        jbn.Params(1 + theta**2, jnp.cos(theta)),
        jbn.init(FEATURES)[1],
        train=True,
        mask=data["weights"],
        axis_name=names,
    )
    total = jnp.sum(jnp.sin(y) * data["target"], (0, 1))
    return jax.lax.psum(total, names) if names else total


def plain(theta, data, names):
    x, weights = moved(theta, data), data["weights"]
    count = weights.sum((0, 1), keepdims=True)
    mean = jnp.sum(weights * x, (0, 1), keepdims=True) / count
    var = jnp.sum(weights * (x - mean) ** 2, (0, 1), keepdims=True) / count
    y = (x - mean) / jnp.sqrt(var + 1e-5) * (1 + theta**2)[None, None] + jnp.cos(theta)[None, None]
    return jnp.sum(jnp.sin(y) * data["target"], (0, 1))


# Each takes such a function to another one. Those of the first kind change the value.


def scalar(f, data, names):
    return lambda theta: jnp.sum(jnp.sin(f(theta, data, names)))


DERIVATIVES = {
    "grad": lambda f: lambda theta, *rest: jax.grad(scalar(f, *rest))(theta),
    "jvp": lambda f: lambda theta, *rest: jax.jvp(lambda t: f(t, *rest), (theta,), (direction(theta),))[1],
    "linearize": lambda f: (
        lambda theta, *rest: jax.linearize(lambda t: f(t, *rest), theta)[1](direction(theta))
    ),
    "hessian": lambda f: lambda theta, *rest: jax.hessian(scalar(f, *rest))(theta) @ direction(theta),
}


def direction(theta):
    return jnp.asarray(DIRECTION, theta.dtype)


def vmap(f):
    return lambda theta, *rest: jax.vmap(lambda t: f(t, *rest))(jnp.stack([2 * theta, theta]))[1]


def scan(f):
    def scanned(theta, *rest):
        step = lambda total, t: (total + f(t, *rest), None)
        return jax.lax.scan(step, -f(2 * theta, *rest), jnp.stack([2 * theta, theta]))[0]

    return scanned


def shard_map(f):
    def mapped(theta, data, names):
        name = "b" if "a" in names else "a"
        g = lambda theta, data: f(theta, data, (*names, name))
        return jax.shard_map(
            g, mesh=None if names else MESH, in_specs=(P(), P(name)), out_specs=P(), axis_names={name}
        )(theta, data)

    return mapped


WRAPPERS = {
    "jit": lambda f: lambda theta, data, names: jax.jit(lambda t, d: f(t, d, names))(theta, data),
    "vmap": vmap,
    "checkpoint": lambda f: (
        lambda theta, data, names: jax.checkpoint(lambda t, d: f(t, d, names))(theta, data)
    ),
    "scan": scan,
    "shard_map": shard_map,
}


ALL = DERIVATIVES | WRAPPERS
# The gradient of a wrapper takes its jvp, linearizes and transposes it; the Hessian takes a jvp of that.
PAIRS = [
    *combinations_with_replacement(["grad", "jvp", "linearize"], 2),
    *product(["grad"], ["hessian", *WRAPPERS]),
    *product(["hessian"], ["vmap", "shard_map"]),
    *product(["vmap", "scan", "shard_map"], ["grad"]),
]
if jax.__version_info__ >= (0, 9):  # before, JAX cannot lower lax.axis_index in a shard_map inside another
    PAIRS.append(("shard_map", "shard_map"))


def run(f):
    return jax.jit(lambda theta, data: f(theta, data, ()))(THETA, data())


@cache
def derivative_of_plain(*names):
    with jax.enable_x64(True):
        return np.asarray(run(compose(names, plain)))


def compose(names, f):
    for name in reversed(names):
        f = ALL[name](f)
    return f


def check(*names):
    expected = derivative_of_plain(*(name for name in names if name in DERIVATIVES))
    assert_allclose(run(compose(names, ours)), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_each_transform(x64, name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("outer, inner", PAIRS)
def test_pairs_of_transforms(x64, outer, inner):
    check(outer, inner)


@pytest.mark.slow
def test_fourth_derivative(x64):
    check("jvp", "jvp", "jvp", "jvp")


def test_jet_does_not_work_yet():
    # When it does, its line in the docstring of jbn.batch_norm can go.
    x = jnp.asarray(data()["x"], jnp.float32)
    f = lambda x: jbn.batch_norm(x, None, jbn.init(FEATURES)[1], train=True)[0]
    with pytest.raises(Exception, match="JetTracer|process_custom_jvp_call|process_primitive"):
        jet.jet(f, (x,), ((x, x),))


@pytest.mark.slow
def test_without_jit_nothing_is_another_value():
    x = jnp.asarray(data()["x"], jnp.float32)
    params, running = jbn.init(FEATURES)

    def loss(x, params):
        y, new = jbn.batch_norm(x, params, running, train=True)
        return jnp.sum(jnp.sin(y)), new

    derived = jax.value_and_grad(loss, has_aux=True)
    with jax.disable_jit():
        actual = derived(x, params)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(jax.jit(derived)(x, params)), strict=True):
        assert_allclose(a, b, rtol=1e-5, atol=1e-5)
