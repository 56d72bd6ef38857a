"""Running statistics from a pass over data, for any NNX model."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx

from jbn._tools.pooling import Measured, add_measured, new_statistics, sweep_over
from jbn.nnx._measuring import Call, batch_norms, measure


def _call(model: Any, x: Any) -> Any:
    try:
        return model(x)
    except Exception as error:
        if isinstance(x, list | tuple | Mapping):
            kind = type(x).__name__
            error.add_note(
                f"The model was called with a whole batch, a {kind}; if it takes a part of it, say which by "
                "call=lambda model, batch: model(batch[0])."
            )
        raise


def recalibrate(model: Any, batches: Iterable[Any], *, call: Call = _call, sweeps: int = 1) -> None:
    """Set the running statistics of a model to the moments of all batches together, in place.

        mean = sum over batches of n_b mean_b / N;  N = sum of n_b
        var  = sum over batches of n_b (var_b + |mean_b - mean|^2) / N

    As `jbn.linen.recalibrate`, which says what it is for and what `sweeps` do, for any NNX model with
    `flax.nnx.BatchNorm` or `jbn.nnx.BatchNorm`, also inside `nnx.scan`, `nnx.vmap`, `nnx.remat`, `nnx.jit`. A
    copy of the model runs in evaluation mode, without dropout; of the model itself nothing changes but the
    running statistics of the layers that were called, frozen ones too.

    Args:
      model: a module, or what holds one.
      batches: an iterable of what `call` takes: arrays or pytrees of arrays, of any sizes, on one device or
        sharded. In several processes each gives the same global arrays.
      call: `call(model, batch)` runs the model that it is given; what it returns is not used. If batches are
        (x, label), `lambda model, batch: model(batch[0])`. The model is traced anew for each new function and
        shape of a batch, so define it once.
      sweeps: how often to go through the batches, which must then be more than an iterator.

    Raises:
      ValueError: no batches, an iterator for several sweeps; `call` calls no batch norm of the model, or one
        with `use_running_average=False`.
      TypeError: `batches` is one array.

    Warns:
      UserWarning: a layer is of a subclass that does not call `super().__call__`, and keeps its statistics.

    Reference: Ioffe & Szegedy 2015, Algorithm 2; Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm".

    >>> import jax.numpy as jnp, jbn.nnx
    >>> from flax import nnx
    >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> jbn.nnx.recalibrate(model, [jnp.array([[1.0], [3.0]]), jnp.array([[4.0], [8.0]])])
    >>> print(model.mean[...], model.var[...])
    [4.] [6.5]
    """
    done = 0

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
