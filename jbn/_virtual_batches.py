"""Virtual batches, also called ghost batches: parts of a batch that are normalized each on its own."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, reshard

from jbn._axes import expand, other_axes, shard_like
from jbn._xla import for_each_part


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
            f"virtual_batch_size={size} needs a batch axis to split, but x of shape {x.shape} has feature "
            f"axes {axes} only; outside of jax.vmap it would have one."
        )
    return max(-(-x.shape[batch_axis(x.ndim, axes)] // size), 1)


def batch_axis(ndim: int, axes: tuple[int, ...]) -> int:
    """Returns the axis that counts examples: the first that is not a feature axis."""
    return other_axes(ndim, axes)[0]


def map_parts(f: Callable[..., Any], parts: int, axes: tuple[int, ...]) -> Callable[..., Any]:
    """Applies `f(x, params, running, weights, train)` to consecutive parts of the batch.

    The sizes of the parts differ by one at most, as in `numpy.array_split`. Those of one size are computed at
    once: the batch is reshaped to (parts, size). So a batch that is sharded into as many parts stays where it
    is.

    Returns:
      A function that returns `y` in the shape of `x`, and of the parts all else that `f` returns, along a new
      first axis.
    """

    def mapped(x, params, running, weights, train):
        hidden = None
        if weights is not None and jax.config.jax_debug_nans:
            # It looks at every array, parts of x included; so what a mask hides is replaced first.
            hidden = ~(weights.astype(bool) | jnp.isfinite(x))
            x = jnp.where(hidden, 0, x)
        axis, given = batch_axis(x.ndim, axes), x
        x = _whole_parts_per_device(given, parts, axis)
        shared = weights is None or weights.shape[axis] == 1
        if not shared:
            weights = _shard_examples_like(weights, x, axis)
        # The type of what is repeated would have to be sharded like the parts.
        repeated = None if jax.typeof(x).sharding.spec[axis] else 0
        f_of_parts = jax.vmap(f, (axis, repeated, None, None if shared else axis, None), (axis, 0, 0))

        def of_one_size(parts, x, weights):
            weights = weights if shared else _split(weights, parts, axis)
            of_parts = params
            if repeated == 0:
                of_parts = jax.tree.map(lambda leaf: for_each_part(leaf, parts), params)
            y, *moments = f_of_parts(_split(x, parts, axis), of_parts, running, weights, train)
            return y.reshape(x.shape), moments

        def finished(y):
            y = shard_like(y, given)
            if hidden is None:
                return y
            bias = jnp.zeros((), y.dtype) if params.bias is None else expand(params.bias, x.ndim, axes)
            return jnp.where(hidden, bias.astype(y.dtype), y)

        longer = x.shape[axis] % parts
        if not longer:
            y, moments = of_one_size(parts, x, weights)
            return finished(y), *moments
        cut = [longer * (x.shape[axis] // parts + 1)]
        two_weights = [weights] * 2 if shared else jnp.split(weights, cut, axis)
        y, moments = zip(*map(of_one_size, (longer, parts - longer), jnp.split(x, cut, axis), two_weights))
        moments = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *moments)
        return finished(jnp.concatenate(y, axis)), *moments

    return mapped


def _split(x: jax.Array, parts: int, axis: int) -> jax.Array:
    """Reshapes an axis to (parts, size)."""
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])


def _shard_examples_like(weights: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Gives the weights of the examples the explicit sharding of the examples."""
    ours, theirs = jax.typeof(weights).sharding, jax.typeof(x).sharding
    if ours.spec[axis] == theirs.spec[axis]:
        return weights
    spec = PartitionSpec(*(theirs.spec[a] if a == axis else names for a, names in enumerate(ours.spec)))
    return reshard(weights, NamedSharding(ours.mesh if theirs.mesh.empty else theirs.mesh, spec))


def _whole_parts_per_device(x: jax.Array, parts: int, axis: int) -> jax.Array:
    """Collects an explicitly sharded batch on every device, unless each has as many whole parts."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis]
    if names is None:
        return x
    devices = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    if x.shape[axis] % parts == 0 and parts % devices == 0:
        return x
    spec = PartitionSpec(*(None if a == axis else names for a, names in enumerate(sharding.spec)))
    return reshard(x, NamedSharding(sharding.mesh, spec))
