"""Run an NNX model and measure what its batch norms are called with, inside NNX's transforms too."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import jax
from flax import nnx

from jbn._pooling import Measured, add, input_moments, no_samples, options_of
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
      ValueError: no batch norm was called.
    """
    while isinstance(call, jax.stages.Wrapped):  # jitted, which would hide what is inside
        call = call.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    model = nnx.clone(model)
    model.eval()
    layers = batch_norms(model)
    for path, layer in layers.items():
        # A BatchStat, because every transform around a batch norm passes these on.
        layer.inputs = nnx.BatchStat(no_samples(layer.mean[...]))
        layer.measured_as = path
    called: dict[str, None] = {}  # an ordered set
    with ExitStack() as stack:
        for kind in (nnx.BatchNorm, BatchNorm):
            measuring = _measuring(kind.__call__, by_batch, called)
            stack.enter_context(mock.patch.object(kind, "__call__", measuring))
        outputs = call(model, batch)
    inputs = {path: layer.inputs.get_value() for path, layer in layers.items()}
    paths = [*called, *(path for path in layers if path not in called)]
    options = tuple((path, options_of(layers[path])) for path in paths)
    return outputs, Measured(inputs, options)


def _measuring(call, by_batch, called):
    def measuring(self, x, use_running_average=None, *, mask=None, **arrays):
        if not hasattr(self, "inputs"):
            return call(self, x, use_running_average, mask=mask, **arrays)
        called[self.measured_as] = None
        found = input_moments(self, x, mask)
        self.inputs.set_value(add(self.inputs.get_value(), found))
        old = self.mean[...], self.var[...]
        if by_batch:
            self.mean[...], self.var[...] = found.mean, found.var
        y = call(self, x, True, mask=mask, **arrays)
        self.mean[...], self.var[...] = old
        return y

    return measuring
