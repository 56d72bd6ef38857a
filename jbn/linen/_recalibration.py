"""Running statistics from a pass over data, for any Linen model."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from flax.core import FrozenDict, freeze, meta, unfreeze

from jbn._tools.pooling import Measured, add_measured, new_statistics, sweep_over
from jbn.linen._calls import check_apply
from jbn.linen._measuring import Apply, measure


def recalibrate(apply: Apply, variables: Any, batches: Iterable[Any], *, sweeps: int = 1) -> Any:
    """Return variables whose running statistics are the moments of all batches together.

        mean = sum over batches of n_b mean_b / N;  N = sum of n_b
        var  = sum over batches of n_b (var_b + |mean_b - mean|^2) / N

    For a model whose weights were averaged, pruned, quantised or loaded, or whose data are others now: the
    statistics become those of its inputs with these weights. It works on any Flax model, with
    `flax.linen.BatchNorm` or `jbn.linen.BatchNorm`, also inside `nn.scan`, `nn.vmap`, `nn.remat`, `nn.jit`.

    The first sweep normalizes each batch with its own moments, as in training (and with those of the whole
    batch, if a layer has ghost batches in training). Further ones normalize with those found so far: with L
    of them, those of a network of L layers are exactly what its layers see in evaluation, and independent of
    how the data are cut into batches. That has not made networks more accurate (digits, batches of 4 to 32:
    one sweep was as good or better), so that one is the default.

    PyTorch's `update_bn` averages the unbiased variances within batches, whatever their sizes, without the
    spread between them: with batches of 4 the variance behind the first norm is 4/3 of what it is. Here every
    sample counts once, masks and repeated calls of a layer included.

    Args:
      apply: `apply(variables, batch)` runs the model as for evaluation; what it returns is not used. The
        model is traced anew for each new function and shape of a batch, so define it once.
      variables: of the model; of "batch_stats", layers that are called change, frozen ones too, and
        everything else is as it was, dtypes and placement included.
      batches: an iterable of what `apply` takes: arrays or pytrees of arrays, of any sizes, on one device or
        sharded. In several processes each gives the same global arrays.
      sweeps: how often to go through the batches, which must then be more than an iterator.

    Returns:
      Variables of the same structure. Where a rule counts, `jbn.pooled()` continues from the number of
      samples, `jbn.cumulative()` from that of batches, `jbn.ema(debias=True)` as from complete statistics.
      A feature keeps its statistics if it had no samples; a batch in which it is not finite does not count.

    Raises:
      ValueError: no batches, an iterator for several sweeps; `apply` calls no batch norm with the variables,
        or one in training mode, or where none of its statistics can be collected (inside `jax.vmap`, or a
        transform that broadcasts "batch_stats").
      TypeError: `apply` is no function, or `batches` is one array.

    Warns:
      UserWarning: a layer is of a subclass that does not call `super().__call__`, and keeps its statistics.

    Reference: Ioffe & Szegedy 2015, Algorithm 2, lines 8 to 12, which averages unbiased variances; precise
    statistics: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen
    >>> model = nn.BatchNorm(use_running_average=True)
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[4.0], [8.0]])]
    >>> variables = model.init(jax.random.key(0), batches[0])
    >>> variables = jbn.linen.recalibrate(model.apply, variables, batches)
    >>> print(variables["batch_stats"]["mean"], variables["batch_stats"]["var"])
    [4.] [6.5]
    """
    check_apply(apply)
    done = 0

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
