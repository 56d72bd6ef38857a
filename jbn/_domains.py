"""Domains: examples of several kinds in one batch, each normalized with the moments of its own kind.

Values per feature have a leading axis of domains then. The index of each example's domain is (N,), that of
all examples' one (); None if there are no domains.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jbn._axes import other_axes
from jbn._xla import add_rows, take_rows


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
    return expand_by(values, other_axes(ndim, axes), index)


def expand_by(values: jax.Array, reduced: tuple[int, ...], index: jax.Array | None) -> jax.Array:
    """Insert the axes `reduced` of samples into values per feature, to each those of its domain."""
    if index is None:
        return jnp.expand_dims(values, reduced)
    if index.ndim == 0:
        return jnp.expand_dims(take_rows(values, index[None])[0], reduced)
    # The examples' axis is the first of those reduced, so that all before it are kept.
    batch, *others = reduced
    return jnp.expand_dims(jnp.moveaxis(take_rows(values, index), 0, batch), others)


def add_up(samples: jax.Array, reduced: tuple[int, ...], index: jax.Array | None, number: int) -> jax.Array:
    """Add up samples over the axes `reduced` for each feature, and for each of `number` domains."""
    if index is None:
        return jnp.sum(samples, reduced)
    if index.ndim == 0:
        return add_rows(jnp.sum(samples, reduced)[None], index[None], number)
    batch, *others = reduced
    return add_rows(jnp.moveaxis(jnp.sum(samples, others), batch, 0), index, number)
