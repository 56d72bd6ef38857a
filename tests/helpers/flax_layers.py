"""Flax's modules and ours, Linen and NNX, each driven in the same way."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx
from tests.helpers.layers import random


def eager(f, **_):
    return f


class Linen:
    """A Linen layer with its variables; `jit=jax.jit` compiles its calls, which must not be nested."""

    ours, flax = jbn.linen.BatchNorm, nn.BatchNorm

    def __init__(self, kind, x, jit=eager, **options):
        self.layer = kind(**options)
        self.variables = jit(partial(self.layer.init, use_running_average=False))(jax.random.key(0), x)
        self.step = jit(self.call, static_argnums=3)

    @property
    def params(self):
        return self.variables.get("params", {})

    @property
    def stats(self):
        return self.variables["batch_stats"]

    def copy_from(self, other):
        self.variables = other.variables

    def call(self, params, stats, x, train, **kwargs):
        """Returns `y` and the new statistics: a pure function."""
        variables = {"params": params, "batch_stats": stats}
        y, updated = self.layer.apply(
            variables, x, use_running_average=opposite(train), mutable=["batch_stats"], **kwargs
        )
        return y, updated["batch_stats"]

    def train(self, x, **kwargs):
        y, stats = self.step(self.params, self.stats, x, True, **kwargs)
        self.variables = self.variables | {"batch_stats": stats}
        return y

    def infer(self, x, **kwargs):
        return self.step(self.params, self.stats, x, False, **kwargs)[0]


class NNX:
    """An NNX layer, driven like a Linen one."""

    ours, flax = jbn.nnx.BatchNorm, nnx.BatchNorm

    def __init__(self, kind, x, jit=eager, **options):
        axis = options.get("axis", -1)
        features = [x.shape[a] for a in sorted(a % x.ndim for a in np.atleast_1d(axis))]
        self.layer = kind(features[0] if len(features) == 1 else features, rngs=nnx.Rngs(0), **options)
        self.step = jit(self.call, static_argnums=3)

    @property
    def params(self):
        return nnx.to_pure_dict(nnx.state(self.layer, nnx.Param))

    @property
    def stats(self):
        return nnx.to_pure_dict(nnx.state(self.layer, nnx.BatchStat))

    def copy_from(self, other):
        nnx.update(self.layer, nnx.state(other.layer))

    def call(self, params, stats, x, train, **kwargs):
        graphdef, state = nnx.split(self.layer)
        nnx.replace_by_pure_dict(state, params | stats)
        layer = nnx.merge(graphdef, state, copy=True)  # also inside a transform
        y = layer(x, use_running_average=opposite(train), **kwargs)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    def train(self, x, **kwargs):
        y, stats = self.step(self.params, self.stats, x, True, **kwargs)
        nnx.update(self.layer, stats)
        return y

    def infer(self, x, **kwargs):
        return self.step(self.params, self.stats, x, False, **kwargs)[0]


both = pytest.mark.parametrize("flavour", [Linen, NNX])
X, WEIGHT = (np.asarray(random((8, 4, 3), mean=1, seed=seed)) for seed in (0, 1))


def make(flavour, x=X, **options):
    """Returns a layer of ours in the flavour, its calls compiled."""
    return flavour(flavour.ours, x, jit=jax.jit, **options)


def quick_init(key, shape, dtype=jnp.float32, **_):
    """Initializes a kernel by what depends on the key and takes no time to compile."""
    of_key = jax.random.key_data(key)[-1] % 997
    angles = of_key.astype(dtype) + jnp.arange(np.prod(shape), dtype=dtype)
    return 0.5 * jnp.sin(angles**2).reshape(shape)  # of full rank


class Block(nnx.Module):
    """A dense layer, a batch norm of the given class and tanh, for NNX."""

    def __init__(self, norm, rngs, **options):
        self.dense = nnx.Linear(4, 4, kernel_init=quick_init, rngs=rngs)
        self.bn = norm(4, momentum=0.5, rngs=rngs, **options)

    def __call__(self, x):
        return jnp.tanh(self.bn(self.dense(x)))


def opposite(train):
    return not train if isinstance(train, bool) else jnp.logical_not(train)


def gradients(layer, x, weight, **kwargs):
    """Returns the gradients of sum(y * weight) in training, to the parameters and to `x`."""

    def loss(params, x):
        y, _ = layer.call(params, layer.stats, x, True, **kwargs)
        return jnp.sum(jnp.asarray(y, jnp.float32) * weight)

    return jax.grad(loss, (0, 1))(layer.params, x)
