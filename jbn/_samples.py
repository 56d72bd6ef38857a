"""Moments of the samples at hand, in as few passes over memory as the platform allows."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbn._dtypes import arithmetic_dtype, real_dtype, widen
from jbn._merging import Merged, Part, Reduction, Samples, merge_parts, merge_shifted
from jbn._weights import abs_squared, power_of_two, share_of, weigh, where_counted, where_finite
from jbn._xla import Target, decided_at_lowering, prevent_cse, sum_together


def measure_samples(
    x: jax.Array,
    weights: jax.Array | None,
    reduced: tuple[int, ...],
    *,
    shift: jax.Array | None = None,
    exact: bool = True,
    epsilon: float = 0.0,
) -> Part:
    """Measure the moments over the axes `reduced`, in the shape of the other axes.

    Real weights and their sum may be of any size, so that the count is in a unit (`Part.unit`). Every
    `shift`, in the shape of the result, gives the same moments; one near the mean saves a pass. `exact` and
    `epsilon` are the arguments of `jbn.batch_norm`.
    """
    weights, shift = jax.lax.stop_gradient((weights, shift))
    given, unit = [], None
    if weights is None:
        count = _size(x, reduced)
    else:
        count = _total(weights, x, reduced)
        if weights.dtype != bool:
            unit = _unit(count)
            weights = weights * jnp.expand_dims(1 / unit, reduced)
            count = _total(weights, x, reduced)
        given = [weights, count]
    if shift is not None:
        is_complex = jnp.iscomplexobj(x)
        given.append((shift if is_complex else jnp.real(shift)).astype(arithmetic_dtype(x)))
    options = Options(weights is not None, reduced, exact, epsilon)
    mean, mean_low, var = _measure(options, x, *given)
    zero = jnp.zeros_like(var)
    return Part(mean, mean_low, var, zero + count, None if unit is None else zero + unit)


def single_samples(x: jax.Array, weights: jax.Array | None) -> Part:
    """Return each sample as a set of its own, in the shape of `x`."""
    mean = widen(where_counted(x, weights))
    zero, count, unit = jnp.zeros_like(jnp.real(mean)), jnp.ones_like(jnp.real(mean)), None
    if weights is not None:
        count = jnp.broadcast_to(weights, x.shape).astype(count.dtype)
        if weights.dtype != bool:
            unit = _unit(count)
            count = count / unit
    return Part(mean, jnp.zeros_like(mean), zero, count, unit)


class Options(NamedTuple):
    """What is known while tracing."""

    weighted: bool  # whether weights and their sum are given
    reduced: tuple[int, ...]  # axes of x
    exact: bool
    epsilon: float
    members: bool = False  # whether one of the other axes is that of a `vmap`


def measure_on(target: Target | None, options: Options, x: jax.Array, *given: jax.Array) -> Merged:
    """Measure mean and variance by the algorithm that is fastest on a target.

    | the first case that holds | without weights | with weights |
    |---|---|---|
    | TPU, not `exact` | about 0 and about the running mean: the nearer to the mean | the same |
    | sharded by the compiler | about the running mean; if inexact, two passes | the same |
    | CPU, real samples | about 0; if inexact, about the mean just found | about 0; if inexact, two passes |
    | any other | about a pilot mean | two passes |

    CPUs add up fastest about 0. A pilot mean is that of a few samples; of a sharded array the compiler would
    send them to all devices. TPUs fuse sums into the matrix product that makes `x` if their shift is known
    before `x` is.

    Args:
      given: weights and their sum, if `options.weighted`; then the shift, 0 by default.
    """
    weighted, reduced, exact, epsilon, members = options
    weights = given[0] if weighted else None
    count = given[1] if weighted else _size(x, reduced)
    zero = jnp.zeros((1,) * (x.ndim - len(reduced)), arithmetic_dtype(x))
    shift = given[-1] if len(given) > 2 * weighted else zero
    platform, sharded = target or Target("cpu", False)
    reduction = _reduction_on(platform, sharded, x, reduced)
    shifted = lambda shift, x: _shifted(shift, Samples(x, weights), count, reduction)
    about_zero = lambda x: _about_zero(Samples(x, weights), count, reduction)
    two_passes = lambda: _two_passes(Samples(x, weights), count, reduction)

    if target is None:
        return shifted(shift, x)
    if platform == "tpu" and not exact:
        counted = where_counted(x, weights)
        about_0, about_shift = about_zero(counted), shifted(shift, counted)
        nearer = abs_squared(about_shift.mean_low) <= abs_squared(about_0.mean_low)
        return jax.tree.map(partial(jnp.where, nearer), about_shift, about_0)
    if sharded and not members:
        one_pass = shifted(shift, x)
        return jax.lax.cond(_is_exact(one_pass, epsilon), lambda: one_pass, two_passes)
    if platform == "cpu" and not sharded and not jnp.iscomplexobj(x):
        one_pass = about_zero(x)
        again = two_passes if weighted else lambda: shifted(where_finite(one_pass.mean_low), x)
        return jax.lax.cond(_is_exact(one_pass, epsilon), lambda: one_pass, again)
    if weighted or x.size == 0:
        return two_passes()
    return shifted(_pilot(x, reduced), x)


def _reduction_on(platform: str | None, sharded: bool, x: jax.Array, reduced: tuple[int, ...]) -> Reduction:
    on_gpu = platform in ("cuda", "rocm")
    reduction = Reduction(
        lambda *arrays: [jnp.sum(array, reduced) for array in arrays],
        partial(jnp.expand_dims, axis=reduced),
        # XLA for GPUs writes x - shift to memory before it adds up; divided too, it would write two arrays.
        divide_first=not on_gpu,
        # Saves an operation for each real sample; the mean of samples that span the dtype's range may be NaN.
        scale=0.5 if jnp.iscomplexobj(x) else 1,
    )
    if platform == "cpu":
        reduction = reduction._replace(prevent_cse=prevent_cse)
    if on_gpu and not sharded:
        reduction = reduction._replace(sums=partial(sum_together, axes=reduced))
    return reduction


def _about_zero(samples: Samples, count: jax.Array | int, reduction: Reduction) -> Merged:
    """Average x and |x|^2, in one pass: var = mean(|x|^2) - |mean(x)|^2."""
    copies = reduction.prevent_cse(samples)
    x, weights = copies.mean, copies.count
    twice = reduction.prevent_cse(reduction.prevent_cse(samples))
    mean, square = reduction.sums(
        weigh(widen(x), weights), weigh(abs_squared(widen(twice.mean)), twice.count)
    )
    mean, square = mean * share_of(count, mean), square * share_of(count, square)
    return Merged(jnp.zeros_like(mean), mean, jnp.maximum(square - abs_squared(mean), 0))


def _shifted(shift: jax.Array, samples: Samples, count: jax.Array | int, reduction: Reduction) -> Merged:
    """Average x - shift and |x - shift|^2, in one pass."""
    return _of_one_shape(merge_shifted(shift, samples, count, reduction))


def _two_passes(samples: Samples, count: jax.Array | int, reduction: Reduction) -> Merged:
    """Average x, and then x - mean and |x - mean|^2, in two passes. Uncounted samples may hold anything."""
    counted = samples._replace(mean=where_counted(samples.mean, samples.count))
    return _of_one_shape(merge_parts(counted, count, reduction))


def _of_one_shape(merged: Merged) -> Merged:
    mean, mean_low, var = merged
    if jax.typeof(mean) != jax.typeof(mean_low):
        mean = jnp.zeros_like(mean_low) + mean
    return Merged(mean, mean_low, var)


def _is_exact(merged: Merged, epsilon: float) -> jax.Array:
    """Return whether all variances are as good as those of two passes: see `merge_shifted`.

    That is, whether their relative rounding error is at most 10 times larger, or small compared to epsilon.
    Squares whose sum overflows may be small about the mean. NaN that a weight of 0 was to hide fails, too.
    """
    _, mean_low, var = merged
    return jnp.all((abs_squared(mean_low) <= 9 * (var + epsilon)) & (var < jnp.inf))


def _pilot(x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Average 64 samples from the middle of the axes, or all if there are fewer.

    The mean of any fraction f of the samples is within sqrt((1 - f) / f) standard deviations of the mean of
    all. So the rounding error of the variance is at most 1 / f times that of two passes, and about the same
    as that of two passes if the samples are in random order.
    """
    starts, limits = [0] * x.ndim, list(x.shape)
    needed, taken = 64, 1
    # From the shortest axis to the longest, which makes up for the shorter ones. Sizes may be symbolic, in
    # `jax.export`.
    sizes = {axis: x.shape[axis] if isinstance(x.shape[axis], int) else 1 for axis in reduced}
    for left, axis in zip(range(len(sizes), 0, -1), sorted(sizes, key=lambda axis: sizes[axis])):
        some = min(sizes[axis], max(round((needed / taken) ** (1 / left)), 1))
        starts[axis] = (sizes[axis] - some) // 2
        limits[axis] = starts[axis] + some
        taken *= some
    return jnp.sum(widen(jax.lax.slice(x, starts, limits)) * (1 / taken), reduced)


