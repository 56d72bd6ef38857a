"""Running statistics from a pass over data, for any Linen model."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from flax.core import FrozenDict, freeze, meta, unfreeze

from jbn._pooling import Measured, add_measured, as_static, new_statistics, sweep_over
from jbn.linen._measuring import Apply, measure


def recalibrate(apply: Apply, variables: Any, batches: Iterable[Any], *, sweeps: int = 1) -> Any:
    """Return variables whose running statistics are the moments of all batches together."""
    apply, done = as_static(apply), 0

    def add_batch(sweep, measured, batch):
        nonlocal done
        done = 1 if measured is None else done + 1
        return add_measured(measured, _measure(apply, sweep == 0, variables, batch))

    for measured in sweep_over(batches, sweeps, add_batch):
        variables = _with_statistics(variables, measured, done)
    return variables


@partial(jax.jit, static_argnums=(0, 1))
def _measure(apply: Apply, by_batch: bool, variables: Any, batch: Any) -> Measured:
    return measure(apply, variables, batch, by_batch=by_batch)[1]


def _with_statistics(variables: Any, measured: Measured, batches: int) -> Any:
    """Return variables with the running statistics that were measured."""
    stats = unfreeze(variables["batch_stats"])
    for path, options in measured.options:
        layer = stats
        for key in filter(None, path.split("/")):
            layer = layer[key]
        old = {name: layer[name] for name in ("mean", "var", "count") if name in layer}
        new = new_statistics(options, measured.inputs[path], meta.unbox(old), batches)
        layer |= meta.replace_boxed(old, new)
    stats = freeze(stats) if isinstance(variables["batch_stats"], FrozenDict) else stats
    new_variables = {**variables, "batch_stats": stats}
    return freeze(new_variables) if isinstance(variables, FrozenDict) else new_variables
