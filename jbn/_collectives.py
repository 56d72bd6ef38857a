"""Named axes: the devices of a `shard_map`, or the members of a `vmap`, that share one batch.

Half of this file serves groups of any sizes, Flax's `axis_index_groups`, which JAX supports neither in `vmap`
nor in a `shard_map` that checks replication.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

AxisName = Hashable | Sequence[Hashable]


class NamedAxes(NamedTuple):
    """Axes over which one batch is spread, and which of their members share statistics."""

    names: tuple[Hashable, ...] = ()  # empty: no reduction over named axes
    groups: tuple[tuple[int, ...], ...] | None = None  # partition of the members' indices; None: all share


def named_axes(axis_name: AxisName | None, axis_index_groups: Sequence[Sequence[int]] | None) -> NamedAxes:
    """Check the two arguments against the axes that are bound here.

    Raises:
      ValueError: a name is not bound or named twice, or the groups are not a partition of the axis.
    """
    if axis_name is None:
        names = ()
    else:
        names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if len(set(names)) < len(names):
        raise ValueError(f"axis_name={axis_name!r} names an axis twice; expected each one once.")
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"axis_name={axis_name!r}: {name!r} is not bound here; expected the name of an axis mapped "
                f"around this call, by jax.shard_map or jax.vmap(..., axis_name={name!r}). Under plain jit, "
                "pass axis_name=None: statistics of a sharded batch are global without a name."
            ) from None
    if axis_index_groups is None:
        return NamedAxes(names)
    if not names:
        raise ValueError(
            f"axis_index_groups={axis_index_groups} needs axis_name, which is None; expected the name of the "
            "axis that the groups partition."
        )
    size = axis_size(names)
    try:
        groups = tuple(tuple(map(operator.index, group)) for group in axis_index_groups)
    except TypeError:
        groups = ()
    if sorted(i for group in groups for i in group) != list(range(size)) or () in groups:
        raise ValueError(
            f"axis_index_groups={axis_index_groups} with axis_name={axis_name!r}; expected each index of the "
            f"named axis, 0 to {size - 1}, in exactly one group, and no empty group, as in [[0, 1], [2, 3]]."
        )
    return NamedAxes(names, groups)


def axis_size(names: tuple[Hashable, ...]) -> int:
    """Return how many members the named axes have together."""
    return int(np.prod([jax.lax.axis_size(name) for name in names], dtype=int))


def smallest_group(over: NamedAxes) -> int:
    """Return how many members the smallest group has."""
    return axis_size(over.names) if over.groups is None else min(map(len, over.groups))


def split_devices(over: NamedAxes) -> tuple[NamedAxes, NamedAxes]:
    """Return the axes that JAX vectorizes over, and those along which values travel between devices.

    Groups over axes of both kinds are returned as the first kind: exact, but one collective for each sum.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    vectorized = tuple(name for name in over.names if name not in manual)
    if vectorized and over.groups:
        return over, NamedAxes()
    devices = tuple(name for name in over.names if name in manual)
    return NamedAxes(vectorized), NamedAxes(devices, over.groups)


def group_sum(values: jax.Array, over: NamedAxes) -> jax.Array:
    """Add up the members of this member's group, in one collective."""
    return _reduce_group(jax.lax.psum, jnp.sum, values, over)


def group_max(values: jax.Array, over: NamedAxes) -> jax.Array:
    """Return the maximum over this member's group, in one collective, for `values` >= 0."""
    return _reduce_group(jax.lax.pmax, jnp.max, jax.lax.stop_gradient(values), over)


def gather(values: jax.Array, over: NamedAxes) -> tuple[jax.Array, jax.Array]:
    """Collect the values of all members, in one collective.

    It is a sum of arrays in which each member fills its own row: `shard_map` knows that a sum is the same on
    all devices, which it would not know of `all_gather`. Four float32 values for each of C features on D
    devices take 16 C D bytes: 32 KB for 256 features on 8 devices. `python -m benchmarks devices` has the
    numbers.

    Returns:
      An array with the values of each member along a new first axis, and whether that member is in this
      member's group, Booleans along the same axis.
    """
    member, size = jax.lax.axis_index(over.names), axis_size(over.names)
    rows = _in_own_row(values, member, size, over.names)
    if over.groups is None:
        return rows, jnp.ones((size,) + (1,) * values.ndim, bool)
    group_of = jnp.asarray(_group_of_member(over.names, over.groups))
    return rows, jnp.expand_dims(group_of == group_of[member], range(1, rows.ndim))


def _reduce_group(
    collective: Callable[..., jax.Array],
    reduce_rows: Callable[[jax.Array, int], jax.Array],
    values: jax.Array,
    over: NamedAxes,
) -> jax.Array:
    """Reduce over this member's group. In the collective each group has a row of its own."""
    if over.groups is None:
        return _call(collective, values, over.names)
    group = jnp.asarray(_group_of_member(over.names, over.groups))[jax.lax.axis_index(over.names)]
    rows = _in_own_row(values, group, len(over.groups), over.names, collective)
    return reduce_rows(jnp.where(_is_row(group, rows), rows, 0), 0)


def spell(names: Sequence[Hashable]) -> str:
    """Return the names of axes as a user would write them."""
    return repr(names[0] if len(names) == 1 else tuple(names))


def _in_own_row(values, row, rows, names, collective=jax.lax.psum):
    empty = jnp.zeros((rows, *values.shape), values.dtype)
    return _call(collective, jnp.where(_is_row(row, empty), values[None], empty), names)


def _call(collective, values, names):
    try:
        return collective(values, names)
    except Exception as error:  # its type depends on the version of JAX
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if manual and not set(names) <= set(manual):
            raise ValueError(
                f"axis_name={spell(names)} names a vmap axis inside a jax.shard_map over {manual} that "
                "checks replication, where JAX cannot add up; pass check_vma=False to that shard_map."
            ) from error
        raise


def _is_row(row, rows):
    return jnp.expand_dims(jnp.arange(rows.shape[0], dtype=row.dtype) == row, range(1, rows.ndim))


def _group_of_member(names: tuple[Hashable, ...], groups: tuple[tuple[int, ...], ...]) -> np.ndarray:
    group_of = np.zeros(axis_size(names), np.int32)
    for index, group in enumerate(groups):
        group_of[list(group)] = index
    return group_of
