"""Moments of the samples at hand, in as few passes over memory as the platform allows."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbn._dtypes import arithmetic_dtype, real_dtype, widen
from jbn._merging import (
    Part,
    Way,
    abs_squared,
    merge_about,
    merge_parts,
    power_of_two,
    share_of,
    weigh,
    where_counted,
    where_finite,
)
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
    """Returns the moments over the axes `reduced`, in the shape of the others.

    What real weights count is in a unit, for they and their sum may be of any size. Any `shift`, in the shape
    of the result, gives the same moments; near the mean it saves a pass. `exact` and `epsilon` are those of
    `jbn.batch_norm`.
    """
    weights, shift = jax.lax.stop_gradient((weights, shift))
    count, unit = _count(weights, x, reduced), None
    if weights is not None and weights.dtype != bool:
        unit = _unit(count)
        weights = weights * jnp.expand_dims(1 / unit, reduced)
        count = _count(weights, x, reduced)
    given = [] if weights is None else [weights, count]
    if shift is not None:
        is_complex = jnp.iscomplexobj(x)
        given.append((shift if is_complex else jnp.real(shift)).astype(arithmetic_dtype(x)))
    options = Options(weights is not None, reduced, exact, epsilon)
    mean, rest, var = _measure(options, x, *given)
    zero = jnp.zeros_like(var)
    return Part(mean, rest, var, zero + count, None if unit is None else zero + unit)


class Options(NamedTuple):
    """What is known while tracing."""

    weighted: bool  # whether weights and their sum are given
    reduced: tuple[int, ...]  # axes of x
    exact: bool
    epsilon: float
    members: bool = False  # whether other axes are of a `vmap`


def _derivative(options, arrays, dx, results):
    """In closed form, whichever way the moments were measured.

    dmean = sum(weights * dx) / count;  dvar = 2 sum(weights * Re(conj(x - mean) * dx)) / count
    """
    weighted, reduced, *_ = options
    x, weights = arrays[0], arrays[1] if weighted else None
    count = arrays[2] if weighted else _count(None, x, reduced)
    mean, rest, _ = results
    x, dx = (widen(where_counted(values, weights)) for values in (x, dx))

    def average(samples):
        return jnp.sum(weigh(samples, weights), reduced) * share_of(count, samples)

    c = x - jnp.expand_dims(mean + rest, reduced)
    return jnp.zeros_like(mean), average(dx), 2 * average(jnp.real(jnp.conj(c) * dx))


def measure_on(
    target: Target | None, options: Options, x: jax.Array, *given: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns mean, rest and variance, measured about the shift that is best on a target.

    | the first that holds | without weights | with weights |
    |---|---|---|
    | TPU, not `exact` | 0 and the running mean; the nearer counts | the same |
    | sharded by the compiler | the running mean; if that was not exact, two passes | the same |
    | CPU | 0; if that was not exact, the mean found | 0; if that was not exact, two passes |
    | GPU, TPU | a pilot | two passes |

    A CPU adds up fastest about 0. A pilot is the mean of few samples; the compiler would send it to all
    devices. A TPU fuses sums into the matrix product that makes `x`, if their shift is known before `x` is.
    """
    weighted, reduced, exact, epsilon, members = options
    weights = given[0] if weighted else None
    count = given[1] if weighted else _count(None, x, reduced)
    zero = jnp.zeros((1,) * (x.ndim - len(reduced)), arithmetic_dtype(x))
    shift = given[-1] if len(given) > 2 * weighted else zero
    platform, sharded = target or Target("cpu", False)
    on_gpu = platform in ("cuda", "rocm")
    way = Way(
        lambda *arrays: [jnp.sum(array, reduced) for array in arrays],
        partial(jnp.expand_dims, axis=reduced),
        # A GPU's compiler writes out x - shift before it adds up; divided too, it would be two such arrays.
        divide_first=not on_gpu,
        # One operation less, where they are many; then the mean of what spans the dtype's range may be NaN.
        scale=0.5 if jnp.iscomplexobj(x) else 1,
    )
    if platform == "cpu":
        way = way._replace(copy=prevent_cse)
    if on_gpu and not sharded:
        way = way._replace(sums=partial(sum_together, axes=reduced))

    def about(shift, x):
        return _of_one_shape(merge_about(shift, Part(x, None, None, weights), count, way))

    def about_zero(x):
        (x1, weights1), (x2, weights2) = way.copy((x, weights)), way.copy(way.copy((x, weights)))
        mean, square = way.sums(weigh(widen(x1), weights1), weigh(abs_squared(widen(x2)), weights2))
        mean, square = mean * share_of(count, mean), square * share_of(count, square)
        return jnp.zeros_like(mean), mean, jnp.maximum(square - abs_squared(mean), 0)

    def in_two_passes():
        return _of_one_shape(merge_parts(Part(where_counted(x, weights), None, None, weights), count, way))

    def is_exact(rest, var):
        # Rounding counts 1 + |rest|^2 / var times, 10 at most, or nothing beside epsilon. Squares that add up
        # beyond the dtype's range may be small about the mean. What a mask hides from the weights, NaN times
        # 0, fails the test.
        return jnp.all((abs_squared(rest) <= 9 * (var + epsilon)) & (var < jnp.inf))

    if target is None:
        return about(shift, x)
    if platform == "tpu" and not exact:
        counted = where_counted(x, weights)
        near_zero, near_shift = about_zero(counted), about(shift, counted)
        nearer = abs_squared(near_shift[1]) <= abs_squared(near_zero[1])
        return jax.tree.map(partial(jnp.where, nearer), near_shift, near_zero)
    if sharded and not members:
        found = about(shift, x)
        return jax.lax.cond(is_exact(*found[1:]), lambda: found, in_two_passes)
    if platform == "cpu" and not sharded and not jnp.iscomplexobj(x):
        zeros, mean, var = about_zero(x)
        again = in_two_passes if weighted else lambda: about(where_finite(mean), x)
        return jax.lax.cond(is_exact(mean, var), lambda: (zeros, mean, var), again)
    if weighted or x.size == 0:
        return in_two_passes()
    return about(_pilot(x, reduced), x)


