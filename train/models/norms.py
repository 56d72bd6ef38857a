"""Every normalization layer that a network may have, from one table, for Linen and for NNX."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from train.config import Model, NormName

Layer = Callable[..., jax.Array]  # (x) or (x, domain=index)
Rule = Callable[[jbn.Moments, jbn.Moments], jbn.Moments]
Domain = jax.Array | int | None  # the index of all examples, (), or of each, (n,)

D_RAMP = 4 / 7  # of the steps in which r_max grows, those in which d_max does (Ioffe 2017, section 4.1)


def running_rule(config: Model) -> Rule:
    """Return the update rule of the running statistics that a config asks for.

    Debiased they are right from the first step on, also in jobs of a few hundred steps.
    """
    return jbn.ema(config.norm_momentum, debias=config.norm_debias)


def of_batch(running: jbn.Moments, batch: jbn.Moments) -> jbn.Moments:
    """Return the moments of the batch alone, which are then merged outside of the network."""
    return batch


class NormKind(NamedTuple):
    """A kind of normalization layer."""

    linen: Callable[..., Layer]
    nnx: Callable[..., Layer]
    options: Callable[["Norm"], dict[str, Any]] = lambda norm: {}
    has_bias: bool = False  # so that the layer before it needs none
    over_batch: bool = False  # each feature by itself, over the batch; has running statistics, and a mode
    pools: bool = False  # jbn's own: statistics can be those of several batches, by domain, and blended


def _identity(x: jax.Array, domain: Domain = None) -> jax.Array:
    return x


def _no_layer(*_: Any, **__: Any) -> Layer:
    return _identity


def _ours(options: Callable[["Norm"], dict[str, Any]]) -> NormKind:
    both = jbn.linen.BatchNorm, jbn.nnx.BatchNorm
    return NormKind(*both, options, has_bias=True, over_batch=True, pools=True)


# Mean and variance are, in `batch` and `flax`, those of each feature over the batch and the positions of
# images; in `renorm` likewise, corrected towards the running ones; in `ghost` over parts of the batch; in
# `layer` those of each example and position over the features, as in Flax by default; in `group` those of
# each example over positions and a group of features.
NORMS: dict[NormName, NormKind] = {
    "none": NormKind(_no_layer, _no_layer),
    "batch": _ours(lambda norm: {"update": norm.rule}),
    "renorm": _ours(lambda norm: {"update": norm.rule, "renorm": norm.limits}),
    "ghost": _ours(lambda norm: {"update": norm.rule, "virtual_batch_size": norm.config.virtual_batch_size}),
    "flax": NormKind(
        nn.BatchNorm,
        nnx.BatchNorm,
        lambda norm: {"momentum": norm.config.norm_momentum},
        has_bias=True,
        over_batch=True,
    ),
    "layer": NormKind(nn.LayerNorm, nnx.LayerNorm, has_bias=True),
    "group": NormKind(
        nn.GroupNorm,
        nnx.GroupNorm,
        lambda norm: {"num_groups": norm.config.norm_groups},
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
    steps: int = 1  # of the whole job, of which the limits of renorm are a function
    blend: Any = None  # in inference: how many examples the running statistics count for, (); None for all
    folded: bool = False  # into the layers before them: there are none, but that of the inputs

    @property
    def kind(self) -> NormKind:
        """The line of the table."""
        return NORMS["none" if self.folded else self.config.norm]

    @property
    def limits(self) -> jbn.renorm_limits:
        """How far norm = "renorm" corrects, after so many steps."""
        config, ramp = self.config, self.steps * self.config.norm_ramp
        return jbn.renorm_limits(
            r_max=config.norm_r_max,
            d_max=config.norm_d_max,
            # At the first step there is nothing yet to correct towards.
            plain=max(1, round(self.steps * config.norm_plain)),
            r_steps=round(ramp),
            d_steps=round(ramp * D_RAMP),
        )

    def domain(self, given: Domain) -> Domain:
        """Return the domain that layers are called with: the first, unless given; without domains None."""
        if self.config.domains == 1:
            return None
        return 0 if given is None else given

    def linen_layer(self, *, train: bool, domain: Domain = None) -> Layer:
        """Make a layer, inside a compact Linen module, for examples of these domains."""
        return in_domain(self.kind.linen(**self._options(train), dtype=self.config.dtype), domain)

    def linen_input_layer(self, *, train: bool, domain: Domain = None) -> Layer:
        """Make the layer that the inputs of the network go through."""
        unfolded = replace(self, folded=False)
        return unfolded.linen_layer(train=train, domain=domain) if self.config.norm_inputs else _identity

    def nnx_layer(self, features: int, *, rngs: nnx.Rngs) -> Layer:
        """Make a layer in training mode; its model's `eval()` changes that."""
        return self.kind.nnx(features, **self._options(train=True), dtype=self.config.dtype, rngs=rngs)

    def nnx_input_layer(self, features: int, *, rngs: nnx.Rngs) -> Layer:
        """Make the layer that the inputs of the network go through."""
        unfolded = replace(self, folded=False)
        return unfolded.nnx_layer(features, rngs=rngs) if self.config.norm_inputs else _identity

    def _options(self, train: bool) -> dict[str, Any]:
        frozen = self.config.frozen != "none"
        mode: dict[str, Any] = {"use_running_average": frozen or not train} if self.kind.over_batch else {}
        if self.config.domains > 1:
            mode |= {"domains": self.config.domains, "affine_by_domain": self.config.affine_by_domain}
        if self.blend is not None:
            mode["blend"] = self.blend
        return mode | self.kind.options(self)


def in_domain(layer: Layer, domain: Domain) -> Layer:
    """Return a layer as it is for examples of these domains; of None there are none."""
    return layer if domain is None else partial(layer, domain=domain)
