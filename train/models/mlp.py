"""A multi-layer perceptron, in Flax Linen and in Flax NNX."""

from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from train.models.initialization import LECUN, kernel_init
from train.models.norms import Domain, Layer, Norm, in_domain


class MLP(nn.Module):
    """For each width a linear map, normalization and the activation; then a linear map to the classes:
    (n, ...) -> logits (n, classes)."""

    widths: tuple[int, ...]
    classes: int
    norm: Norm
    activation: Layer
    kernel_std: float  # of the initial weights; 0 for the usual ones
    dtype: str  # of the activations

    @property
    def head(self) -> str:
        return f"Dense_{len(self.widths)}"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, domain: Domain = None) -> jax.Array:
        init = kernel_init(self.kernel_std, LECUN)
        x = self.norm.linen_input_layer(train=train, domain=domain)(
            x.reshape(x.shape[0], -1).astype(self.dtype)
        )
        options = {"use_bias": not self.norm.kind.has_bias, "kernel_init": init, "dtype": self.dtype}
        for width in self.widths:
            x = nn.Dense(width, **options)(x)
            x = self.activation(self.norm.linen_layer(train=train, domain=domain)(x))
        return nn.Dense(self.classes, kernel_init=init, name=self.head)(x.astype(jnp.float32))


class Hidden(nnx.Module):
    """A linear map, normalization and the activation: (n, inputs) -> (n, width)."""

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        norm: Norm,
        activation: Layer,
        kernel_std: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        options = {"use_bias": not norm.kind.has_bias, "kernel_init": kernel_init(kernel_std, LECUN)}
        self.linear = nnx.Linear(inputs, width, **options, dtype=dtype, rngs=rngs)
        self.norm = norm.nnx_layer(width, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array, domain: Domain = None) -> jax.Array:
        return self.activation(in_domain(self.norm, domain)(self.linear(x)))


class NNXMLP(nnx.Module):
    """The network of `MLP`: (n, ...), `features` values each -> logits (n, classes)."""

    def __init__(
        self,
        features: int,
        *,
        widths: tuple[int, ...],
        classes: int,
        norm: Norm,
        activation: Layer,
        kernel_std: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        options = {"norm": norm, "activation": activation, "kernel_std": kernel_std, "dtype": dtype}
        self.norm_of_inputs = norm.nnx_input_layer(features, rngs=rngs)
        self.hidden = nnx.List(
            [Hidden(*sizes, **options, rngs=rngs) for sizes in pairwise((features, *widths))]
        )
        self.head = nnx.Linear(widths[-1], classes, kernel_init=kernel_init(kernel_std, LECUN), rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: jax.Array, *, domain: Domain = None) -> jax.Array:
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        x = in_domain(self.norm_of_inputs, domain)(x)
        for layer in self.hidden:
            x = layer(x, domain)
        return self.head(x.astype(jnp.float32))
