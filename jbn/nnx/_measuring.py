"""Run an NNX model and measure what its batch norms are called with, inside NNX's transforms too."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError

from jbn._tools.pooling import Measured, add, measure_inputs, no_samples, options_of, warn_of_unmeasured
from jbn.nnx._batch_norm import BatchNorm

Call = Callable[[Any, Any], Any]


def batch_norms(model: Any) -> dict[str, Any]:
    """Return the batch norms of a model, Flax's and ours and those of subclasses, by path."""
    nodes = nnx.iter_graph(model)
    return {
        "/".join(map(str, path)): node for path, node in nodes if isinstance(node, (nnx.BatchNorm, BatchNorm))
    }


def measure(call: Call, model: Any, batch: Any, *, by_batch: bool) -> tuple[Any, Measured]:
    """Run a copy of a model as for evaluation; return its outputs, and what its batch norms were called with.

    Args:
      by_batch: normalize with the moments of the inputs themselves, as in training, and not with the running.

    Raises:
      ValueError: no batch norm was called, or one in training mode, in a copy, or in a transform of JAX.
    """
    while isinstance(call, jax.stages.Wrapped):  # jitted, which would hide what is inside
        call = call.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    model = nnx.clone(model)
    for _, node in [("", model)] if isinstance(model, nnx.Module) else nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            node.eval()
    layers = batch_norms(model)
    kinds = {path: type(layer) for path, layer in layers.items()}
    calls = _Calls(by_batch)
    for path, layer in layers.items():
        # BatchStats, because every transform around a batch norm passes these on; and of the plain kind,
        # because a `jax.Ref` holds one array, and a hijax variable cannot be set inside `jax.jit`.
        layer.inputs = nnx.BatchStat(no_samples(layer.mean[...]), ref=False, hijax=False)
        if getattr(layer.mean, "hijax", False):
            layer.mean, layer.var = (
                nnx.BatchStat(stat[...], ref=False, hijax=False) for stat in (layer.mean, layer.var)
            )
        layer.calls, layer.path = calls, path
        object.__setattr__(layer, "__class__", _measuring(type(layer)))
    starts = {path: layer.inputs.get_value().count for path, layer in layers.items()}
    outputs = call(model, batch)
    for path in calls.of_subclasses - calls.measured.keys():
        warn_of_unmeasured(path, kinds[path].__name__)
    if not calls.measured:
        raise ValueError(
            "call called no flax.nnx.BatchNorm or jbn.nnx.BatchNorm of the model that it was given; expected "
            "lambda model, x: model(x), or likewise."
        )
    inputs = {path: layers[path].inputs.get_value() for path in calls.measured}
    for path, found in inputs.items():
        if found.count is starts[path]:
            raise ValueError(
                f"'{path}' was called in a copy of the model that call was given, such as nnx.merge makes; "
                "expected a call of the model itself, as in lambda model, x: model(x)."
            )
    return outputs, Measured(inputs, tuple((path, options_of(layers[path])) for path in calls.measured))


@dataclass(eq=False)
class _Calls:
    """The paths of the layers that were called.

    It equals itself alone, so that what `nnx.jit` has compiled in one measurement is not used in another.
    """

    by_batch: bool
    measured: dict[str, None] = field(default_factory=dict)  # in order
    of_subclasses: set[str] = field(default_factory=set)


class _Measuring(nnx.Module):
    """Comes between the class that a layer has, or a subclass of it, and its `__call__`."""

    def __call__(self: Any, x, use_running_average=None, **options):
        if use_running_average is not None and not use_running_average:
            raise ValueError(
                f"'{self.path}' is called with use_running_average={use_running_average}, as in training; "
                "expected a call that runs the model as for evaluation, which leaves that to model.eval()."
            )
        self.calls.measured[self.path] = None
        found = measure_inputs(self, self.mean[...], x, options.get("mask"), options.get("domain"))
        try:
            self.inputs.set_value(add(self.inputs.get_value(), found))
        except TraceContextError as error:
            raise ValueError(
                f"'{self.path}' is called inside a transform of JAX, such as jax.vmap, or call ignores the "
                "model that it is given; expected nnx.vmap or likewise, with the model as an argument."
            ) from error
        old = self.mean.get_value(), self.var.get_value()
        if self.calls.by_batch:
            self.mean.set_value(found.moments.mean)
            self.var.set_value(found.var)
        y = super().__call__(x, True, **options)  # pyright: ignore[reportAttributeAccessIssue]
        for variable, value in zip((self.mean, self.var), old):
            variable.set_value(value)
        return y


class _Noting(nnx.Module):
    """Comes before a subclass, whose `__call__` may not call that of the batch norm."""

    def __call__(self: Any, *args, **kwargs):
        self.calls.of_subclasses.add(self.path)
        return super().__call__(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _measuring(kind: type) -> type:
    """Return a class like that of a batch norm, which measures."""
    base = BatchNorm if issubclass(kind, BatchNorm) else nnx.BatchNorm
    if kind is base:
        return type("Measuring", (_Measuring, base), {})
    return type("Measuring", (_Noting, kind, _measuring(base)), {})
