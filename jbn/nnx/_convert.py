"""Batch norms of Flax that become ours, in the model that they are in."""

import inspect
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jbn._flax import check_options, counts, counts_updates, no_updates
from jbn._spelling import check_option_names
from jbn.nnx._batch_norm import BatchNorm
from jbn.nnx._measuring import batch_norms

Model = TypeVar("Model")

PARAMETERS = {
    name: parameter
    for name, parameter in inspect.signature(BatchNorm.__init__).parameters.items()
    if name != "self"
}
# What is in the variables of a layer that is already made.
_MADE = {"num_features", "use_bias", "use_scale", "param_dtype", "domains", "affine_by_domain", "rngs"}
OPTIONS = {name for name in PARAMETERS if name not in _MADE and not name.endswith(("_init", "_metadata"))}


def convert(model: Model, **options: Any) -> Model:
    """Make every batch norm of a model ours, in place, with its variables and these options.

    Each `flax.nnx.BatchNorm` becomes a `jbn.nnx.BatchNorm`: the same object, at every place that it is used
    in, with the same Variables, so that checkpoints and the state of an optimizer still fit. Layers that are
    ours already get the options. `convert(model, frozen=True)` freezes all norms of a model while its other
    layers train, until `model.set_attributes(jbn.nnx.BatchNorm, frozen=False)`.

    Args:
      model: a module, or any graph of them.
      options: those of `jbn.nnx.BatchNorm` that do not change its parameters, such as `frozen=True`,
        `virtual_batch_size=32`, `update=jbn.ema(0.9, debias=True)`. A rule that counts adds a `count`, which
        starts from `initial_count`, and a schedule of `renorm` adds `num_updates`, which starts from 0.

    Returns:
      The model that was given.

    Raises:
      TypeError: `jbn.nnx.BatchNorm` has no such option, or a layer is of a subclass of Flax's, whose own code
        would not run.
      ValueError: the model has no batch norm.
      ValueError, TypeError: an option has a value that the constructor of `jbn.nnx.BatchNorm` refuses. What
        depends on `x` is checked in the call.
      In every case the model is as it was.

    >>> import jbn.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> model = jbn.nnx.convert(model, virtual_batch_size=32)
    >>> print(type(model.layers[1]).__module__.split(".")[0])
    jbn
    """
    if made := options.keys() & PARAMETERS.keys() - OPTIONS:
        raise TypeError(
            f"got an option {min(made)!r}, which is fixed when a BatchNorm is made; expected one that "
            f"convert can change: {', '.join(sorted(OPTIONS))}."
        )
    check_option_names(options, OPTIONS)
    layers = batch_norms(model)
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} without batch norms; expected a module that has a "
            "flax.nnx.BatchNorm or a jbn.nnx.BatchNorm."
        )
    for path, layer in layers.items():
        if type(layer) not in (nnx.BatchNorm, BatchNorm):
            raise TypeError(
                f"'{path}' is a {type(layer).__name__}; expected flax.nnx.BatchNorm or "
                "jbn.nnx.BatchNorm itself, since the code of a subclass would not run any more: give it the "
                "options where it is made."
            )
    all_options = [
        _all_options(layer, options) for layer in layers.values()
    ]  # or an error, before any change
    for layer, its_options in zip(layers.values(), all_options):
        _convert(layer, its_options)
    return model


def _all_options(layer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a layer will have, checked."""
    has = lambda names: {name: getattr(layer, name, PARAMETERS[name].default) for name in names}
    made = has(OPTIONS) | options
    check_options(cast(Any, SimpleNamespace(**made, **has(["domains", "affine_by_domain"]))))
    return made


def _convert(layer: Any, options: dict[str, Any]) -> None:
    if type(layer) is not BatchNorm:
        object.__setattr__(layer, "__class__", BatchNorm)
        layer.domains, layer.affine_by_domain = None, False
        layer.count, layer.num_updates = nnx.data(None), nnx.data(None)
    for name, value in options.items():
        setattr(layer, name, value)
    if counts(layer.update) and layer.count is None:
        count = jnp.full(layer.mean.shape, layer.initial_count, jnp.real(layer.mean[...]).dtype)
        layer.count = nnx.BatchStat(count)
    if counts_updates(layer, True) and layer.num_updates is None:
        of_one = np.size(layer.num_features) + (layer.domains is not None)  # axes; of a stack there are more
        layer.num_updates = nnx.BatchStat(no_updates(layer.mean.shape[: layer.mean.ndim - of_one]))
