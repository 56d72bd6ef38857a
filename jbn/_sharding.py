"""Shardings that are part of an array's type: those of an explicit mesh, and what varies in a `shard_map`."""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec, reshard


def shard_like(values: jax.Array, template: jax.Array) -> jax.Array:
    """Give values the sharding of an array of their shape, where a mesh makes it part of the type."""
    ours, theirs = jax.typeof(values).sharding, jax.typeof(template).sharding
    if ours.spec == theirs.spec:
        return values
    return reshard(values, NamedSharding(ours.mesh if theirs.mesh.empty else theirs.mesh, theirs.spec))


def shard_axis_like(values: jax.Array, template: jax.Array, axis: int) -> jax.Array:
    """Give one axis of some values the explicit sharding that it has in another array."""
    ours, theirs = jax.typeof(values).sharding, jax.typeof(template).sharding
    if ours.spec[axis] == theirs.spec[axis]:
        return values
    spec = PartitionSpec(*(theirs.spec[a] if a == axis else names for a, names in enumerate(ours.spec)))
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
