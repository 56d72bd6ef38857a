"""Running statistics from a pass over data, for any NNX model."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from flax import nnx

from jbn._pooling import Measured, add_measured, new_statistics, sweep_over
from jbn.nnx._measuring import Call, batch_norms, measure


def _call(model: Any, x: Any) -> Any:
    return model(x)


def recalibrate(model: Any, batches: Iterable[Any], *, call: Call = _call, sweeps: int = 1) -> None:
    """Set the running statistics of a model to the moments of all batches together, in place."""

    def add_batch(sweep, measured, batch):
        return _add_batch(call, sweep == 0, *nnx.split(model), measured, batch)

    for measured in sweep_over(batches, sweeps, add_batch):
        layers = batch_norms(model)
        for path, options in measured.options:
            stats = {name: getattr(layers[path], name, None) for name in ("mean", "var", "count")}
            stats = {name: stat for name, stat in stats.items() if stat is not None}
            old = {name: stat[...] for name, stat in stats.items()}
            for name, value in new_statistics(options, measured.inputs[path], old).items():
                stats[name][...] = value


@partial(jax.jit, static_argnums=(0, 1, 2))
def _add_batch(
    call: Call, by_batch: bool, graph: Any, state: Any, measured: Measured | None, batch: Any
) -> Measured:
    _, new = measure(call, nnx.merge(graph, state), batch, by_batch=by_batch)
    return add_measured(measured, new)
