"""The networks that a job may name, from one table."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn

from train.config import Model, NetworkName
from train.errors import UserError
from train.models.convolutional import CNN, ResNet
from train.models.mlp import MLP, NNXMLP
from train.models.network import LinenNetwork, Network, NNXNetwork
from train.models.norms import NORMS, Norm, Rule, of_batch, running_rule


class NetworkKind(NamedTuple):
    """A kind of network."""

    module: Callable[..., Any]  # takes widths, classes, norm, activation, kernel_std and dtype
    widths: tuple[int, ...]  # the usual ones
    for_images: bool = True
    stages: int | None = None  # how many widths it has; None for any number
    in_nnx: bool = False


def _resnet(blocks: tuple[int, ...], widths: tuple[int, ...], **options: bool) -> NetworkKind:
    return NetworkKind(partial(ResNet, blocks=blocks, **options), widths, stages=len(widths))


SMALL, LARGE = (16, 32, 64), (64, 128, 256, 512)
# The residual ones: He et al. 2016, section 4.2 and table 1.
NETWORKS: dict[NetworkName, NetworkKind] = {
    "mlp": NetworkKind(MLP, (128, 128), for_images=False),
    "nnx_mlp": NetworkKind(NNXMLP, (128, 128), for_images=False, in_nnx=True),
    "cnn": NetworkKind(CNN, (32, 64)),
    "resnet20": _resnet((3, 3, 3), SMALL, bottleneck=False, large=False),
    "resnet56": _resnet((9, 9, 9), SMALL, bottleneck=False, large=False),
    "resnet18": _resnet((2, 2, 2, 2), LARGE, bottleneck=False, large=True),
    "resnet50": _resnet((3, 4, 6, 3), LARGE, bottleneck=True, large=True),
}


def build(
    config: Model,
    input_shape: tuple[int, ...],
    classes: int,
    *,
    rule: Rule | None = None,
    steps: int = 1,
    blend: Any = None,
) -> Network:
    """Build the network that a job names, for inputs of shape (n, *input_shape).

    Args:
      rule: the update rule of running statistics; if not given, as the config says.
      steps: those of the whole job, which norm = "renorm" needs to know in training.
      blend: for how many examples the running statistics count in inference, beside those of the batch that
        is evaluated; if not given, they are all.

    Raises:
      UserError: the network does not fit the inputs, or `check` raises it.
    """
    kind = NETWORKS[config.name]
    widths = config.widths or kind.widths
    check(config)
    if kind.for_images and len(input_shape) != 3:
        raise UserError(
            f"model.name: expected 'mlp' for vectors of length {input_shape[0]}, got '{config.name}', which "
            "takes images."
        )
    options = {
        "widths": widths,
        "classes": classes,
        "norm": Norm(config, rule or running_rule(config), steps if config.norm == "renorm" else 1, blend),
        "activation": getattr(nn, config.activation),
        "kernel_std": config.kernel_std,
        "dtype": config.dtype,
    }
    if kind.in_nnx:
        return NNXNetwork(kind.module, (("features", math.prod(input_shape)), *options.items()))
    return LinenNetwork(kind.module(**options))


def build_pooling(config: Model, input_shape: tuple[int, ...], classes: int, *, steps: int = 1) -> Network:
    """Build the same network, frozen or not, whose new running statistics are those of the batch alone."""
    return build(replace(config, frozen="none"), input_shape, classes, rule=of_batch, steps=steps)


def check(config: Model, *, accumulate: int = 1, recalibrate: bool = False) -> None:
    """Raise a UserError for a network that does not fit its widths, its norm, or what a job does with it."""
    kind, norm = NETWORKS[config.name], NORMS[config.norm]
    widths = config.widths or kind.widths
    if kind.stages and len(widths) != kind.stages:
        raise UserError(
            f"model.widths: expected {kind.stages} for model.name = '{config.name}', one for each stage, "
            f"such as {list(kind.widths)}, got {list(widths)}."
        )
    if config.domains > 1 and not norm.pools:
        with_domains = " or ".join(repr(name) for name in NORMS if NORMS[name].pools)
        raise UserError(
            f"model.norm: expected {with_domains} with model.domains = {config.domains}, whose statistics "
            f"can be by domain, got {config.norm!r}."
        )
    frozen, pooling = config.frozen != "none", [repr(name) for name in NORMS if NORMS[name].pools]
    if accumulate > 1 and norm.over_batch and not norm.pools and not frozen:
        raise UserError(
            f"optimizer.accumulate: expected 1 with model.norm = {config.norm!r}, whose running statistics "
            f"cannot pool the parts of a batch, got {accumulate}; those of {' and '.join(pooling)} can."
        )
    if recalibrate and norm.over_batch and not norm.pools:
        raise UserError(
            f"recalibrate: expected false with model.norm = {config.norm!r}, whose running statistics cannot "
            f"be pooled, got true; those of {' and '.join(pooling)} can."
        )
    without = {"norms": config.norm == "none", "statistics": not norm.over_batch}
    if without.get(config.frozen):
        raise UserError(
            f"model.frozen: expected 'none' or 'body' with model.norm = {config.norm!r}, which has no "
            f"{config.frozen} to freeze, got {config.frozen!r}."
        )
    if config.norm_inputs and not norm.over_batch:
        raise UserError(
            "model.norm: expected one that normalizes each feature by itself with model.norm_inputs = true, "
            f"{' or '.join(name for name in NORMS if NORMS[name].over_batch)}, got {config.norm!r}."
        )
    divisor = math.gcd(*widths)
    if config.norm == "group" and divisor % config.norm_groups:
        fitting = [str(d) for d in range(1, divisor + 1) if divisor % d == 0]
        raise UserError(
            f"model.norm_groups: expected a divisor of all model.widths = {list(widths)}, that is "
            f"{' or '.join(fitting)}, got {config.norm_groups}."
        )
