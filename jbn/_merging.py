"""The one formula: how sets of samples merge, be they samples, parts of a batch, or what devices hold."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbn._collectives import NamedAxes, axis_size, gather, group_max, group_sum, split_devices
from jbn._dtypes import widen
from jbn._weights import abs_squared, ratio, share_of, weigh, where_counted, where_finite

# Features times devices. A row of 16 bytes a feature for each device takes 32 bytes on the wire, at 100 GB/s;
# above this limit that takes longer than two more collectives of 20 microseconds.
MOST_IN_ROWS = 125_000


class Part(NamedTuple):
    """A set of samples by its moments; all but the first broadcast to `mean`."""

    mean: jax.Array  # (..., features...), the mean rounded to one number
    mean_low: jax.Array  # low-order part of the mean: mean + mean_low is kept unevaluated
    var: jax.Array  # real
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]; real: the total weight, in units
    unit: jax.Array | None = None  # a power of two, in the shape of count; None for 1


class Samples(NamedTuple):
    """Samples, which are parts of variance 0 each, whose mean is exact."""

    mean: jax.Array  # the samples, in their own dtype
    count: jax.Array | None  # pyright: ignore[reportIncompatibleMethodOverride]; weights; None for 1 each
    mean_low: None = None
    var: None = None


class Merged(NamedTuple):
    """Mean and variance of several parts together, in the shape of `Reduction.sums`."""

    mean: jax.Array
    mean_low: jax.Array
    var: jax.Array


class Reduction(NamedTuple):
    """How to add up parts, and what to do for the compiler meanwhile."""

    sums: Callable[..., Sequence[jax.Array]]  # adds up each argument: over axes, rows, or members of a `vmap`
    expand: Callable[[jax.Array], jax.Array] = lambda total: total  # broadcasts a sum to the parts
    prevent_cse: Callable[[Any], Any] = lambda values: values  # hides that two operands are equal
    divide_first: bool = True  # divide, then add up, so that no average of finite numbers overflows
    scale: float = 0.5  # of deviations that are added up: the difference of finite numbers may overflow


def merge_parts(parts: Part | Samples, count: jax.Array | int, reduction: Reduction) -> Merged:
    """Merge parts whose weights add up to `count`: first their mean, then the moments about it.

    What has count 0 must be finite.
    """
    twice = reduction.prevent_cse(reduction.prevent_cse(parts))
    mean = widen(twice.mean) if twice.mean_low is None else twice.mean + twice.mean_low
    mean = weigh(mean, twice.count)
    (mean,) = reduction.sums(mean * _expand(share_of(count, mean), reduction))
    return merge_shifted(mean, parts, count, reduction)


def merge_shifted(
    shift: jax.Array, parts: Part | Samples, count: jax.Array | int, reduction: Reduction
) -> Merged:
    """Merge parts by the shifted algorithm: the nearer the shift is to the mean, the less is rounded away.

        mean_low = sum(count_i * (mean_i - shift)) / count;  mean = shift + mean_low
        var      = sum(count_i * (var_i + |mean_i - shift|^2)) / count - |mean_low|^2

    The relative rounding error of the variance is that of a two-pass algorithm times 1 + |mean_low|^2 / var.

    Reference: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
    """
    # No gradient, because any shift gives the same mean and variance.
    shift = jax.lax.stop_gradient(shift)
    mean_low = weigh(_deviation(parts, reduction.expand(shift), reduction.scale), parts.count)
    share = share_of(count, mean_low)
    copies, expanded_shift = reduction.prevent_cse((parts, reduction.expand(shift)))
    deviation = _deviation(copies, expanded_shift, 1)
    # Weighed before it is squared, because a square that overflows is NaN where the weight is 0.
    squares = jnp.real(jnp.conj(deviation) * weigh(deviation, copies.count))
    if parts.var is not None:
        squares = squares + weigh(parts.var, parts.count)
    if reduction.divide_first:
        mean_low = mean_low * _expand(share, reduction)
    mean_low, square = reduction.sums(mean_low, squares)
    if not reduction.divide_first:
        mean_low = mean_low * share
    if reduction.scale != 1:
        mean_low = mean_low / reduction.scale
    # Where even this overflows, the variance is infinite and not NaN. Where it is rounded below 0, it becomes
    # 0 and keeps its derivative.
    var = square * share_of(count, square) - where_finite(abs_squared(mean_low))
    return Merged(shift, mean_low, var - jax.lax.stop_gradient(jnp.minimum(var, 0)))


def merge_rows(parts: Part) -> Part:
    """Merge the parts that are stacked along a first axis."""
    add_up, largest = (partial(f, axis=0, keepdims=True) for f in (jnp.sum, jnp.max))
    return jax.tree.map(lambda leaf: leaf[0], _merge(parts, add_up, largest))


def merge_named(part: Part, over: NamedAxes) -> Part:
    """Merge the parts of all members of a group, over devices in one collective or a few cheaper ones."""
    if not over.names:
        return part
    vectorized, devices = split_devices(over)
    if vectorized.names:
        part = _merge(part, partial(group_sum, over=vectorized), partial(group_max, over=vectorized))
    if devices.names and axis_size(devices.names) * part.mean.size > MOST_IN_ROWS:
        part = _merge(part, partial(group_sum, over=devices), partial(group_max, over=devices))
    elif devices.names:
        leaves = [leaf.astype(part.mean.dtype) for leaf in part if leaf is not None]
        rows, in_group = gather(jnp.stack(leaves), devices)
        mean, mean_low, *real = jnp.moveaxis(rows, 1, 0)
        var, count, *unit = (jnp.real(row) for row in real)
        count, *unit = (jnp.where(in_group[:, 0], row, 0) for row in (count, *unit))
        part = merge_rows(Part(mean, mean_low, var, count, *unit))
    return part


def _merge(
    parts: Part, add_up: Callable[[jax.Array], jax.Array], largest: Callable[[jax.Array], jax.Array]
) -> Part:
    unit = parts.unit
    if unit is not None:
        # The largest of the parts that have samples: weights of the others are 0 in any unit.
        common = largest(jnp.where(parts.count > 0, unit, jnp.finfo(unit.dtype).tiny))
        parts, unit = parts._replace(count=parts.count * (unit / common)), common
    count = add_up(parts.count)
    # A part that holds all samples is returned as it is: XLA multiplies by 1 / count, a product that may be
    # just off 1.
    share = jnp.where((parts.count == count) & (count > 0), 1, ratio(parts.count, count))
    # Where the count is 0, mean and variance may hold anything.
    mean, mean_low, var = (where_counted(leaf, share) for leaf in (parts.mean, parts.mean_low, parts.var))
    reduction = Reduction(lambda *values: [add_up(value) for value in values])
    merged = merge_parts(Part(mean, mean_low, var, share), jnp.ones_like(count), reduction)
    return Part(*merged, count, unit)


def _deviation(parts: Part | Samples, shift: jax.Array, scale: float) -> jax.Array:
    """Return `scale * (mean - shift)`, where scaling comes first: the difference may overflow."""
    mean, mean_low = widen(parts.mean), parts.mean_low
    if scale != 1:
        mean, shift = mean * scale, shift * scale
        mean_low = None if mean_low is None else mean_low * scale
    return mean - shift if mean_low is None else mean - shift + mean_low


def _expand(share: jax.Array | float, reduction: Reduction) -> jax.Array | float:
    return reduction.expand(share) if isinstance(share, jax.Array) else share
