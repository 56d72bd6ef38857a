"""Virtual batches, also called ghost batches: parts of a batch that are normalized each on its own."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jbn.axes import other_axes


def count_parts(x: jax.Array, axes: tuple[int, ...], virtual_batch_size: int | None) -> int | None:
    """Returns ceil(N / virtual_batch_size) for a batch of N; None if the batch is to stay whole.

    Raises:
      TypeError: the size is not an integer.
      ValueError: the size is < 1, or `x` has no batch axis.
    """
    if virtual_batch_size is None:
        return None
    try:
        size = operator.index(virtual_batch_size)
    except TypeError:
        raise TypeError(f"virtual_batch_size={virtual_batch_size!r}; wanted an integer, or None.") from None
    if size < 1:
        raise ValueError(f"virtual_batch_size={size}; wanted a number of examples >= 1, or None for all.")
    if not other_axes(x.ndim, axes):
        raise ValueError(
            f"virtual_batch_size={size} needs a batch axis to split, but x of shape {x.shape} has only feature "
            f"axes {axes}; outside of jax.vmap it would have one."
        )
    return max(1, -(-x.shape[batch_axis(x.ndim, axes)] // size))


def batch_axis(ndim: int, axes: tuple[int, ...]) -> int:
    """Returns the axis that counts examples: the first that is not a feature axis."""
    return other_axes(ndim, axes)[0]


def map_parts(f: Callable[..., Any], parts: int, axes: tuple[int, ...]) -> Callable[..., Any]:
    """Applies `f(x, params, running, weights, train)` to consecutive parts of the batch.

    The sizes of the parts differ by one at most, as in `numpy.array_split`. All are computed at once: the batch
    is reshaped to (parts, size), where the last row of the shorter parts is padding, which the weights mask. So
    a batch that is sharded into as many parts stays where it is.

    Returns:
      A function that returns `y` in the shape of `x`, and the moments of the parts along a new first axis.
    """

    def mapped(x, params, running, weights, train):
        axis = batch_axis(x.ndim, axes)
        examples = x.shape[axis]
        if examples % parts:
            ones = jnp.ones(tuple(n if a == axis else 1 for a, n in enumerate(x.shape)), bool)
            weights = ones if weights is None else jnp.where(ones, weights, 0)
        whole = weights is None or weights.shape[axis] == 1
        y, moments = jax.vmap(
            f, in_axes=(axis, None, None, None if whole else axis, None), out_axes=(axis, 0)
        )(
            _split(x, parts, axis),
            params,
            running,
            weights if whole else _split(weights, parts, axis),
            train,
        )
        return _join(y, examples, axis), moments

    return mapped


def _split(x: jax.Array, parts: int, axis: int) -> jax.Array:
    """Reshapes an axis to (parts, size); pads with 0 the parts that have one less."""
    shape = lambda count, size: (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    short, longer = divmod(x.shape[axis], parts)
    if not longer:
        return x.reshape(shape(parts, short))
    first, rest = jnp.split(x, [longer * (short + 1)], axis)
    rest = rest.reshape(shape(parts - longer, short))
    padding = [(0, int(a == axis + 1)) for a in range(rest.ndim)]
    return jnp.concatenate([first.reshape(shape(longer, short + 1)), jnp.pad(rest, padding)], axis)


def _join(x: jax.Array, examples: int, axis: int) -> jax.Array:
    """Undoes `_split`."""
    merge_axes = lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    longer = examples % x.shape[axis]
    if not longer:
        return merge_axes(x)
    first, rest = jnp.split(x, [longer], axis)
    return jnp.concatenate([merge_axes(first), merge_axes(rest[(slice(None),) * (axis + 1) + (slice(-1),)])], axis)
