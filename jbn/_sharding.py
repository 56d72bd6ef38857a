"""Shardings that are part of an array's type: those of an explicit mesh, and what varies in a `shard_map`."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, reshard


def shard_like(values: jax.Array, template: jax.Array) -> jax.Array:
    """Give values the sharding of an array of their shape, where a mesh makes it part of the type."""
    ours, theirs = jax.typeof(values).sharding, jax.typeof(template).sharding
    if ours.spec == theirs.spec:
        return values
    return reshard(values, NamedSharding(ours.mesh if theirs.mesh.empty else theirs.mesh, theirs.spec))


def shard_axis_like(values: jax.Array, template: jax.Array, axis: int, *, of_values: int = -1) -> jax.Array:
    """Give one axis of some values the explicit sharding of an axis of another, by default the same."""
    ours, theirs = jax.typeof(values).sharding, jax.typeof(template).sharding
    own = axis if of_values < 0 else of_values
    if ours.spec[own] == theirs.spec[axis]:
        return values
    spec = PartitionSpec(*(theirs.spec[axis] if a == own else names for a, names in enumerate(ours.spec)))
    return reshard(values, NamedSharding(ours.mesh if theirs.mesh.empty else theirs.mesh, spec))


def replicate_unless_divisible(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """Replicate an explicitly sharded axis, unless each device holds the same number of whole parts of it."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis]
    if names is None:
        return x
    devices = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    if x.shape[axis] % parts == 0 and parts % devices == 0:
        return x
    spec = PartitionSpec(*(None if a == axis else names for a, names in enumerate(sharding.spec)))
    return reshard(x, NamedSharding(sharding.mesh, spec))


def vary_like(values: Sequence[jax.Array], x: jax.Array) -> Sequence[jax.Array]:
    """Mark values that are the same on all devices of a `shard_map` as varying like `x`.

    JAX inserts this conversion by itself, once for each use of each value, and transposes it to a collective.
    Stacked and converted here, the values share one; and converted before they are broadcast to the shape of
    `x`, their gradients are summed over the samples first, and only then over the devices.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return values
    stacked = jnp.stack(values)
    return list(stacked + jnp.zeros_like(x, shape=(), dtype=stacked.dtype))
