"""Virtual batches, also called ghost batches: parts of a batch that are normalized separately."""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jbn._axes import expand, other_axes
from jbn._normalization import Params
from jbn._sharding import replicate_unless_divisible, shard_axis_like, shard_like
from jbn._statistics import Moments
from jbn._xla import for_each_part


def count_parts(x: jax.Array, axes: tuple[int, ...], virtual_batch_size: int | None) -> int | None:
    """Return ceil(N / virtual_batch_size) for a batch of N; None if the batch is not to be split.

    Raises:
      TypeError: the size is not an integer.
      ValueError: the size is < 1, or `x` has no batch axis.
    """
    if virtual_batch_size is None:
        return None
    try:
        size = operator.index(virtual_batch_size)
    except TypeError:
        raise TypeError(f"virtual_batch_size={virtual_batch_size!r}; expected an integer, or None.") from None
    if size < 1:
        raise ValueError(f"virtual_batch_size={size}; expected a number of examples >= 1, or None for all.")
    if not other_axes(x.ndim, axes):
        raise ValueError(
            f"virtual_batch_size={size} needs a batch axis to split, but x of shape {x.shape} has feature "
            f"axes {axes} only; outside of jax.vmap it would have one."
        )
    return max(-(-x.shape[batch_axis(x.ndim, axes)] // size), 1)


def batch_axis(ndim: int, axes: tuple[int, ...]) -> int:
    """Return the axis of the examples: the first that is not a feature axis."""
    return other_axes(ndim, axes)[0]


def map_parts(
    f: Callable[..., tuple],
    parts: int,
    axes: tuple[int, ...],
    x: jax.Array,
    params: Params,
    running: Moments,
    weights: jax.Array | None,
    train: jax.Array | None,
) -> tuple[jax.Array, Moments, jax.Array | None]:
    """Map `f(x, params, running, weights, train)` over consecutive parts of the batch.

    The sizes of the parts differ by one at most, as in `numpy.array_split`. Parts of one size are computed
    together: the batch is reshaped to (parts, size), so that a batch that is sharded into whole parts is not
    moved between devices.

    Returns:
      `y` in the shape of `x`, and the other results of `f` for each part, along a new first axis.
    """
    axis, hidden = batch_axis(x.ndim, axes), None
    if weights is not None and jax.config.jax_debug_nans:  # pyright: ignore[reportAttributeAccessIssue]
        # It checks every array, including the parts of x, so that hidden values are replaced first.
        hidden = ~(weights.astype(bool) | jnp.isfinite(x))
        x = jnp.where(hidden, 0, x)
    given = x
    x = replicate_unless_divisible(given, axis, parts)
    weights_axis = None
    if weights is not None and weights.shape[axis] != 1:
        weights, weights_axis = shard_axis_like(weights, x, axis), axis
    # Under explicit sharding, repeated parameters would have to be sharded like the parts.
    params_axis = None if jax.typeof(x).sharding.spec[axis] else 0
    f_of_parts = jax.vmap(f, (axis, params_axis, None, weights_axis, None), (axis, 0, 0))

    def of_one_size(parts, x, weights):
        if weights_axis is not None:
            weights = _split(weights, parts, axis)
        of_parts = params
        if params_axis == 0:
            of_parts = jax.tree.map(lambda leaf: for_each_part(leaf, parts), params)
        y, *moments = f_of_parts(_split(x, parts, axis), of_parts, running, weights, train)
        return y.reshape(x.shape), moments

    longer = x.shape[axis] % parts
    if not longer:
        y, moments = of_one_size(parts, x, weights)
    else:
        cut = [longer * (x.shape[axis] // parts + 1)]
        if weights is None or weights_axis is None:
            two_weights = [weights, weights]
        else:
            two_weights = jnp.split(weights, cut, axis)
        sizes = zip((longer, parts - longer), jnp.split(x, cut, axis), two_weights)
        y, moments = zip(*(of_one_size(*size) for size in sizes))
        moments = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *moments)
        y = jnp.concatenate(y, axis)
    y = shard_like(y, given)
    if hidden is not None:
        bias = jnp.zeros((), y.dtype) if params.bias is None else expand(params.bias, x.ndim, axes)
        y = jnp.where(hidden, bias.astype(y.dtype), y)
    used, unit = moments
    return y, used, unit


def _split(x: jax.Array, parts: int, axis: int) -> jax.Array:
    """Reshape an axis to (parts, size)."""
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
