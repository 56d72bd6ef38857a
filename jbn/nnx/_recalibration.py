"""Running statistics from a pass over data, for any NNX model."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from flax import nnx

from jbn._pooling import Measured, add_measured, as_static, new_statistics, sweep_over
from jbn.nnx._measuring import Call, batch_norms, measure


def _call(model: Any, x: Any) -> Any:
    return model(x)


def recalibrate(model: Any, batches: Iterable[Any], *, call: Call = _call, sweeps: int = 1) -> None:
    """Set the running statistics of a model to the moments of all batches together, in place."""
    call, done = as_static(call), 0

    def add_batch(sweep, measured, batch):
        nonlocal done
        done = 1 if measured is None else done + 1
        return add_measured(measured, _measure(call, sweep == 0, *nnx.split(model), batch))

    for measured in sweep_over(batches, sweeps, add_batch):
        layers = batch_norms(model)
        for path, options in measured.options:
            stats = {name: getattr(layers[path], name, None) for name in ("mean", "var", "count")}
            stats = {name: stat for name, stat in stats.items() if stat is not None}
            old = {name: stat[...] for name, stat in stats.items()}
            for name, value in new_statistics(options, measured.inputs[path], old, done).items():
                stats[name].set_value(value)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(call: Call, by_batch: bool, graph: Any, state: Any, batch: Any) -> Measured:
    return measure(call, nnx.merge(graph, state), batch, by_batch=by_batch)[1]
