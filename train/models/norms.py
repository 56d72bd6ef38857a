"""Every normalization layer that a network may have, from one table, for Linen and for NNX."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from train.config import Model

Layer = Callable[[jax.Array], jax.Array]
Rule = Callable[[jbn.Moments, jbn.Moments], jbn.Moments]


def running_rule(config: Model) -> jbn.ema:
    """Returns how running statistics absorb those of a batch, as a config asks for it.

    Debiased they are right from the first step on, also in jobs of a few hundred steps.
    """
    return jbn.ema(config.norm_momentum, debias=config.norm_debias)


@dataclass(frozen=True)
class Norm:
    """Makes the normalization layers of a network, all of the kind that a config names.

    Mean and variance are taken, in `batch` and `flax`, of each feature over the batch and the positions of
    images; in `ghost` likewise, over parts of the batch; in `layer` of each example and position over the
    features, as Flax does by default; in `group` of each example over the positions and a group of features.

    A value, not a closure: norms of the same options are equal and hash alike, and `jit` compiles once.
    """

    config: Model
    rule: Rule  # for the running statistics of jbn's layers

    def linen_layer(self, *, train: bool) -> Layer:
        """Makes a layer, inside a compact Linen module."""
        layer, _, options = self._kind(train)
        return layer(**options, dtype=self.config.dtype)

    def linen_input_layer(self, *, train: bool) -> Layer:
        """Makes the layer that the inputs of the network go through."""
        return self.linen_layer(train=train) if self.config.norm_inputs else _identity

    def nnx_input_layer(self, features: int, *, rngs: nnx.Rngs) -> Layer:
        """Makes the layer that the inputs of the network go through."""
        return self.nnx_layer(features, rngs=rngs) if self.config.norm_inputs else _identity

    def nnx_layer(self, features: int, *, rngs: nnx.Rngs) -> Layer:
        """Makes a layer that is in training; its model's `eval()` and `train()` change that."""
        _, layer, options = self._kind(train=True)
        return layer(features, **options, dtype=self.config.dtype, rngs=rngs)

    @property
    def adds_bias(self) -> bool:
        """Whether the layers have a bias, so that what comes before them needs none."""
        return self.config.norm != "none"

    def _kind(self, train: bool) -> tuple[Callable[..., Layer], Callable[..., Layer], dict[str, Any]]:
        """Returns the layer in Linen, in NNX, and the options of both. A further norm is a further line."""
        config, batch, mode = self.config, {"update": self.rule}, {"use_running_average": not train}
        ghost = batch | {"virtual_batch_size": config.virtual_batch_size}
        return {
            "none": (_no_layer, _no_layer, {}),
            "batch": (jbn.linen.BatchNorm, jbn.nnx.BatchNorm, mode | batch),
            "ghost": (jbn.linen.BatchNorm, jbn.nnx.BatchNorm, mode | ghost),
            "flax": (nn.BatchNorm, nnx.BatchNorm, mode | {"momentum": config.norm_momentum}),
            "layer": (nn.LayerNorm, nnx.LayerNorm, {}),
            "group": (nn.GroupNorm, nnx.GroupNorm, {"num_groups": config.norm_groups}),
        }[config.norm]


def _no_layer(*_, **__) -> Layer:
    return _identity


def _identity(x: jax.Array) -> jax.Array:
    return x
