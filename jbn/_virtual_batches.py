"""Virtual batches, also called ghost batches: parts of a batch that are normalized separately."""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jbn._axes import batch_axis, other_axes
from jbn._normalization import Context
from jbn._params import Params
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


def map_parts(
    f: Callable[..., tuple],
    parts: int,
    axes: tuple[int, ...],
    x: jax.Array,
    params: Params,
    context: Context,
) -> tuple[jax.Array, Moments, jax.Array | None]:
    """Map `f(x, params, context)` over consecutive parts of the batch.

    The sizes of the parts differ by one at most, as in `numpy.array_split`. Parts of one size are computed
    together: the batch is reshaped to (parts, size), so that a batch that is sharded into whole parts is not
    moved between devices.

    Returns:
      `y` in the shape of `x`, and the other results of `f` for each part, along a new first axis.
    """
    axis, weights, domain = batch_axis(x.ndim, axes), context.weights, context.domain
    if weights is not None and jax.config.jax_debug_nans:  # pyright: ignore[reportAttributeAccessIssue]
        # It checks every array, including the parts of x. Infinity is hidden as well as NaN.
        x = jnp.where(jnp.isnan(x) & ~weights.astype(bool), jnp.inf, x)
    if domain is not None and domain.ndim == 1:
        domain = jnp.expand_dims(domain, [a for a in range(x.ndim) if a != axis])
    given = x
    x = replicate_unless_divisible(given, axis, parts)
    # Weights and domains that differ from example to example are split as x is.
    rows = {name: leaf for name, leaf in (("weights", weights), ("domain", domain)) if leaf is not None}
    rows = {name: leaf for name, leaf in rows.items() if leaf.ndim == x.ndim and leaf.shape[axis] != 1}
    rows = {name: shard_axis_like(leaf, x, axis) for name, leaf in rows.items()}
    # Under explicit sharding, repeated parameters would have to be sharded like the parts.
    params_axis = None if jax.typeof(x).sharding.spec[axis] else 0

    def of_part(x, params, rows):
        rows = dict(weights=weights, domain=domain) | rows
        if rows["domain"] is not None and rows["domain"].ndim:
            rows["domain"] = rows["domain"].reshape(-1)
        return f(x, params, context._replace(**rows))

    f_of_parts = jax.vmap(of_part, (axis, params_axis, axis), (axis, 0, 0))

    def of_one_size(parts, x, rows):
        rows = {name: _split(leaf, parts, axis) for name, leaf in rows.items()}
        of_parts = params
        if params_axis == 0:
            of_parts = jax.tree.map(lambda leaf: for_each_part(leaf, parts), params)
        y, *moments = f_of_parts(_split(x, parts, axis), of_parts, rows)
        return y.reshape(x.shape), moments

    longer = x.shape[axis] % parts
    if not longer:
        y, moments = of_one_size(parts, x, rows)
    else:
        cut = longer * (x.shape[axis] // parts + 1)
        end = x.shape[axis]
        cut_out = lambda start, stop: jax.tree.map(
            lambda leaf: jax.lax.slice_in_dim(leaf, start, stop, axis=axis), (x, rows)
        )
        first = of_one_size(longer, *cut_out(0, cut))
        second = of_one_size(parts - longer, *cut_out(cut, end))
        y = jnp.concatenate([first[0], second[0]], axis)
        moments = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first[1], second[1])
    used, unit = moments
    return shard_like(y, given), used, unit


def _split(x: jax.Array, parts: int, axis: int) -> jax.Array:
    """Reshape an axis to (parts, size)."""
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
