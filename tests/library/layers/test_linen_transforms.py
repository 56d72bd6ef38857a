"""The Linen module under Flax's lifted transforms gives what Flax's own gives there."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
from tests.helpers import reference
from tests.helpers.flax_layers import quick_init
from tests.helpers.layers import random

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = np.asarray(random((8, 4), mean=1))
BOTH = (jbn.linen.BatchNorm, nn.BatchNorm)


def close(actual, expected, tolerance=2e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.max(np.abs(b))))


class Block(nn.Module):
    norm: type[nn.Module]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, kernel_init=quick_init)(x)
        return nn.tanh(self.norm(use_running_average=False, momentum=0.5, axis_name=self.axis_name)(x))


@cache
def one_step(case, norm):
    """Initializes a model and takes a training step: variables, and output, gradient and new statistics."""
    model = MODELS[case](norm)

    @jax.jit
    def run(x):
        variables = model.init(jax.random.key(0), x)

        def loss(params):
            y, updated = model.apply(variables | {"params": params}, x, mutable=["batch_stats"])
            return jnp.sum(jnp.cos(y + jnp.arange(4.0))), (y, updated["batch_stats"])

        grads, (y, stats_new) = jax.grad(loss, has_aux=True)(variables["params"])
        return variables, (y, grads, stats_new)

    return run(np.stack([X + i for i in range(8)]) if case == "vmap, all shared" else X)


def members(norm, in_axes=0, axis_name=None, **variable_axes):
    """Eight blocks, or one block for eight parts of a batch."""
    lifted = nn.vmap(
        Block,
        variable_axes=variable_axes,
        split_rngs={"params": variable_axes["params"] is not None},
        in_axes=in_axes,
        axis_size=8,
        axis_name=axis_name,
    )
    return lifted(norm, axis_name)


class Scanned(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(Block(self.norm), x, None)[0]


class Looped(nn.Module):
    """Shares one block between the passes of a scan: statistics that each pass updates."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        block = Block(self.norm)
        if self.is_initializing():
            return block(x)
        passes = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_broadcast="params",
            variable_carry="batch_stats",
            split_rngs={"params": False},
            length=3,
        )
        return passes(block, x, None)[0]


class Branches(nn.Module):
    norm: type[nn.Module]

    def setup(self):
        self.first, self.second = Block(self.norm), Block(self.norm)

    def __call__(self, x):
        if self.is_initializing():
            return self.first(x) + self.second(x)
        is_first = x[0, 0] > 1e6  # not known to the compiler
        return nn.cond(is_first, lambda self, x: self.first(x), lambda self, x: self.second(x), self, x)


class Shared(nn.Module):
    norm: type[nn.Module]

    def setup(self):
        self.dense = nn.Dense(4, kernel_init=quick_init)
        self.bn = self.norm(use_running_average=False, momentum=0.5)

    def __call__(self, x):
        return self.bn(self.dense(self.bn(self.dense(x))))


MODELS = {
    "jit": nn.jit(Block),
    "remat": nn.remat(Block),
    "scan over layers": Scanned,
    "scan over a shared layer": Looped,
    "cond": Branches,
    "shared in setup, called twice": Shared,
    "vmap, an ensemble": partial(members, in_axes=None, params=0, batch_stats=0),
    "vmap, all shared": partial(members, params=None, batch_stats=None, axis_name="parts"),
}


QUICK = ("remat", "vmap, all shared")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in MODELS]
)
def test_lifted_transform_gives_what_it_gives_with_flax(case):
    (variables, ours), (expected_variables, theirs) = (one_step(case, norm) for norm in BOTH)
    jax.tree.map(assert_array_equal, variables, expected_variables)
    close(ours, theirs)
    updated = jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), variables["batch_stats"], ours[2]))
    assert sum(updated) == len(updated) // (2 if "cond" in case else 1)


def test_vmap_over_examples_with_an_axis_name_is_the_whole_batch():
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.0, axis_name="examples")
    per_example = nn.vmap(
        lambda layer, x: layer(x),
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="examples",
    )
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    y, updated = jax.jit(nn.apply(per_example, layer, mutable=["batch_stats"]))(variables, X)
    assert_allclose(y, reference.batch_norm(X), atol=1e-5)
    assert_allclose(updated["batch_stats"]["var"], reference.moments(X)[1], rtol=1e-5)


@pytest.mark.slow
def test_pmap_shares_the_batch_over_devices():
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.0, axis_name="devices")
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    step = jax.pmap(partial(layer.apply, mutable=["batch_stats"]), "devices", in_axes=(None, 0))
    y, updated = step(variables, X.reshape(4, 2, 4))
    assert_allclose(y.reshape(8, 4), reference.batch_norm(X), atol=1e-5)
    assert_allclose(updated["batch_stats"]["var"][3], reference.moments(X)[1], rtol=1e-5)


def test_shapes_are_known_without_computing():
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    y, updated = jax.eval_shape(partial(layer.apply, mutable=["batch_stats"]), variables, X)
    assert (y.shape, y.dtype) == (X.shape, X.dtype)
    assert updated["batch_stats"]["mean"].shape == (4,)
    lazy = layer.lazy_init(jax.random.key(0), jax.ShapeDtypeStruct(X.shape, X.dtype))
    jax.tree.map(assert_array_equal, lazy, jax.jit(layer.init)(jax.random.key(0), X))


def test_table_of_a_model_shows_the_layer_and_its_variables():
    ours, theirs = (
        Block(norm).tabulate(jax.random.key(0), X, console_kwargs={"width": 120}) for norm in BOTH
    )
    assert ours == theirs
    assert "BatchNorm_0" in ours and "batch_stats" in ours
