"""Moments of the samples at hand, in as few passes over memory as the platform allows."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbn._domains import Sets
from jbn._dtypes import arithmetic_dtype, widen
from jbn._merging import Merged, Part, Reduction, Samples, merge_parts, merge_shifted
from jbn._weights import abs_squared, power_of_two, share_of, weigh, where_counted, where_finite
from jbn._xla import Target, decided_at_lowering, members_first, prevent_cse, sum_together


def measure_samples(
    x: jax.Array,
    weights: jax.Array | None,
    reduced: tuple[int, ...],
    *,
    shift: jax.Array | None = None,
    exact: bool = True,
    epsilon: float = 0.0,
    index: jax.Array | None = None,
) -> Part:
    """Measure the moments over the axes `reduced`, in the shape of the other axes.

    Real weights and their sum may be of any size, so that the count is in a unit (`Part.unit`). Every
    `shift`, in the shape of the result, gives the same moments; one near the mean saves a pass. `exact` and
    `epsilon` are the arguments of `jbn.batch_norm`. With `index`, from `as_domain`, moments are those of each
    domain, in the shape of `shift`; what has no samples has count 0.
    """
    weights, shift = jax.lax.stop_gradient((weights, shift))
    domains = None if index is None or shift is None else len(shift)
    options = Options(weights is not None, reduced, exact, epsilon, domains)
    sets = _sets(options, index)
    given, unit = [], None
    if weights is None:
        count = sets.size_of(x)
    else:
        count = sets.total_of(weights, x)
        if weights.dtype != bool:
            unit = _unit(count)
            weights = weights * sets.expand(1 / unit)
            count = sets.total_of(weights, x)
        given = [weights, count]
    if index is not None:
        given.append(index)
    if shift is not None:
        is_complex = jnp.iscomplexobj(x)
        given.append((shift if is_complex else jnp.real(shift)).astype(arithmetic_dtype(x)))
    mean, mean_low, var = _measure(options, x, *given)
    zero = jnp.zeros_like(var)
    return Part(mean, mean_low, var, zero + count, None if unit is None else zero + unit)


class Options(NamedTuple):
    """What is known while tracing."""

    weighted: bool  # whether weights and their sum are given
    reduced: tuple[int, ...]  # axes of x
    exact: bool
    epsilon: float
    domains: int | None = None  # how many; None if there is no index
    members: int = 0  # how many of the other axes, the first ones, are those of a `vmap`


def _sets(options: Options, index: jax.Array | None) -> Sets:
    return Sets(options.reduced, index, options.domains or 1, options.members)


class Given(NamedTuple):
    """What is known beside the samples, in the order of the arguments of `measure_on`."""

    weights: jax.Array | None  # as many axes as x
    # their sums; axes that share weights have size 1
    count: jax.Array | None  # pyright: ignore[reportIncompatibleMethodOverride]
    index: jax.Array | None  # pyright: ignore[reportIncompatibleMethodOverride]; of domains
    shift: jax.Array | None  # in the shape of the result


def _given(options: Options, arrays: Sequence[jax.Array]) -> Given:
    left = list(arrays)
    weights, count = (left.pop(0), left.pop(0)) if options.weighted else (None, None)
    index = None if options.domains is None else left.pop(0)
    return Given(weights, count, index, left.pop(0) if left else None)


def measure_on(target: Target | None, options: Options, x: jax.Array, *given: jax.Array) -> Merged:
    """Measure mean and variance by the algorithm that is fastest on a target.

    | the first case that holds | without weights | with weights |
    |---|---|---|
    | TPU, not `exact` | about 0 and about the running mean: the nearer to the mean | the same |
    | sharded by the compiler | about the running mean; if inexact, two passes | the same |
    | CPU, real samples | about 0; if inexact, about the mean just found | about 0; if inexact, two passes |
    | any other | about a pilot mean; vectors of several domains: two passes | two passes |

    CPUs add up fastest about 0. A pilot mean is that of a few samples; of a sharded array the compiler would
    send them to all devices. TPUs fuse sums into the matrix product that makes `x` if their shift is known
    before `x` is.

    Args:
      given: weights and their sum, if `options.weighted`; then the index, if there are domains; then the
        shift, 0 by default.
    """
    weighted, reduced, exact, epsilon, domains, members = options
    weights, count, index, shift = _given(options, given)
    sets = _sets(options, index)
    count = sets.size_of(x) if count is None else count
    shift = jnp.zeros((1,) * (x.ndim - len(reduced)), arithmetic_dtype(x)) if shift is None else shift
    platform, sharded = target or Target("cpu", False)
    reduction = _reduction_on(platform, sharded, x, options, sets)
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
    # A pilot of vectors, each of a domain, would be all of them.
    if weighted or x.size == 0 or (domains and not sets.within):
        return two_passes()
    return shifted(_pilot(x, reduced) if domains is None else _pilot_of_domains(x, sets), x)


def _reduction_on(
    platform: str | None, sharded: bool, x: jax.Array, options: Options, sets: Sets
) -> Reduction:
    on_gpu = platform in ("cuda", "rocm")
    reduction = Reduction(
        lambda *arrays: [sets.add_up(array) for array in arrays],
        sets.expand,
        # XLA for GPUs writes x - shift to memory before it adds up; divided too, it would write two arrays.
        divide_first=not on_gpu,
        # Saves an operation for each real sample; the mean of samples that span the dtype's range may be NaN.
        scale=0.5 if jnp.iscomplexobj(x) else 1,
    )
    if platform == "cpu":
        reduction = reduction._replace(prevent_cse=prevent_cse)
    if on_gpu and not sharded and options.domains is None:
        reduction = reduction._replace(sums=partial(sum_together, axes=options.reduced))
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
    some, taken = _middle(x, reduced, 64)
    return jnp.sum(widen(some) * (1 / taken), reduced)


def _pilot_of_domains(x: jax.Array, sets: Sets) -> jax.Array:
    """Average 64 samples of each example of a domain, or an eighth of them if those are fewer."""
    sizes = [x.shape[axis] for axis in sets.within if isinstance(x.shape[axis], int)]
    some, taken = _middle(x, sets.within, min(64, max(math.prod(sizes) // 8, 1)))
    some = widen(some) * (1 / taken)
    return sets.add_up(some) * share_of(jnp.asarray(sets.size_of(some)) / taken, some)


def _middle(x: jax.Array, axes: tuple[int, ...], needed: int) -> tuple[jax.Array, int]:
    """Cut out about as many samples as are needed from the middle of the axes, and count them."""
    starts, limits, taken = [0] * x.ndim, list(x.shape), 1
    # From the shortest axis to the longest, which makes up for the shorter ones. Sizes may be symbolic, in
    # `jax.export`.
    sizes = {axis: x.shape[axis] if isinstance(x.shape[axis], int) else 1 for axis in axes}
    for left, axis in zip(range(len(sizes), 0, -1), sorted(sizes, key=lambda axis: sizes[axis])):
        some = min(sizes[axis], max(round((needed / taken) ** (1 / left)), 1))
        starts[axis] = (sizes[axis] - some) // 2
        limits[axis] = starts[axis] + some
        taken *= some
    return jax.lax.slice(x, starts, limits), taken


def _derivative(
    options: Options, arrays: Sequence[jax.Array], dx: jax.Array, results: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Differentiate with respect to x, in closed form, however the moments were measured.

    dmean = sum(weights * dx) / count;  dvar = 2 sum(weights * Re(conj(x - mean) * dx)) / count
    """
    x = arrays[0]
    weights, count, index, _ = _given(options, arrays[1:])
    sets = _sets(options, index)
    count = sets.size_of(x) if count is None else count
    mean, mean_low, _ = results
    x, dx = (widen(where_counted(values, weights)) for values in (x, dx))

    def average(samples):
        return sets.add_up(weigh(samples, weights)) * share_of(count, samples)

    c = x - sets.expand(mean + mean_low)
    return jnp.zeros_like(mean), average(dx), 2 * average(jnp.real(jnp.conj(c) * dx))