def _of_one_shape(part):
    mean = (
        part.mean if jax.typeof(part.mean) == jax.typeof(part.rest) else jnp.zeros_like(part.rest) + part.mean
    )
    return mean, part.rest, part.var


def _pilot(x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Averages 64 samples from the middle of the axes, or all of fewer.

    Of a share f of the samples the mean is nearer to that of all than sqrt((1 - f) / f) standard deviations,
    whichever they are: to the variance a sum's rounding counts at most 1 / f times, and hardly more than once
    if the samples are in no order.
    """
    starts, limits = [0] * x.ndim, list(x.shape)
    wanted, taken = 64, 1
    # The shortest axis first, whose part the others take over. A size may be symbolic, in `jax.export`.
    sizes = {axis: x.shape[axis] if isinstance(x.shape[axis], int) else 1 for axis in reduced}
    for left, axis in zip(range(len(sizes), 0, -1), sorted(sizes, key=sizes.get)):
        some = min(sizes[axis], max(round((wanted / taken) ** (1 / left)), 1))
        starts[axis] = (sizes[axis] - some) // 2
        limits[axis] = starts[axis] + some
        taken *= some
    return jnp.sum(widen(jax.lax.slice(x, starts, limits)) * (1 / taken), reduced)


def _batch(measure, options, arrays, axes):
    """Makes of the members of a `vmap` one more axis that is kept, so that none takes a branch of its own."""
    samples = 1 + 2 * options.weighted
    if all(axis is None for axis in axes[:samples]):
        # With each shift the moments are the same.
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
    """Returns what to measure weights in: 1 if their sum is of a usual size, else a power of two near it."""
    usual = (count == 0) | (count > 2.0**-60) & (count < 2.0**60)
    return jnp.where(usual, 1, power_of_two(count))


def _count(weights: jax.Array | None, x: jax.Array, reduced: tuple[int, ...]) -> jax.Array | int:
    """Adds up the weights over some axes of `x`; feature axes that share a weight have size 1.

    Without weights it is a number; an array if that is symbolic, in `jax.export`.
    """
    dtype = real_dtype(arithmetic_dtype(x))
    if weights is None:
        size = math.prod(x.shape[axis] for axis in reduced)
        return size if isinstance(size, int) else jnp.full((1,) * (x.ndim - len(reduced)), size, dtype)
    # A weight that is shared along an axis is summed once and multiplied: exact for more samples than float32
    # can count one by one.
    size = math.prod(x.shape[axis] for axis in reduced if weights.shape[axis] == 1)
    count = jnp.sum(weights, reduced, dtype=dtype)
    return count if isinstance(size, int) and size == 1 else count * jnp.asarray(size, dtype)
