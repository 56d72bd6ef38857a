"""Why a Linen model is good in training and bad in evaluation."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from flax.core import meta, unfreeze

from jbn._params import Params
from jbn._statistics import Moments
from jbn._tools.observing import (
    Loss,
    Passes,
    Seen,
    add_observed,
    compiled,
    diagnose_by,
    losses_of,
    nothing_seen,
    replaced,
)
from jbn._tools.pooling import Measured
from jbn.inspection import Diagnosis
from jbn.linen._calls import check_apply
from jbn.linen._measuring import Apply, measure


def diagnose(apply: Apply, variables: Any, batches: Iterable[Any], *, loss: Loss | None = None) -> Diagnosis:
    """Compare the running statistics of a Linen model with batches of data, and say what is wrong with them.

    It works with every model that has `flax.linen.BatchNorm` or ours. The data are gone through once, and
    with a loss twice; each batch is run with the running statistics and with its own, then with those of all
    batches. Batches of the size of training, in random order, tell most: what is within one depends on both.

    Args:
      apply: `apply(variables, batch)` runs the model as for evaluation, as in
        `lambda variables, x: model.apply(variables, x, train=False)`. Given again, it is not compiled again.
      variables: those of the model; they stay as they are.
      batches: any iterable of pytrees of arrays, such as (x, label), whose first axes are examples.
      loss: `loss(outputs, batch)` is the mean loss of a batch, (). With it the verdict knows whether the
        network was trained with the statistics that it has, and what the differences cost.

    Returns:
      Diagnosis: `print(diagnosis)` shows it, `findings` is the verdict, `as_dict()` is JSON, and `save(path)`
      draws it.

    Raises:
      ValueError: there are no batches, or no batch norm was called; or with a loss, that is no scalar, or
        `batches` can be gone through only once.
      TypeError: `apply` is no function, or `batches` is one array.

    Reference: docs/evaluation/diagnose.md.

    >>> import flax.linen as nn, jax, jbn.linen
    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> x = jax.random.normal(jax.random.key(0), (64, 4))
    >>> variables = model.init(jax.random.key(1), x)
    >>> diagnosis = jbn.linen.diagnose(model.apply, variables, [x[:32], x[32:]])
    >>> print([(finding.kind, finding.layers) for finding in diagnosis.findings])
    [('never updated', ('layers_1',))]
    """
    check_apply(apply)

    def variables_of(path):
        params, stats = (_at(variables.get(name, {}), path) for name in ("params", "batch_stats"))
        running = Moments(stats["mean"], stats["var"], stats.get("count"))  # pyright: ignore[reportArgumentType]
        return running, Params(params.get("scale"), params.get("bias"))

    observe = compiled(_observe, apply, loss)
    passes = Passes(
        lambda seen, batch: observe(seen, variables, batch), partial(_loss_of, apply, loss, variables)
    )
    return diagnose_by(passes, batches, loss is not None, variables_of)


@partial(jax.jit, static_argnums=(0, 1))
def _observe(
    apply: Apply, loss: Loss | None, seen: Seen | None, variables: Any, batch: Any
) -> tuple[Seen, jax.Array]:
    outputs, measured = measure(apply, variables, batch, by_batch=True)
    seen = add_observed(nothing_seen(measured) if seen is None else seen, measured, batch)
    running = None if loss is None else apply(variables, batch)
    return seen, losses_of(loss, running, outputs, batch)


@partial(jax.jit, static_argnums=(0, 1))
def _loss_of(apply: Apply, loss: Loss, variables: Any, measured: Measured, batch: Any) -> jax.Array:
    stats: Any = unfreeze(variables["batch_stats"])
    for path, _ in measured.options:
        layer = _at(stats, path, unbox=False)
        old = {name: layer[name] for name in ("mean", "var")}
        layer |= meta.replace_boxed(old, replaced(measured, path, meta.unbox(old)))
    return loss(apply({**variables, "batch_stats": stats}, batch), batch)


def _at(collection: Any, path: str, *, unbox: bool = True) -> Any:
    """Return what a collection has of a layer; {} for nothing."""
    for key in filter(None, path.split("/")):
        collection = collection.get(key, {})
    return meta.unbox(collection) if unbox else collection
