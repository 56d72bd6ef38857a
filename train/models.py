"""The networks: Flax Linen modules whose every normalization layer comes from `jbn`."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

import jbn
import jbn.linen
from train.config import Model, UserError

Layer = Callable[[jax.Array], jax.Array]


class MLP(nn.Module):
    """For each width a linear map, normalization and the activation; then a linear map to the classes."""

    widths: tuple[int, ...]
    classes: int
    norm: Callable[..., Layer]
    activation: Layer
    use_bias: bool  # of the maps before normalization
    dtype: str  # of the activations

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(self.norm, use_running_average=not train)
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        for width in self.widths:
            x = nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype)(x)
            x = self.activation(norm()(x))
        return nn.Dense(self.classes)(x.astype(jnp.float32))


class CNN(nn.Module):
    """For each width two 3x3 convolutions, each with normalization and activation, and 2x2 pooling; then the
    mean over positions and a linear map to the classes."""

    widths: tuple[int, ...]
    classes: int
    norm: Callable[..., Layer]
    activation: Layer
    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(self.norm, use_running_average=not train)
        x = x.astype(self.dtype)
        for width in self.widths:
            for _ in range(2):
                x = nn.Conv(width, (3, 3), use_bias=self.use_bias, dtype=self.dtype)(x)
                x = self.activation(norm()(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        return nn.Dense(self.classes)(x.astype(jnp.float32).mean((1, 2)))


def build(config: Model, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Builds the network that a job names, for inputs of shape (n, *input_shape)."""
    if config.name == "cnn" and len(input_shape) != 3:
        raise UserError(
            f"model.name = 'cnn', but the inputs are vectors of length {input_shape[0]}; wanted images, or "
            "model.name = 'mlp'."
        )
    network = {"mlp": MLP, "cnn": CNN}[config.name]
    return network(
        widths=config.widths,
        classes=classes,
        norm=_norm(config),
        activation=getattr(nn, config.activation),
        use_bias=config.norm == "none",  # a bias before normalization would be subtracted again
        dtype=config.dtype,
    )


def _norm(config: Model) -> Callable[..., Layer]:
    """Returns what makes a norm layer, given use_running_average. A further norm is a further line."""
    # Debiased, running statistics are right from the first step on, also in jobs of a few hundred steps.
    rule = jbn.ema(config.norm_momentum, debias=True)
    return {
        "batch": partial(jbn.linen.BatchNorm, update=rule, dtype=config.dtype),
        "none": lambda use_running_average: lambda x: x,
    }[config.norm]
