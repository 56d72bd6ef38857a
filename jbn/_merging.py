"""The one formula: how sets of samples merge, be they samples, parts of a batch, or what devices hold."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbn._collectives import NamedAxes, axis_size, gather, largest, split_devices, total
from jbn._dtypes import widen

# Features times devices. A row of 16 bytes a feature for each device takes 32 bytes on the wire, at 100 GB/s;
# from here on that is more than two more collectives of 20 microseconds.
MOST_IN_ROWS = 125_000


class Part(NamedTuple):
    """A set of samples by its moments. Its mean is `mean + rest`, a sum that is not rounded to one number."""

    mean: jax.Array  # (..., features...), the mean up to rounding; of a sample, x in its own dtype
    rest: jax.Array | None  # broadcasts to mean; what rounding took from it; None for 0
    var: jax.Array | None  # broadcasts to mean; real; None for 0, that of a sample
    count: jax.Array | None  # broadcasts to mean; real or Boolean; None counts every part as 1
    unit: jax.Array | None = None  # in the count's shape; the total weight is count * unit; None is 1


class Way(NamedTuple):
    """How to add up parts, and what their compiler is told."""

    sums: Callable[..., Sequence[jax.Array]]  # adds up each argument: over axes, rows, or members of a `vmap`
    expand: Callable[[jax.Array], jax.Array] = lambda total: total  # makes a sum broadcast to the parts
    copy: Callable = lambda values: values  # hides from the compiler that they are the same
    divide_first: bool = True  # before adding up, so that no average of finite numbers overflows
    scale: float = 0.5  # of what the mean adds up, for the difference of two finite numbers may overflow


def merge_parts(parts: Part, count: jax.Array | int, way: Way) -> Part:
    """Merges parts that have means, variances and counts, whatever a part is: a sample has variance 0.

    What has count 0 must be finite.
    """
    mean, rest, _, weights, _ = way.copy(way.copy(parts))
    rough = weigh(widen(mean) if rest is None else mean + rest, weights)
    (rough,) = way.sums(rough * _expanded(share_of(count, rough), way))
    return merge_about(rough, parts, count, way)


def merge_about(shift: jax.Array, parts: Part, count: jax.Array | int, way: Way) -> Part:
    """The one formula, about any shift; the nearer that is to the mean, the less is rounded away.

        mean = shift + rest;  rest = sum(count_i * (mean_i - shift)) / count
        var  = sum(count_i * (var_i + |mean_i - shift|^2)) / count - |rest|^2

    To the variance, rounding counts 1 + |rest|^2 / var times.
    """
    # No gradient, for any shift gives the same mean and variance.
    shift = jax.lax.stop_gradient(shift)
    rest = weigh(_apart(parts, way.expand(shift), way.scale), parts.count)
    share = share_of(count, rest)
    copied, about = way.copy((parts, way.expand(shift)))
    apart = _apart(copied, about, 1)
    # Weighed before it is squared, for a square that overflows is NaN where the weight is 0.
    squares = jnp.real(jnp.conj(apart) * weigh(apart, copied.count))
    if parts.var is not None:
        squares = squares + weigh(parts.var, parts.count)
    rest, square = way.sums(rest * _expanded(share, way) if way.divide_first else rest, squares)
    rest = rest if way.divide_first else rest * share
    rest = rest if way.scale == 1 else rest / way.scale
    # Where even this overflows, the variance is infinite and not NaN; where it is rounded below 0, it is 0,
    # with the derivative that it has.
    var = square * share_of(count, square) - where_finite(abs_squared(rest))
    return Part(shift, rest, var - jax.lax.stop_gradient(jnp.minimum(var, 0)), count)


def merge_rows(parts: Part) -> Part:
    """Merges the parts that are stacked along a first axis."""
    add, most = (partial(f, axis=0, keepdims=True) for f in (jnp.sum, jnp.max))
    return jax.tree.map(lambda leaf: leaf[0], _merge_by(add, most, parts))


def merge_named(part: Part, over: NamedAxes) -> Part:
    """Merges the parts of all members of one's group, in one collective of devices or in cheaper ones."""
    if not over.names:
        return part
    vectorized, devices = split_devices(over)
    if vectorized.names:
        part = _merge_by(partial(total, over=vectorized), partial(largest, over=vectorized), part)
    if devices.names and axis_size(devices.names) * part.mean.size > MOST_IN_ROWS:
        part = _merge_by(partial(total, over=devices), partial(largest, over=devices), part)
    elif devices.names:
        leaves = [leaf.astype(part.mean.dtype) for leaf in part if leaf is not None]
        rows, in_group = gather(jnp.stack(leaves), devices)
        mean, rest, *real = jnp.moveaxis(rows, 1, 0)
        var, count, *unit = (jnp.real(row) for row in real)
        count, *unit = (jnp.where(in_group[:, 0], row, 0) for row in (count, *unit))
        part = merge_rows(Part(mean, rest, var, count, *unit))
    return part


def _merge_by(total, largest, parts):
    unit = parts.unit
    if unit is not None:
        # That of members that count something: the weights of the others are 0 in any unit.
        unit = largest(jnp.where(parts.count > 0, unit, jnp.finfo(unit.dtype).tiny))
        parts = parts._replace(count=parts.count * (parts.unit / unit))
    count = total(parts.count)
    # A part that is all there is comes out as it is; XLA multiplies by 1 / count, and that may be just off 1.
    share = jnp.where((parts.count == count) & (count > 0), 1, ratio(parts.count, count))
    # What counts nothing may hold anything.
    mean, rest, var = (where_counted(leaf, share) for leaf in (parts.mean, parts.rest, parts.var))
    way = Way(lambda *values: [total(value) for value in values])
    whole = merge_parts(Part(mean, rest, var, share), jnp.ones_like(count), way)
    return whole._replace(count=count, unit=unit)


def power_of_two(count: jax.Array) -> jax.Array:
    """Returns a power of two near a total weight, by which weights can be divided and added up.

    That of 0 is among the smallest numbers, that of an infinite total among the largest.
    """
    finfo = jnp.finfo(count.dtype)
    most = 2.0 ** (finfo.maxexp - 2)
    return jax.lax.reduce_precision(jnp.clip(count, 1 / most, most), finfo.nexp, 0)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides by a total weight; nothing over nothing is 0 and has a finite derivative."""
    return numerator / jnp.where(denominator > 0, denominator, 1).astype(numerator.dtype)


def share_of(count: jax.Array | int, values: jax.Array) -> jax.Array | float:
    """Returns what each of `count` counts, to multiply values by."""
    if isinstance(count, int):
        return 1 / max(count, 1)
    return ratio(jnp.ones_like(count), count).astype(values.dtype)


def abs_squared(x: jax.Array) -> jax.Array:
    """Computes |x|^2, which is real for complex `x` too."""
    return jnp.real(x * jnp.conj(x))


def where_finite(x: jax.Array) -> jax.Array:
    """Puts 0 where `x` is not finite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def where_counted(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Puts 0 where the weight is 0, so that no NaN held there reaches a value or a derivative."""
    return values if weights is None else jnp.where(weights.astype(bool), values, 0)


def weigh(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Multiplies by the weights, if there are any."""
    return values if weights is None else values * weights.astype(values.dtype)


def _apart(parts, shift, scale):
    mean, shift, rest = (
        leaf if leaf is None or scale == 1 else leaf * scale
        for leaf in (widen(parts.mean), shift, parts.rest)
    )
    return mean - shift if rest is None else mean - shift + rest


def _expanded(share, way):
    return share if isinstance(share, float) else way.expand(share)
