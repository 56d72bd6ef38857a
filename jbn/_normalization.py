"""Normalization with given moments, and with a batch's own: the one derivative rule."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jbn._axes import expand, other_axes, shard_like
from jbn._collectives import NamedAxes, total, vary_like
from jbn._dtypes import arithmetic_dtype
from jbn._merging import ratio, weigh, where_counted
from jbn._samples import unshared
from jbn._statistics import Moments, cast, finite_centre, in_units, measure, select


class Params(NamedTuple):
    """The learnt affine map that follows normalization; either part may be None.

    For conditional normalization a part has all axes of `x` and broadcasts to it.
    """

    scale: jax.Array | None  # (features...), gamma; None scales by 1
    bias: jax.Array | None  # (features...), beta; None adds 0


def normalize_by(
    used: Moments,
    axes: tuple[int, ...],
    epsilon: float,
    dtype: np.dtype,
    x: jax.Array,
    params: Params,
    weights: jax.Array | None,
) -> jax.Array:
    """Normalizes with given moments, and with the mean in place of what is neither counted nor finite."""
    wide = arithmetic_dtype(x, *jax.tree.leaves((used, params)))
    used = finite_centre(cast(used, wide))
    multiplier = _inverse_sd(epsilon, used.var).astype(wide)
    if params.scale is not None:
        multiplier = multiplier * params.scale.astype(wide)
    mean = expand(used.mean, x.ndim, axes)
    y = _centred(x, mean, weights) * expand(multiplier, x.ndim, axes)
    if params.bias is not None:
        y = y + expand(params.bias.astype(wide), x.ndim, axes)
    return y.astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inverse_sd(epsilon: float, var: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(var + epsilon)


@_inverse_sd.defjvp
def _inverse_sd_jvp(epsilon, primals, tangents):
    """Multiplies what may be 0 first: the third power alone overflows where epsilon is below 1e-25."""
    inv = _inverse_sd(epsilon, *primals)
    return inv, -0.5 * (inv * (inv * (inv * tangents[0])))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def normalize_batch(
    axes: tuple[int, ...],
    over: NamedAxes,
    epsilon: float,
    dtype: np.dtype,
    x: jax.Array,
    params: Params,
    running: Moments,
    weights: jax.Array | None,
    train: jax.Array,
) -> tuple[jax.Array, Moments, jax.Array | None]:
    """Returns the normalized samples, the moments used, the batch's if `train`, else the running ones, and
    the unit of the batch's count."""
    batch, unit = measure(x, axes, weights, over)
    wide = arithmetic_dtype(batch.mean, running.mean)
    batch = cast(batch, wide)
    used = select(train, batch, jax.tree.map(shard_like, cast(running, wide), batch))
    return normalize_by(used, axes, epsilon, dtype, x, params, weights), used, unit


@normalize_batch.defjvp
def _normalize_batch_jvp(axes, over, epsilon, dtype, primals, tangents):
    """The derivative in closed form, grouped per feature.

        c = x - mean;  a = scale * inv
        P = dbias - a*mean(dx);  Q = inv*dscale - a*inv^2*mean(Re(conj(c)*dx))
        dy = a*dx + c*Q + P

    JAX transposes these two reductions into the two of the backward pass, summed over devices in one
    collective, from which the gradients of scale and bias come too. The rule is plain JAX code, in which
    `used` has the derivative that this same rule gives it, so every further derivative follows.
    """
    x, params, _, weights, train = primals
    dx, dparams, *_ = tangents
    _, used, unit = normalize_batch(axes, over, epsilon, dtype, *primals)
    # A policy of `jax.checkpoint` that keeps what has this name has y made from it again, without measuring.
    used = checkpoint_name(used, "batch_norm_moments")
    y = normalize_by(used, axes, epsilon, dtype, x, params, weights)

    # Recomputed in the backward pass, which then keeps x in its own dtype and not x - mean in float32.
    @partial(jax.checkpoint, prevent_cse=False)
    def tangent(x, params, used, weights, unit, train, dx, dparams):
        def per_sample(values):
            return expand(values, x.ndim, axes)

        def sum_of(samples):
            counted = where_counted(samples, weights)
            return jnp.sum(weigh(counted, in_units(weights, unit, axes)), other_axes(x.ndim, axes))

        def or_constant(leaf, value):
            return jnp.full_like(used.mean, value) if leaf is None else leaf.astype(wide)

        wide = arithmetic_dtype(x, used.mean, *jax.tree.leaves(params))
        used = finite_centre(cast(used, wide))
        scale = or_constant(params.scale, 1)
        dparams = or_constant(dparams.scale, 0), or_constant(dparams.bias, 0)
        dscale, dbias = vary_like(jnp.stack(dparams), used.mean)

        def centred(x, weights, mean, inv):
            c = _centred(x, mean, weights)
            return c * inv if in_sd else c

        inv = _inverse_sd(epsilon, used.var).astype(wide)
        # For the smallest epsilon the square of 1/sd overflows. There c is in units of sd, which is one more
        # multiplication in a sum, and takes CPUs up to a tenth longer.
        in_sd = epsilon < 1e-12
        per_c = jnp.ones_like(inv) if in_sd else inv
        per_feature = per_sample(used.mean), per_sample(inv)
        dx = _where_usable(x, weights, dx.astype(wide))
        cdx = jnp.real(jnp.conj(centred(x, weights, *per_feature)) * dx).astype(wide)
        sums = total(jnp.stack([sum_of(dx), sum_of(cdx)]), over)
        # The moments move with x only in training, and an infinite variance not at all.
        in_range = ~jnp.isinf(used.var)
        mean_dx, mean_cdx = jnp.where((train & in_range)[None], ratio(sums, used.count[None]), 0)

        a = inv * scale
        P = dbias - a * mean_dx
        Q = jnp.where(in_range, per_c * dscale - a * per_c**2 * mean_cdx, 0)
        P, Q = vary_like(jnp.stack([P, Q]), x)
        # What multiplies Q is summed in the backward pass; measuring has levels 1 and 2. Weights stand for an
        # x in which they may hide NaN, for checks would see it pass.
        if weights is None:
            c = centred(*unshared((x, None, *per_feature), level=3))
        else:
            c = centred(x, *unshared((weights, *per_feature), level=3))
        dy = per_sample(a) * dx + c * per_sample(Q) + per_sample(P)
        dvar = 2 * jnp.real(mean_cdx)
        if in_sd:
            dvar = dvar * jnp.sqrt(jnp.where(in_range, used.var, 0) + epsilon)
        return dy.astype(dtype), Moments(mean_dx, dvar, jnp.zeros_like(used.count))

    dy, dused = tangent(x, params, used, weights, unit, train, dx, dparams)
    return (y, used, unit), (dy, cast(dused, used.mean.dtype), None if unit is None else jnp.zeros_like(unit))


def _centred(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    # Chosen before and after, so that nothing that is not finite is computed with.
    return _where_usable(x, weights, _where_usable(x, weights, x.astype(mean.dtype)) - mean)


def _where_usable(x: jax.Array, weights: jax.Array | None, values: jax.Array) -> jax.Array:
    """Puts 0 where `x` is not finite and has weight 0."""
    if weights is None:
        return values
    return jnp.where(weights.astype(bool) | jnp.isfinite(x), values, 0)
