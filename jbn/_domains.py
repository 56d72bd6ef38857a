"""Domains: examples of several kinds in one batch, each normalized with the moments of its own kind.

Values per feature have a leading axis of domains then. Everything here takes the index of each example's
domain, (N,), or of all examples' one, (); with an index of None there are no domains.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jbn._axes import batch_axis, expand, other_axes
from jbn._merging import Part, merge_segments
from jbn._samples import measure_samples, single_samples


def as_domain(domain: Any, x: jax.Array, axes: tuple[int, ...], number: int) -> jax.Array:
    """Return the index of each example's domain as int32; what is out of range, if traced, as `number`.

    Raises:
      TypeError: it holds no integers.
      ValueError: it has another shape, or is out of range.
    """
    known = None if isinstance(domain, jax.core.Tracer) else np.asarray(domain)
    index = jnp.asarray(domain)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"domain has dtype {index.dtype}; expected integers from 0 to {number - 1}.")
    shapes = [(), *((x.shape[a],) for a in other_axes(x.ndim, axes)[:1])]
    if index.shape not in shapes:
        raise ValueError(
            f"domain has shape {index.shape}; expected {' or '.join(map(str, shapes))}: one index for x of "
            f"shape {x.shape}, or one for each example along its first axis that is not a feature axis."
        )
    if known is not None and not np.all((known >= 0) & (known < number)):
        raise ValueError(
            f"domain holds indices from {known.min()} to {known.max()}; expected 0 to {number - 1}, because "
            f"the running moments have {number} domains."
        )
    return jnp.where((index < 0) | (index >= number), number, index).astype(jnp.int32)


def at_samples(values: jax.Array, ndim: int, axes: tuple[int, ...], index: jax.Array | None) -> jax.Array:
    """Broadcast values per feature to samples, to each those of its domain; NaN if that is out of range."""
    if index is None:
        return expand(values, ndim, axes)
    rows = values.at[index].get(mode="fill", fill_value=jnp.nan)
    if index.ndim == 0:
        return expand(rows, ndim, axes)
    kept, place = _kept_axes(ndim, axes)
    return expand(jnp.moveaxis(rows, 0, place), ndim, kept)


def add_up(samples: jax.Array, axes: tuple[int, ...], index: jax.Array | None, number: int) -> jax.Array:
    """Add up samples for each feature, and for each of `number` domains."""
    if index is None or index.ndim == 0:
        total = jnp.sum(samples, other_axes(samples.ndim, axes))
        return total if index is None else _in_row(total, index, number)
    kept, place = _kept_axes(samples.ndim, axes)
    rows = jnp.moveaxis(jnp.sum(samples, other_axes(samples.ndim, kept)), place, 0)
    return jax.ops.segment_sum(rows, index, number)


def measure_domains(
    x: jax.Array,
    weights: jax.Array | None,
    axes: tuple[int, ...],
    index: jax.Array,
    *,
    shift: jax.Array,
    exact: bool = True,
    epsilon: float = 0.0,
) -> Part:
    """Measure the moments of each domain's samples, in the shape of `shift`; what has none has count 0.

    Mixed domains take one pass: over the samples of each example, whose moments are then merged by domain.
    The options are those of `measure_samples`.
    """
    number = shift.shape[0]
    if index.ndim == 0:
        nearest = shift.at[index].get(mode="clip")
        part = measure_samples(
            x, weights, other_axes(x.ndim, axes), shift=nearest, exact=exact, epsilon=epsilon
        )
        in_row = lambda leaf: _in_row(jnp.broadcast_to(leaf, part.var.shape), index, number)
        unit = None if part.unit is None else jnp.broadcast_to(part.unit, shift.shape)
        return jax.tree.map(in_row, part._replace(unit=None))._replace(unit=unit)
    kept, place = _kept_axes(x.ndim, axes)
    reduced = other_axes(x.ndim, kept)
    part = measure_samples(x, weights, reduced) if reduced else single_samples(x, weights)
    rows = jax.tree.map(lambda leaf: jnp.moveaxis(jnp.broadcast_to(leaf, part.var.shape), place, 0), part)
    return merge_segments(rows, index, number)


def _kept_axes(ndim: int, axes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return the axes of values per example and feature, and the place of the examples' axis among them."""
    batch = batch_axis(ndim, axes)
    kept = tuple(sorted((*axes, batch)))
    return kept, kept.index(batch)


def _in_row(values: jax.Array, index: jax.Array, number: int) -> jax.Array:
    """Put values into the row of a domain, and 0 into the others."""
    is_row = jnp.expand_dims(jnp.arange(number, dtype=index.dtype) == index, range(1, values.ndim + 1))
    return jnp.where(is_row, values[None], 0)
