"""The NNX module under NNX's transforms, and JAX's, gives what Flax's own module gives there."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import TraceContextError
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.nnx
from tests.helpers.flax_layers import Block
from tests.helpers.layers import random

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = np.asarray(random((8, 4), mean=1))
BOTH = (jbn.nnx.BatchNorm, nnx.BatchNorm)


def close(actual, expected, tolerance=2e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.max(np.abs(b))))


def state(model):
    return nnx.to_pure_dict(nnx.state(model))


@cache
def one_step(model, norm):
    """Builds a model and takes a step: state before, and output, gradients and state after."""

    @jax.jit
    def run(x):
        built = model(norm, nnx.Rngs(0))
        before = state(built)

        def loss(built):
            y = built(x)
            return jnp.sum(jnp.cos(y + jnp.arange(4.0))), y

        (_, y), grads = nnx.value_and_grad(loss, has_aux=True)(built)
        return before, (y, nnx.to_pure_dict(grads), state(built))

    return run(X)


class Members(nnx.Module):
    """An ensemble: each member has its own parameters and statistics."""

    def __init__(self, norm, rngs):
        make = nnx.vmap(lambda key: Block(norm, nnx.Rngs(key)))
        self.members = make(jax.random.split(rngs.params(), 3))

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x)


class Parts(nnx.Module):
    """One block for all parts of a batch, which share statistics."""

    def __init__(self, norm, rngs):
        self.block = Block(norm, rngs, axis_name="parts")

    def __call__(self, x):
        apply = nnx.vmap(lambda block, x: block(x), in_axes=(None, 0), axis_name="parts")
        return apply(self.block, x.reshape(4, 2, 4)).reshape(8, 4)


class Layers(nnx.Module):
    """A scan over layers."""

    def __init__(self, norm, rngs):
        make = nnx.vmap(lambda key: Block(norm, nnx.Rngs(key)))
        self.blocks = make(jax.random.split(rngs.params(), 3))

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class Rematerialized(nnx.Module):
    def __init__(self, norm, rngs):
        self.block = Block(norm, rngs)

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x)


class Twice(nnx.Module):
    def __init__(self, norm, rngs):
        self.block = Block(norm, rngs)

    def __call__(self, x):
        return self.block(self.block(x))


class Branches(nnx.Module):
    def __init__(self, norm, rngs):
        self.first, self.second = Block(norm, rngs), Block(norm, rngs)

    def __call__(self, x):
        first, second = (lambda m, x: m.first(x)), (lambda m, x: m.second(x))
        return nnx.cond(x[0, 0] < 1e6, first, second, self, x)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "model",
    [
        Block,
        Parts,
        *(pytest.param(each, marks=slow) for each in (Members, Layers, Rematerialized, Twice, Branches)),
    ],
)
def test_transform_gives_what_it_gives_with_flax(model):
    (before, ours), (expected_before, theirs) = (one_step(model, norm) for norm in BOTH)
    jax.tree.map(assert_array_equal, before, expected_before)
    close(ours, theirs)


def test_parts_with_an_axis_name_are_the_whole_batch():
    whole, (y, grads, after) = (one_step(model, jbn.nnx.BatchNorm)[1] for model in (Block, Parts))
    close((y, grads["block"], after["block"]), whole)


@slow
def test_rematerialized_layer_updates_its_statistics_once():
    plain, again = (one_step(model, jbn.nnx.BatchNorm)[1][2] for model in (Block, Rematerialized))
    assert_array_equal(plain["bn"]["mean"], again["block"]["bn"]["mean"])


@slow
def test_optimizer_updates_parameters_alone_and_training_is_as_with_flax():
    target = np.sin(X)

    def train(norm):
        model = Block(norm, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - target) ** 2))(model)
            optimizer.update(model, grads)
            return loss

        losses = [step(model, optimizer) for _ in range(20)]
        model.eval()
        return np.array(losses), model(X), state(model)

    ours, theirs = (train(norm) for norm in BOTH)
    assert ours[0][-1] < ours[0][0] / 2
    close(ours, theirs, 1e-3)
    dense, norm = ours[2]["dense"], ours[2]["bn"]
    assert np.max(np.abs(norm["mean"] - np.mean(X @ dense["kernel"] + dense["bias"][None], 0))) < 0.5


def test_split_and_merge_carry_the_layer_through_plain_jax():
    model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0), update=jbn.ema(0.9, debias=True))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    assert hash(graphdef) == hash(
        nnx.split(Block(jbn.nnx.BatchNorm, nnx.Rngs(1), update=jbn.ema(0.9, debias=True)))[0]
    )

    @jax.jit
    def step(params, stats, x):
        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            y = model(x)
            return jnp.sum(jnp.cos(y)), nnx.state(model, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    _, updated = step(params, stats, X)
    y = model(X)
    close(nnx.to_pure_dict(updated), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    assert y.shape == X.shape


def test_equal_layers_compile_once():
    traced = []

    @nnx.jit
    def step(model, x):
        traced.append(None)
        return model(x)

    for seed in range(2):
        step(Block(jbn.nnx.BatchNorm, nnx.Rngs(seed), update=jbn.ema(0.9)), X)
    assert len(traced) == 1


def test_shapes_are_known_without_computing():
    model = nnx.eval_shape(lambda: Block(jbn.nnx.BatchNorm, nnx.Rngs(0)))
    shapes = jax.tree.map(lambda leaf: leaf.shape, state(model)["bn"])
    assert shapes == dict.fromkeys(("scale", "bias", "mean", "var"), (4,))
    model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    y = nnx.eval_shape(lambda model, x: model(x), model, X)
    assert (y.shape, y.dtype) == (X.shape, X.dtype)
    assert_array_equal(model.bn.mean[...], 0)


@slow
def test_model_that_a_transform_cannot_update_says_how_to_pass_it():
    model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    calls = {
        "eval_shape": lambda: nnx.eval_shape(model, X),
        "jit": lambda: nnx.jit(model)(X),
        "vmap": lambda: nnx.vmap(model)(X[None]),
        "jax.jit": lambda: jax.eval_shape(jax.jit(model), X),
    }
    for name, call in calls.items():
        with pytest.raises(TraceContextError) as raised:
            call()
        assert "nnx.jit(lambda model, x: model(x))(model, x)" in raised.value.__notes__[0], name
    model.eval()
    for name in ("eval_shape", "jax.jit"):
        assert calls[name]().shape == X.shape  # which updates nothing


@slow
@pytest.mark.skipif(not hasattr(nnx, "var_defaults"), reason="this version of Flax has no references")
def test_model_with_references_is_updated_from_inside_of_any_transform():
    with nnx.var_defaults(ref=True):
        model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    assert nnx.eval_shape(model, X).shape == X.shape
    assert_array_equal(model.bn.mean[...], 0)
    expected = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    close(nnx.jit(model)(X), expected(X))
    close(model.bn.mean[...], expected.bn.mean[...])