def _derivative(
    options: Options, arrays: Sequence[jax.Array], dx: jax.Array, results: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Differentiate with respect to x, in closed form, however the moments were measured.

    dmean = sum(weights * dx) / count;  dvar = 2 sum(weights * Re(conj(x - mean) * dx)) / count
    """
    weighted, reduced, *_ = options
    x, weights = arrays[0], arrays[1] if weighted else None
    count = arrays[2] if weighted else _size(x, reduced)
    mean, mean_low, _ = results
    x, dx = (widen(where_counted(values, weights)) for values in (x, dx))

    def average(samples):
        return jnp.sum(weigh(samples, weights), reduced) * share_of(count, samples)

    c = x - jnp.expand_dims(mean + mean_low, reduced)
    return jnp.zeros_like(mean), average(dx), 2 * average(jnp.real(jnp.conj(c) * dx))


def _batch(
    measure: Callable[..., tuple[jax.Array, ...]],
    options: Options,
    arrays: Sequence[jax.Array],
    axes: Sequence[int | None],
) -> tuple[tuple[jax.Array, ...], list[int | None]]:
    """Turn the members of a `vmap` into one more axis that is kept, so that one branch serves all of them."""
    samples = 1 + 2 * options.weighted
    if all(axis is None for axis in axes[:samples]):
        # The members differ in their shift only, which does not change the moments.
        shift = [
            shift if axis is None else jax.lax.index_in_dim(shift, 0, axis, keepdims=False)
            for shift, axis in zip(arrays[samples:], axes[samples:])
        ]
        return measure(options, *arrays[:samples], *shift), [None] * 3
    arrays = [
        jnp.expand_dims(array, 0) if axis is None else jnp.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes)
    ]
    reduced = tuple(axis + 1 for axis in options.reduced)
    return measure(options._replace(reduced=reduced, members=True), *arrays), [0] * 3


_measure = decided_at_lowering(measure_on, derivative=_derivative, batch=_batch)


def _unit(count: jax.Array) -> jax.Array:
    """Return the unit of weights: 1 if their sum is of a usual size, else a power of two near it."""
    usual = (count == 0) | (count > 2.0**-60) & (count < 2.0**60)
    return jnp.where(usual, 1, power_of_two(count))


def _size(x: jax.Array, reduced: tuple[int, ...]) -> jax.Array | int:
    """Count the samples; an array if the size is symbolic, in `jax.export`."""
    size = math.prod(x.shape[axis] for axis in reduced)
    if isinstance(size, int):
        return size
    return jnp.full((1,) * (x.ndim - len(reduced)), size, real_dtype(arithmetic_dtype(x)))


def _total(weights: jax.Array, x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Add up the weights over some axes of `x`; feature axes that share a weight keep size 1."""
    dtype = real_dtype(arithmetic_dtype(x))
    # A weight that is shared along an axis is summed once and multiplied: exact for more samples than float32
    # can count one by one.
    size = math.prod(x.shape[axis] for axis in reduced if weights.shape[axis] == 1)
    count = jnp.sum(weights, reduced, dtype=dtype)
    return count if isinstance(size, int) and size == 1 else count * jnp.asarray(size, dtype)
