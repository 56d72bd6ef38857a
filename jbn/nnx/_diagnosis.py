"""Why an NNX model is good in training and bad in evaluation."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from flax import nnx

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
from jbn.nnx._measuring import Call, batch_norms, measure
from jbn.nnx._recalibration import _call


def diagnose(
    model: Any, batches: Iterable[Any], *, call: Call = _call, loss: Loss | None = None
) -> Diagnosis:
    """Compare the running statistics of an NNX model with batches of data, and say what is wrong with them.

    It works with every model that has `flax.nnx.BatchNorm` or ours, and does not change it. The data are gone
    through once, and with a loss twice, as `jbn.linen.diagnose` does.

    Args:
      model: a module, or any graph of them, in training or evaluation mode.
      batches: any iterable of pytrees of arrays, such as (x, label), whose first axes are examples.
      call: `call(model, batch)` runs the model: `lambda model, batch: model(batch[0])` if batches are
        (x, label). Given again, it is not compiled again.
      loss: `loss(outputs, batch)` is the mean loss of a batch, ().

    Returns:
      Diagnosis: `print(diagnosis)` shows it, `findings` is the verdict, `as_dict()` is JSON, and `save(path)`
      draws it.

    Raises:
      ValueError: there are no batches, or no batch norm was called; or with a loss, that is no scalar, or
        `batches` can be gone through only once.
      TypeError: `batches` is one array.

    Reference: docs/evaluation/diagnose.md.

    >>> import jax, jbn.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> x = jax.random.normal(jax.random.key(0), (64, 4))
    >>> diagnosis = jbn.nnx.diagnose(model, [x[:32], x[32:]])
    >>> print([(finding.kind, finding.layers) for finding in diagnosis.findings])
    [('never updated', ('layers/1',))]
    """
    layers = batch_norms(model)

    def variables_of(path):
        mean, var, count, scale, bias = (
            None if (variable := getattr(layers[path], name, None)) is None else variable[...]
            for name in ("mean", "var", "count", "scale", "bias")
        )
        return Moments(mean, var, count), Params(scale, bias)  # pyright: ignore[reportArgumentType]

    graph, state = nnx.split(model)
    observe = compiled(_observe, call, loss, graph)
    passes = Passes(
        lambda seen, batch: observe(seen, state, batch), partial(_loss_of, call, loss, graph, state)
    )
    return diagnose_by(passes, batches, loss is not None, variables_of)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(
    call: Call, loss: Loss | None, graph: Any, seen: Seen | None, state: Any, batch: Any
) -> tuple[Seen, jax.Array]:
    outputs, measured = measure(call, nnx.merge(graph, state), batch, by_batch=True)
    seen = add_observed(nothing_seen(measured) if seen is None else seen, measured, batch)
    model = nnx.merge(graph, state)
    model.eval()
    running = None if loss is None else call(model, batch)
    return seen, losses_of(loss, running, outputs, batch)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _loss_of(call: Call, loss: Loss, graph: Any, state: Any, measured: Measured, batch: Any) -> jax.Array:
    model = nnx.merge(graph, state)
    layers = batch_norms(model)
    for path, _ in measured.options:
        layer = layers[path]
        old = {"mean": layer.mean[...], "var": layer.var[...]}
        for name, value in replaced(measured, path, old).items():
            getattr(layer, name)[...] = value
    model.eval()
    return loss(call(model, batch), batch)
