"""Passes over batches for a diagnosis, whichever of Flax's APIs the model is written in."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn._params import Params
from jbn._statistics import Moments
from jbn._tools.pooling import Measured, add_measured, check_batches, no_samples
from jbn.inspection import Diagnosis, LayerRecord, Losses, diagnose
from jbn.inspection._diagnosis.records import Batches, add_batch, no_batches

Loss = Callable[[Any, Any], jax.Array]  # (outputs, batch) -> the mean over the batch


class Seen(NamedTuple):
    """What was measured over some batches."""

    measured: Measured
    batches: dict[str, Batches]
    data_are_finite: jax.Array  # () Boolean


class Passes(NamedTuple):
    """What a model does with a batch, for `observe`: functions that are compiled once."""

    # (seen, batch) -> (seen, what `losses_of` returns)
    observe: Callable[[Seen | None, Any], tuple[Seen, jax.Array]]
    # (measured, batch) -> loss with the moments of all batches
    recalibrated_loss: Callable[[Measured, Any], jax.Array]


def add_observed(seen: Seen, measured: Measured, batch: Any) -> Seen:
    """Add what was measured in one batch."""
    batches = {
        path: add_batch(old, measured.inputs[path].moments, measured.inputs[path].nonfinite)
        for path, old in seen.batches.items()
    }
    leaves = [leaf for leaf in jax.tree.leaves(batch) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    finite = [jnp.isfinite(leaf).all() for leaf in leaves]
    data_are_finite = jnp.stack([seen.data_are_finite, *finite]).all()
    return Seen(add_measured(seen.measured, measured), batches, data_are_finite)


def losses_of(loss: Loss | None, running: Any, own: Any, batch: Any) -> jax.Array:
    """Return the losses of outputs by running statistics, by the batch's own, and of mismatched ones.

    Raises:
      ValueError: `loss` returns no scalar.
    """
    if loss is None:
        return jnp.zeros(3)

    def of_others(leaf):
        return jnp.roll(leaf, leaf.shape[0] // 2, 0) if leaf.ndim else leaf

    losses = loss(running, batch), loss(own, batch), loss(jax.tree.map(of_others, running), batch)
    if jnp.shape(losses[0]) != ():
        raise ValueError(
            f"loss returned an array of shape {jnp.shape(losses[0])}; expected (): the mean over the batch."
        )
    return jnp.stack(losses)


def nothing_seen(measured: Measured) -> Seen:
    """Return the start for `add_observed`, for layers like these."""
    inputs = {path: no_samples(found.mean) for path, found in measured.inputs.items()}
    batches = {path: no_batches(none.moments) for path, none in inputs.items()}
    return Seen(Measured(inputs, measured.options), batches, jnp.array(True))


def diagnose_by(
    passes: Passes,
    batches: Iterable[Any],
    has_loss: bool,
    variables_of: Callable[[str], tuple[Moments, Params]],
) -> Diagnosis:
    """Go through the batches once, and with a loss a second time, and judge what they showed.

    Args:
      variables_of: returns running statistics, with a count of None where none is kept, and parameters of the
        layer at a path.

    Raises:
      TypeError: `batches` is one array or mapping.
      ValueError: there are no batches; or with a loss, they can be gone through only once.
    """
    check_batches(batches)
    if has_loss and iter(batches) is batches:
        raise ValueError(
            f"batches is a {type(batches).__name__}, which can be gone through once; expected a list of "
            "batches, or another object that can be gone through again, for the recalibrated loss."
        )
    seen, losses, sizes = None, [], []
    for batch in batches:
        seen, some = passes.observe(seen, batch)
        losses.append(some)
        sizes.append(_size(batch))
        jax.block_until_ready(some)  # or batches that wait would fill the memory
    if seen is None:
        raise ValueError("batches is empty; expected at least one batch.")
    found = None
    if has_loss:
        third = []
        for batch in batches:
            third.append(passes.recalibrated_loss(seen.measured, batch))
            jax.block_until_ready(third[-1])
        running, own, mismatched = np.stack([np.asarray(some) for some in losses], axis=1)
        recalibrated = np.stack([np.asarray(loss) for loss in third])
        found = Losses(running, own, recalibrated, mismatched, np.array(sizes))
    return diagnose(
        _records(jax.device_get(seen), variables_of),
        losses=found,
        examples=sum(sizes),
        data_are_finite=bool(seen.data_are_finite),
    )


def _size(batch: Any) -> int:
    """Return how many examples a batch has: its leaves' first axis."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), 1)


def _records(seen: Seen, variables_of) -> Mapping[str, LayerRecord]:
    records = {}
    for path, options in seen.measured.options:
        inputs = seen.measured.inputs[path]
        if not (inputs.count.any() or inputs.nonfinite.any()):
            continue  # it was not called
        running, params = variables_of(path)
        has_count = running.count is not None
        records[path] = LayerRecord(
            running=running if has_count else running._replace(count=np.zeros(())),
            population=inputs.moments,
            batches=seen.batches[path],
            params=params,
            epsilon=options.epsilon,
            update=options.update,
            momentum=options.momentum,
            frozen=options.frozen,
            has_count=has_count,
        )
    return records


def replaced(found: Measured, path: str, old: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the running mean and variance of a layer with the moments that were found."""
    inputs = found.inputs[path]
    new = {"mean": inputs.moments.mean, "var": inputs.var}
    return {name: jnp.where(inputs.count > 0, new[name], old[name]).astype(old[name].dtype) for name in new}


def compiled(add: Callable, *static: Any) -> Callable[..., tuple[Seen, jax.Array]]:
    """Give the first batch something to be added to, so that one program serves all batches of one shape."""

    def observe(seen, *arguments):
        if seen is None:
            shapes = jax.eval_shape(partial(add, *static), None, *arguments)[0]
            seen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            seen = seen._replace(data_are_finite=jnp.array(True))
        return add(*static, seen, *arguments)

    return observe
