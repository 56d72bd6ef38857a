"""The networks, each as a pair of pure functions, whichever of Flax's APIs it is written in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from train.config import Model
from train.errors import UserError
from train.models import nnx_mlp as nnx_models
from train.models.initialization import LECUN, kernel_init
from train.models.norms import Layer, Norm, Rule, running_rule
from train.models.residual import RESNETS, ResNet

USUAL_WIDTHS = {
    "mlp": (128, 128),
    "nnx_mlp": (128, 128),
    "cnn": (32, 64),
    "resnet20": (16, 32, 64),
    "resnet56": (16, 32, 64),
    "resnet18": (64, 128, 256, 512),
    "resnet50": (64, 128, 256, 512),
}


class Variables(NamedTuple):
    """Nested dicts of arrays; the innermost keys are Flax's names: kernel, scale, bias, mean, var, count."""

    params: Any
    batch_stats: Any  # running statistics; {} without batch normalization


class Network(Protocol):
    """A network as pure functions. It hashes by what it computes, so that it can be a static argument."""

    @property
    def activation(self) -> Layer:
        """The activation of its hidden layers."""

    def init(self, key: jax.Array, inputs: jax.Array) -> Variables:
        """Draws new parameters; of the inputs, float32 (n, ...), only the shape matters."""

    def apply(self, variables: Variables, inputs: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
        """Returns float32 logits (n, classes) and the new running statistics: in inference, those given."""

    def activation_inputs(self, variables: Variables, inputs: jax.Array, *, train: bool) -> list[jax.Array]:
        """Returns what each activation gets, in their order: (n, ..., width) each."""


@dataclass(frozen=True)
class LinenNetwork:
    """A `Network` of a Linen module."""

    module: nn.Module

    @property
    def activation(self) -> Layer:
        return self.module.activation

    def init(self, key: jax.Array, inputs: jax.Array) -> Variables:
        variables = self.module.init(key, inputs, train=False)
        return Variables(variables["params"], variables.get("batch_stats", {}))

    def apply(self, variables: Variables, inputs: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
        apply = partial(self.module.apply, variables._asdict(), inputs, train=train)
        if not train:
            return apply(), variables.batch_stats
        logits, updated = apply(mutable=["batch_stats"])
        return logits, updated.get("batch_stats", {})

    def activation_inputs(self, variables: Variables, inputs: jax.Array, *, train: bool) -> list[jax.Array]:
        watch = _Watch(self.activation)
        LinenNetwork(self.module.clone(activation=watch)).apply(variables, inputs, train=train)
        return watch.seen


@dataclass(frozen=True)
class NNXNetwork:
    """A `Network` of an NNX module, which each call makes anew and puts the variables into."""

    module: Callable[..., nnx.Module]
    options: tuple[tuple[str, Any], ...]  # what makes it, beside `rngs`; pairs, because a dict has no hash

    @property
    def activation(self) -> Layer:
        return dict(self.options)["activation"]

    def init(self, key: jax.Array, inputs: jax.Array) -> Variables:
        return _variables(self._make(key))

    def apply(self, variables: Variables, inputs: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
        module = nnx.eval_shape(partial(self._make, 0))
        for values in variables:
            nnx.update(module, values)
        module.train() if train else module.eval()
        return module(inputs), _variables(module).batch_stats

    def activation_inputs(self, variables: Variables, inputs: jax.Array, *, train: bool) -> list[jax.Array]:
        watch = _Watch(self.activation)
        watched = NNXNetwork(self.module, (*self.options, ("activation", watch)))
        watched.apply(variables, inputs, train=train)
        return watch.seen

    def _make(self, seed: int | jax.Array) -> nnx.Module:
        return self.module(**dict(self.options), rngs=nnx.Rngs(seed))


class _Watch:
    """An activation that remembers what it was called with."""

    def __init__(self, activation: Layer):
        self.activation, self.seen = activation, []

    def __call__(self, x: jax.Array) -> jax.Array:
        self.seen.append(x)
        return self.activation(x)


def _variables(module: nnx.Module) -> Variables:
    return Variables(*(nnx.to_pure_dict(nnx.state(module, kind)) for kind in (nnx.Param, nnx.BatchStat)))


class MLP(nn.Module):
    """For each width a linear map, normalization and the activation; then a linear map to the classes:
    (n, ...) -> logits (n, classes)."""

    widths: tuple[int, ...]
    classes: int
    norm: Norm
    activation: Layer
    kernel_std: float  # of the initial weights; 0 for the usual ones
    dtype: str  # of the activations

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        init = kernel_init(self.kernel_std, LECUN)
        x = self.norm.linen_input_layer(train=train)(x.reshape(x.shape[0], -1).astype(self.dtype))
        options = {"use_bias": not self.norm.adds_bias, "kernel_init": init, "dtype": self.dtype}
        for width in self.widths:
            x = nn.Dense(width, **options)(x)
            x = self.activation(self.norm.linen_layer(train=train)(x))
        return nn.Dense(self.classes, kernel_init=init)(x.astype(jnp.float32))


class CNN(nn.Module):
    """For each width two 3x3 convolutions, each with normalization and activation, and 2x2 pooling; then the
    mean over positions and a linear map to the classes: images (n, h, w, c) -> logits (n, classes)."""

    widths: tuple[int, ...]
    classes: int
    norm: Norm
    activation: Layer
    kernel_std: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        init = kernel_init(self.kernel_std, LECUN)
        x = self.norm.linen_input_layer(train=train)(x.astype(self.dtype))
        options = {"use_bias": not self.norm.adds_bias, "kernel_init": init, "dtype": self.dtype}
        for width in self.widths:
            for _ in range(2):
                x = nn.Conv(width, (3, 3), **options)(x)
                x = self.activation(self.norm.linen_layer(train=train)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        return nn.Dense(self.classes, kernel_init=init)(x.astype(jnp.float32).mean((1, 2)))


def build(config: Model, input_shape: tuple[int, ...], classes: int, *, rule: Rule | None = None) -> Network:
    """Builds the network that a job names, for inputs of shape (n, *input_shape).

    Args:
      rule: how running statistics absorb those of a batch; if not given, as the config says.

    Raises:
      UserError: the network does not fit the inputs, or its widths.
    """
    widths = config.widths or USUAL_WIDTHS[config.name]
    _check(config, widths, input_shape)
    options = {
        "widths": widths,
        "classes": classes,
        "norm": Norm(config, rule or running_rule(config)),
        "activation": getattr(nn, config.activation),
        "kernel_std": config.kernel_std,
        "dtype": config.dtype,
    }
    if config.name == "nnx_mlp":
        return NNXNetwork(nnx_models.MLP, (("features", math.prod(input_shape)), *options.items()))
    modules = {"mlp": MLP, "cnn": CNN} | {name: partial(ResNet, **sizes) for name, sizes in RESNETS.items()}
    return LinenNetwork(modules[config.name](**options))


def _check(config: Model, widths: tuple[int, ...], input_shape: tuple[int, ...]) -> None:
    name, groups, usual = config.name, config.norm_groups, USUAL_WIDTHS[config.name]
    if name not in ("mlp", "nnx_mlp") and len(input_shape) != 3:
        raise UserError(
            f"model.name = '{name}', but the inputs are vectors of length {input_shape[0]}; wanted images, "
            "or model.name = 'mlp'."
        )
    if name in RESNETS and len(widths) != len(usual):
        raise UserError(
            f"model.widths = {list(widths)} and model.name = '{name}'; wanted {len(usual)} widths, one for "
            f"each stage: {list(usual)}, say."
        )
    fitting = math.gcd(*widths)
    if config.norm == "group" and fitting % groups:
        width = next(width for width in widths if width % groups)
        fitting = ", ".join(str(d) for d in range(1, fitting + 1) if fitting % d == 0)
        raise UserError(
            f"model.norm_groups = {groups}, which does not divide {width} of model.widths = {list(widths)}; "
            f"wanted one of {fitting}, or other widths."
        )
