"""Flax's modules and ours, Linen and NNX, each driven in the same way."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jbn.linen
import jbn.nnx


class Linen:
    """A Linen layer with its variables."""

    ours, flax = jbn.linen.BatchNorm, nn.BatchNorm

    def __init__(self, kind, x, **options):
        self.layer = kind(**options)
        self.variables = self.layer.init(jax.random.key(0), x, use_running_average=False)

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
        y, stats = self.call(self.params, self.stats, x, True, **kwargs)
        self.variables = self.variables | {"batch_stats": stats}
        return y

    def infer(self, x, **kwargs):
        return self.layer.apply(self.variables, x, use_running_average=True, **kwargs)


class NNX:
    """An NNX layer, driven like a Linen one."""

    ours, flax = jbn.nnx.BatchNorm, nnx.BatchNorm

    def __init__(self, kind, x, **options):
        axis = options.get("axis", -1)
        features = [x.shape[a] for a in sorted(a % x.ndim for a in np.atleast_1d(axis))]
        self.layer = kind(features[0] if len(features) == 1 else features, rngs=nnx.Rngs(0), **options)

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
        return self.layer(x, use_running_average=False, **kwargs)

    def infer(self, x, **kwargs):
        return self.layer(x, use_running_average=True, **kwargs)


def opposite(train):
    return not train if isinstance(train, bool) else jnp.logical_not(train)


def gradients(layer, x, weight, **kwargs):
    """Returns the gradients of sum(y * weight) in training, to the parameters and to `x`."""

    def loss(params, x):
        y, _ = layer.call(params, layer.stats, x, True, **kwargs)
        return jnp.sum(jnp.asarray(y, jnp.float32) * weight)

    return jax.grad(loss, (0, 1))(layer.params, x)
