"""Moments of the samples at hand, in as few passes over memory as the platform allows."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jbn._dtypes import arithmetic_dtype, real_dtype
from jbn._merging import (
    Part,
    abs_squared,
    merge_about,
    merge_parts,
    power_of_two,
    ratio,
    weigh,
    where_counted,
    where_finite,
)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def measure_samples(reduced: tuple[int, ...], x: jax.Array, weights: jax.Array | None) -> Part:
    """Returns the moments over the axes `reduced`, in the shape of the others.

    What real weights count is in a unit, for they and their sum may be of any size.
    """
    count = _count(weights, x, reduced)
    unit = None if weights is None or weights.dtype == bool else _unit(count)
    measure = partial(about_a_sixteenth, reduced[1:], reduced)
    on_cpu = measure if jnp.iscomplexobj(x) else in_one_pass_if_exact(reduced)
    whole = jax.lax.platform_dependent(x, weights, count, unit, cpu=on_cpu, default=measure)
    whole = whole._replace(
        count=jnp.zeros_like(whole.var) + whole.count,
        unit=None if unit is None else jnp.zeros_like(whole.var) + unit,
    )
    return jax.tree.map(lambda leaf: jnp.squeeze(leaf, reduced), whole)


@measure_samples.defjvp
def _measure_samples_jvp(reduced, primals, tangents):
    """In closed form, whichever way the moments were measured.

    dmean = sum(weights * dx) / count;  dvar = 2 sum(weights * Re(conj(x - mean) * dx)) / count
    """
    (x, weights), (dx, _) = primals, tangents
    part = measure_samples(reduced, x, weights)
    x, dx = (_wide(where_counted(values, weights)) for values in (x, dx))
    if part.unit is not None:
        weights = weights * jnp.expand_dims(1 / part.unit, reduced)

    def average(samples):
        return ratio(jnp.sum(weigh(samples, weights), reduced), part.count)

    c = x - jnp.expand_dims(part.mean + part.rest, reduced)
    dmean, half_dvar = average(dx), average(jnp.real(jnp.conj(c) * dx))
    return part, jax.tree.map(jnp.zeros_like, part)._replace(rest=dmean, var=2 * half_dvar)


def unshared(values: Any, *, level: int = 1) -> Any:
    """Returns the same values, of which the compiler for CPUs does not know that they are the same.

    It fuses each reduction with the arithmetic before it, but what a reduction shares with something else it
    first writes out: `x - mean`, the mean broadcast to the shape of `x`, or merely `x` in float32. Other
    compilers fuse what shares, and must know. Values of one level are known to be the same.
    """
    on_cpu = partial(_unshared, level=level)
    return jax.lax.platform_dependent(values, cpu=on_cpu, default=lambda values: values)


def _unshared(values, *, level=1):
    for _ in range(level):
        # One by one, for in a `shard_map` some may vary over devices and others not.
        values = jax.tree.map(jax.lax.optimization_barrier, values)
    return values


def about_a_sixteenth(axes, reduced, x, weights, count, unit=None, *, unshare=lambda values, level: values):
    """Takes one pass, about the mean of a sixteenth of the samples, or two about that of all of them.

    The mean of a share f of the samples is nearer to that of all than sqrt((1 - f) / f) standard
    deviations, whichever samples they are; so to the variance a sum's rounding counts at most 16 times,
    and hardly more than once if the samples are in no order. Weighted samples take two passes, for the
    sixteenth might have no weight. It lies along the longest of `axes` whose size is not symbolic and
    that is not sharded on an explicit mesh.
    """
    total = partial(jnp.sum, axis=reduced, keepdims=True)
    spec = jax.typeof(x).sharding.spec
    sizes = {axis: x.shape[axis] for axis in axes if isinstance(x.shape[axis], int) and spec[axis] is None}
    if weights is not None or not sizes or not max(sizes.values()):
        # Written out once for CPUs, where no reduction is fused with a choice.
        x = unshare(where_counted(x, weights), level=1)
        if unit is not None:
            weights = weights * (1 / unit)
            count = _count(weights, x, reduced)
        return merge_parts(_parts(x, weights), count, total, unshare=unshare)
    axis = max(sizes, key=sizes.get)
    some = jax.lax.slice_in_dim(x, 0, -(-sizes[axis] // 16), axis=axis)
    centre = merge_parts(_parts(some, None), _count(None, some, reduced), total)
    return merge_about(centre.mean + centre.rest, _parts(x, None), count, total, unshare=unshare)


def in_one_pass_if_exact(reduced):
    """Makes a function that adds up x and |x|^2, sees whether that was exact, and else takes a second pass.

    To their difference a sum's rounding counts 1 + |mean|^2 / var times: 10 at most, or it is not taken.
    What is not finite fails the test. Where a mask hides it, multiplied by 0 here, or where weights need a
    unit, all is measured anew, masked before anything is computed. Under `vmap` there is no such choice, for
    each member would go all ways.
    """
    total = partial(jnp.sum, axis=reduced, keepdims=True)

    @jax.custom_batching.custom_vmap
    def measure(x, weights, count, unit):
        (x1, weights1), (x2, weights2) = _unshared((x, weights)), _unshared((x, weights), level=2)
        mean = ratio(total(weigh(_wide(x1), weights1)), count)
        square = ratio(total(weigh(abs_squared(_wide(x2)), weights2)), count)
        var = square - abs_squared(mean)
        # Of the 53 layers of a new ResNet-50, 4 have a feature whose mean is more than 3 standard deviations,
        # and 31 one with more than 2.
        exact = jnp.all(abs_squared(mean) <= 9 * var)
        usable = jnp.all(jnp.isfinite(mean))
        if unit is not None:
            exact, usable = (condition & jnp.all(unit == 1) for condition in (exact, usable))

        def about(centre, parts):
            return merge_about(centre, parts, count, total, unshare=_unshared)

        def again():
            if weights is None:
                return about(where_finite(mean), _parts(x, None))
            if weights.dtype == bool:
                # CPUs choose once faster than they convert Booleans twice. What is hidden is the centre.
                share = ratio(jnp.ones_like(count), count)
                rough = lambda: total(_wide(where_counted(x, weights)) * share)
                centre = jax.lax.cond(usable, lambda: mean, rough)
                return about(centre, _parts(_unshared(jnp.where(weights, _wide(x), centre)), None))
            from_the_start = partial(
                about_a_sixteenth, (), reduced, x, weights, count, unit, unshare=_unshared
            )
            return jax.lax.cond(usable, lambda: about(mean, _parts(x, weights)), from_the_start)

        return jax.lax.cond(exact, lambda: Part(mean, jnp.zeros_like(mean), var, count), again)

    @measure.def_vmap
    def measure_members(size, batched, *args):
        of_members = any(jax.tree.leaves(batched))  # if none is, JAX is about to map a derivative
        axes = jax.tree.map(lambda batched: 0 if batched else None, batched)
        member = partial(about_a_sixteenth, reduced, reduced, unshare=_unshared)
        mapped = jax.vmap(member, tuple(axes), axis_size=size) if of_members else member
        return mapped(*args), Part(*[of_members] * 4)

    return measure


def _wide(x):
    return x.astype(arithmetic_dtype(x))


def _parts(x, weights):
    zero = jnp.zeros((1,) * x.ndim, arithmetic_dtype(x))
    return Part(x, zero, jnp.real(zero), weights)


def _unit(count: jax.Array) -> jax.Array:
    """Returns what to measure weights in: 1 if their sum is of a usual size, else a power of two near it."""
    usual = (count == 0) | (count > 2.0**-60) & (count < 2.0**60)
    return jnp.where(usual, 1, power_of_two(count))


def _count(weights: jax.Array | None, x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Adds up the weights over some axes of `x`; they keep size 1, as do feature axes that share a weight."""
    if weights is None:
        weights = jnp.ones((1,) * x.ndim, bool)
    count = jnp.sum(weights, reduced, dtype=real_dtype(arithmetic_dtype(x)), keepdims=True)
    for a in reduced:
        # A weight that is shared along an axis is summed once and multiplied: exact for more samples than
        # float32 can count one by one. The size may be symbolic, in `jax.export`.
        if weights.shape[a] == 1:
            count = count * jnp.asarray(x.shape[a], count.dtype)
    return count
