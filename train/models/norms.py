"""Every normalization layer that a network may have, from one table, for Linen and for NNX."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from train.config import Model, NormName

Layer = Callable[[jax.Array], jax.Array]
Rule = Callable[[jbn.Moments, jbn.Moments], jbn.Moments]


def running_rule(config: Model) -> Rule:
    """Return the update rule of the running statistics that a config asks for.

    Debiased they are right from the first step on, also in jobs of a few hundred steps.
    """
    return jbn.ema(config.norm_momentum, debias=config.norm_debias)


class NormKind(NamedTuple):
    """A kind of normalization layer."""

    linen: Callable[..., Layer]
    nnx: Callable[..., Layer]
    options: Callable[[Model, Rule], dict[str, Any]] = lambda config, rule: {}
    has_bias: bool = False  # so that the layer before it needs none
    over_batch: bool = False  # each feature by itself, over the batch; has running statistics, and a mode
    pools: bool = False  # the running statistics can be those of several batches together


def _identity(x: jax.Array) -> jax.Array:
    return x


def _no_layer(*_: Any, **__: Any) -> Layer:
    return _identity


# Mean and variance are, in `batch` and `flax`, those of each feature over the batch and the positions of
# images; in `ghost` likewise, over parts of the batch; in `layer` those of each example and position over the
# features, as in Flax by default; in `group` those of each example over positions and a group of features.
NORMS: dict[NormName, NormKind] = {
    "none": NormKind(_no_layer, _no_layer),
    "batch": NormKind(
        jbn.linen.BatchNorm,
        jbn.nnx.BatchNorm,
        lambda config, rule: {"update": rule},
        has_bias=True,
        over_batch=True,
        pools=True,
    ),
    "ghost": NormKind(
        jbn.linen.BatchNorm,
        jbn.nnx.BatchNorm,
        lambda config, rule: {"update": rule, "virtual_batch_size": config.virtual_batch_size},
        has_bias=True,
        over_batch=True,
        pools=True,
    ),
    "flax": NormKind(
        nn.BatchNorm,
        nnx.BatchNorm,
        lambda config, rule: {"momentum": config.norm_momentum},
        has_bias=True,
        over_batch=True,
    ),
    "layer": NormKind(nn.LayerNorm, nnx.LayerNorm, has_bias=True),
    "group": NormKind(
        nn.GroupNorm,
        nnx.GroupNorm,
        lambda config, rule: {"num_groups": config.norm_groups},
        has_bias=True,
    ),
}


@dataclass(frozen=True)
class Norm:
    """Makes the normalization layers of a network, all of the kind that a config names.

    A value, not a closure: norms of the same options are equal and hash alike, so that `jit` compiles once.
    """

    config: Model
    rule: Rule  # for the running statistics of jbn's layers
    folded: bool = False  # into the layers before them: there are none, but that of the inputs

    @property
    def kind(self) -> NormKind:
        """The line of the table."""
        return NORMS["none" if self.folded else self.config.norm]

    def linen_layer(self, *, train: bool) -> Layer:
        """Make a layer, inside a compact Linen module."""
        return self.kind.linen(**self._options(train), dtype=self.config.dtype)

    def linen_input_layer(self, *, train: bool) -> Layer:
        """Make the layer that the inputs of the network go through."""
        return replace(self, folded=False).linen_layer(train=train) if self.config.norm_inputs else _identity

    def nnx_layer(self, features: int, *, rngs: nnx.Rngs) -> Layer:
        """Make a layer in training mode; its model's `eval()` changes that."""
        return self.kind.nnx(features, **self._options(train=True), dtype=self.config.dtype, rngs=rngs)

    def nnx_input_layer(self, features: int, *, rngs: nnx.Rngs) -> Layer:
        """Make the layer that the inputs of the network go through."""
        unfolded = replace(self, folded=False)
        return unfolded.nnx_layer(features, rngs=rngs) if self.config.norm_inputs else _identity

    def _options(self, train: bool) -> dict[str, Any]:
        frozen = self.config.frozen != "none"
        mode = {"use_running_average": frozen or not train} if self.kind.over_batch else {}
        return mode | self.kind.options(self.config, self.rule)