def _batch(
    measure: Callable[..., tuple[jax.Array, ...]],
    options: Options,
    arrays: Sequence[jax.Array],
    axes: Sequence[int | None],
) -> tuple[tuple[jax.Array, ...], list[int | None]]:
    """Turn the members of a `vmap` into one more axis that is kept, so that one branch serves all of them."""
    samples = 1 + 2 * options.weighted + (options.domains is not None)
    if all(axis is None for axis in axes[:samples]):
        # The members differ in their shift only, which does not change the moments.
        shift = [
            shift if axis is None else jax.lax.index_in_dim(shift, 0, axis, keepdims=False)
            for shift, axis in zip(arrays[samples:], axes[samples:])
        ]
        return measure(options, *arrays[:samples], *shift), [None] * 3
    if options.domains is not None:
        arrays = members_first(arrays, axes)
    else:
        arrays = [
            jnp.expand_dims(array, 0) if axis is None else jnp.moveaxis(array, axis, 0)
            for array, axis in zip(arrays, axes)
        ]
    reduced = tuple(axis + 1 for axis in options.reduced)
    return measure(options._replace(reduced=reduced, members=options.members + 1), *arrays), [0] * 3


_measure = decided_at_lowering(measure_on, derivative=_derivative, batch=_batch)


def _unit(count: jax.Array) -> jax.Array:
    """Return the unit of weights: 1 if their sum is of a usual size, else a power of two near it."""
    usual = (count == 0) | (count > 2.0**-60) & (count < 2.0**60)
    return jnp.where(usual, 1, power_of_two(count))
