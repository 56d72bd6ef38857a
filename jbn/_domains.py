"""Domains: examples of several kinds in one batch, each normalized with the moments of its own kind.

Values per feature have a leading axis of domains then. The index of each example's domain is (N,), that of
all examples' one (); None if there are no domains.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jbn._axes import other_axes
from jbn._dtypes import arithmetic_dtype, real_dtype
from jbn._sharding import shard_axis_like
from jbn._xla import add_rows, take_rows


def as_domain(domain: Any, x: jax.Array, axes: tuple[int, ...], number: int) -> jax.Array:
    """Return the index of each example's domain as int32; what is out of range, if traced, as `number`.

    Raises:
      TypeError: it holds no integers.
      ValueError: it has another shape, or is out of range.
    """
    known = None if isinstance(domain, jax.core.Tracer) else np.asarray(domain)
    dtype = domain.dtype if known is None else known.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"domain has dtype {dtype}; expected integers from 0 to {number - 1}.")
    index = jnp.asarray(domain)
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
    most = min(number - 1, jnp.iinfo(index.dtype).max)
    index = jnp.where((index < 0) | (index > most), number, index.astype(jnp.int32))
    return shard_axis_like(index, x, other_axes(x.ndim, axes)[0], of_values=0) if index.ndim else index


def at_samples(values: jax.Array, ndim: int, axes: tuple[int, ...], index: jax.Array | None) -> jax.Array:
    """Broadcast values per feature to samples, to each those of its domain; NaN if that is out of range."""
    return Sets(other_axes(ndim, axes), index).expand(values)


class Sets(NamedTuple):
    """Which samples have moments together: those of a feature, and with domains those of a feature in one."""

    reduced: tuple[int, ...]  # the axes of samples that are no features
    # () or (N,), of domains
    index: jax.Array | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    number: int = 1  # of domains
    members: int = 0  # how many first axes of samples, values and index are those of a `vmap`

    @property
    def within(self) -> tuple[int, ...]:
        """The reduced axes along which all samples are of one domain: all but that of the examples."""
        return self.reduced if self.index is None else self.reduced[self.index.ndim - self.members :]

    def add_up(self, samples: jax.Array) -> jax.Array:
        """Add up the samples of each set, into (features...) or (number, features...)."""
        if self.index is None:
            return jnp.sum(samples, self.reduced)

        def add(samples, index, reduced):
            # The examples' axis is the first of those reduced, so that all axes before it are kept.
            rows = jnp.sum(samples, reduced[index.ndim :])
            rows = jnp.moveaxis(rows, reduced[0], 0) if index.ndim else rows[None]
            return add_rows(rows, jnp.atleast_1d(index), self.number)

        return self._of_members(add, samples)

    def expand(self, values: jax.Array) -> jax.Array:
        """Broadcast values of sets to their samples; NaN where the domain is out of range."""
        if self.index is None:
            return jnp.expand_dims(values, self.reduced)

        def take(values, index, reduced):
            rows = take_rows(values, jnp.atleast_1d(index))
            rows = jnp.moveaxis(rows, 0, reduced[0]) if index.ndim else rows[0]
            return jnp.expand_dims(rows, reduced[index.ndim :])

        return self._of_members(take, values)

    def size_of(self, x: jax.Array) -> jax.Array | int:
        """Count the samples; an array if there are domains, or the size is symbolic, in `jax.export`."""
        dtype, size = real_dtype(arithmetic_dtype(x)), math.prod(x.shape[axis] for axis in self.within)
        features = x.ndim - len(self.reduced)
        if self.index is None:
            return size if isinstance(size, int) else jnp.full((1,) * features, size, dtype)

        def count(index, reduced):
            index = jnp.atleast_1d(index)
            return add_rows(jnp.ones_like(index, dtype), index, self.number)

        examples = self._of_members(count)
        return jnp.expand_dims(examples, range(examples.ndim, 1 + features)) * jnp.asarray(size, dtype)

    def total_of(self, weights: jax.Array, x: jax.Array) -> jax.Array:
        """Add up the weights of samples `x`; feature axes that share a weight keep size 1."""
        weights = weights.astype(real_dtype(arithmetic_dtype(x)))
        if self.index is not None and self.within != self.reduced:
            # Weights that examples share are added up for each domain.
            others = [axis for axis in range(x.ndim) if axis != self.reduced[0]]
            weights = weights * jnp.expand_dims(jnp.ones_like(self.index, weights.dtype), others)
        # A weight that is shared along an axis is summed once and multiplied: exact for more samples than
        # float32 can count one by one.
        size = math.prod(x.shape[axis] for axis in self.reduced if weights.shape[axis] == 1)
        total = self.add_up(weights)
        return total if isinstance(size, int) and size == 1 else total * jnp.asarray(size, total.dtype)

    def _of_members(self, f: Callable[..., jax.Array], *values: jax.Array) -> jax.Array:
        """Call `f(*values, index, reduced)`, for each of the members."""
        f = partial(f, reduced=tuple(axis - self.members for axis in self.reduced))
        for _ in range(self.members):
            f = jax.vmap(f)
        return f(*values, self.index)
