"""The networks in Flax NNX."""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from train.norms import Layer, Norm


class Hidden(nnx.Module):
    """A linear map, normalization and the activation: (n, inputs) -> (n, width)."""

    def __init__(self, inputs: int, width: int, *, norm: Norm, activation: Layer, dtype: str, rngs: nnx.Rngs):
        self.linear = nnx.Linear(inputs, width, use_bias=not norm.adds_bias, dtype=dtype, rngs=rngs)
        self.norm = norm.nnx_layer(width, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(self.norm(self.linear(x)))


class MLP(nnx.Module):
    """The network of `train.models.MLP`: (n, ...), `features` values each -> logits (n, classes)."""

    def __init__(
        self,
        features: int,
        *,
        widths: tuple[int, ...],
        classes: int,
        norm: Norm,
        activation: Layer,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        options = {"norm": norm, "activation": activation, "dtype": dtype, "rngs": rngs}
        self.hidden = nnx.List([Hidden(*sizes, **options) for sizes in pairwise((features, *widths))])
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        for layer in self.hidden:
            x = layer(x)
        return self.head(x.astype(jnp.float32))
