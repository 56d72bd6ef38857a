"""Normalization with given moments, and with a batch's own: the one derivative rule."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jbn._axes import expand, other_axes, shard_like
from jbn._collectives import NamedAxes, total, vary_like
from jbn._dtypes import arithmetic_dtype
from jbn._merging import share_of, weigh, where_counted
from jbn._statistics import Moments, cast, finite_centre, in_units, measure, select
from jbn._xla import is_summed_apart, spread, unshared_on_cpu


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
    return _normalize(used.mean, _inverse_sd(epsilon, used.var).astype(wide), axes, dtype, x, params, weights)


def _normalize(mean, inv, axes, dtype, x, params, weights):
    multiplier = inv if params.scale is None else inv * params.scale.astype(inv.dtype)
    y = _centred(x, expand(mean, x.ndim, axes), weights) * expand(multiplier, x.ndim, axes)
    if params.bias is not None:
        y = y + expand(params.bias.astype(inv.dtype), x.ndim, axes)
    return y.astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inverse_sd(epsilon: float, var: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(var + epsilon)


@_inverse_sd.defjvp
def _inverse_sd_jvp(epsilon, primals, tangents):
    """Multiplies what may be 0 first: the third power alone overflows where epsilon is below 1e-25."""
    inv = _inverse_sd(epsilon, *primals)
    return inv, -0.5 * (inv * (inv * (inv * tangents[0])))


class Options(NamedTuple):
    """What is known while tracing, and is no array."""

    axes: tuple[int, ...]  # of the features
    over: NamedAxes
    epsilon: float
    exact: bool
    dtype: np.dtype  # of the result


def derived_normalize_batch(
    options: Options,
    x: jax.Array,
    params: Params,
    running: Moments,
    weights: jax.Array | None,
    train: jax.Array | None,
) -> tuple[jax.Array, Moments, jax.Array | None]:
    """Returns the normalized samples, the moments used, and the unit of the batch's count.

    The moments used are the batch's if `train` is None or holds, else the running ones. Automatic
    differentiation derives this as it is written here.
    """
    used, unit = _moments_to_use(options, x, running, weights, train)
    return normalize_by(used, options.axes, options.epsilon, options.dtype, x, params, weights), used, unit


def _moments_to_use(options, x, running, weights, train):
    axes, over, epsilon, exact, _ = options
    batch, unit = measure(x, axes, weights, over, shift=running.mean, exact=exact, epsilon=epsilon)
    wide = arithmetic_dtype(batch.mean, running.mean)
    batch = cast(batch, wide)
    if train is None:
        return batch, unit
    return select(train, batch, jax.tree.map(shard_like, cast(running, wide), batch)), unit


# The same function, with the one derivative rule.
normalize_batch = jax.custom_jvp(derived_normalize_batch, nondiff_argnums=(0,))


@normalize_batch.defjvp
def _normalize_batch_jvp(options, primals, tangents):
    """The derivative in closed form, grouped per feature.

        x^ = (x - mean) * inv;  a = scale * inv
        P = dbias - a*mean(dx);  Q = dscale - a*mean(Re(conj(x^)*dx))
        dy = a*dx + x^*Q + P

    JAX transposes these two reductions into the two of the backward pass, summed over devices in one
    collective, from which the gradients of scale and bias come too. The rule is plain JAX code, in which
    `used` has the derivative that measuring gives it, so every further derivative follows.
    """
    x, params, running, weights, train = primals
    dx, dparams, *_ = tangents
    used, unit = _moments_to_use(options, x, running, weights, train)
    # A policy of `jax.checkpoint` that keeps what has this name has y made from it again, without measuring.
    used = checkpoint_name(used, "batch_norm_moments")
    wide = arithmetic_dtype(x, used.mean, *jax.tree.leaves(params))
    finite = finite_centre(cast(used, wide))
    inv = _inverse_sd(options.epsilon, finite.var).astype(wide)
    y = _normalize(finite.mean, inv, options.axes, options.dtype, x, params, weights)
    # Recomputed in the backward pass, which then keeps x in its own dtype and not x - mean in float32.
    tangent = jax.checkpoint(_tangent, prevent_cse=False, static_argnums=0)
    dy, dused = tangent(options, x, params, finite, inv, weights, unit, train, dx, dparams)
    return (y, used, unit), (dy, cast(dused, used.mean.dtype), None if unit is None else jnp.zeros_like(unit))


def _tangent(options, x, params, used, inv, weights, unit, train, dx, dparams):
    axes, over, epsilon, _, dtype = options
    wide, reduced = inv.dtype, other_axes(x.ndim, axes)
    mean_of_x, inv_of_x = (expand(values, x.ndim, axes) for values in (used.mean, inv))

    def add_up(samples):
        return jnp.sum(weigh(where_counted(samples, weights), in_units(weights, unit, axes)), reduced)

    def or_constant(leaf, value):
        return jnp.full_like(used.mean, value) if leaf is None else leaf.astype(wide)

    dx = _where_usable(x, weights, dx.astype(wide))
    normal = _centred(x, mean_of_x, weights) * inv_of_x
    sums = add_up(dx), add_up(jnp.real(jnp.conj(normal) * dx).astype(wide))
    if over.names:
        sums = total(jnp.stack(sums), over)
    size = math.prod(x.shape[axis] for axis in reduced)
    share = share_of(size if weights is None and not over.names else used.count, dx)
    mean_dx, mean_ndx = (part * share for part in sums)
    if train is not None:  # the moments move with x only in training
        mean_dx, mean_ndx = jnp.where(train, mean_dx, 0), jnp.where(train, mean_ndx, 0)

    a = inv * or_constant(params.scale, 1)
    dscale, dbias = or_constant(dparams.scale, 0), or_constant(dparams.bias, 0)
    # What multiplies Q is summed in the backward pass, from a third copy: measuring has two. Weights stand
    # for an x in which they may hide NaN, for checks would see it pass.
    if weights is None:
        again = _centred(unshared_on_cpu(x, times=3), unshared_on_cpu(mean_of_x), None)
    else:
        again = _centred(x, unshared_on_cpu(mean_of_x), unshared_on_cpu(weights))
    again = again * unshared_on_cpu(inv_of_x)
    per_sample = lambda values: expand(values, x.ndim, axes)
    Q, minus_mean = dscale - a * mean_ndx, -mean_dx
    if is_summed_apart(x.shape, reduced, dtype):
        minus_mean, Q, P = vary_like((minus_mean, Q, dbias), x)
        (scale,) = vary_like((a,), x)  # by itself, for it is no tangent
        shift = per_sample(P) + spread(minus_mean, scale, shape=x.shape, new_axes=reduced)
    else:
        P, Q = vary_like((dbias + a * minus_mean, Q), x)
        shift = per_sample(P)
    dy = per_sample(a) * dx + again * per_sample(Q) + shift
    # An infinite variance does not move at all.
    in_range = used.var < jnp.inf
    dvar = 2 * jnp.real(mean_ndx) * jnp.sqrt(jnp.where(in_range, used.var, 0) + epsilon)
    dmean, dvar = jnp.where(in_range, mean_dx, 0), jnp.where(in_range, dvar, 0)
    return dy.astype(dtype), Moments(dmean, dvar, jnp.zeros_like(used.count))


def _centred(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    # Chosen before and after, so that nothing that is not finite is computed with.
    return _where_usable(x, weights, _where_usable(x, weights, x.astype(mean.dtype)) - mean)


def _where_usable(x: jax.Array, weights: jax.Array | None, values: jax.Array) -> jax.Array:
    """Puts 0 where `x` is not finite and has weight 0."""
    if weights is None:
        return values
    return jnp.where(weights.astype(bool) | jnp.isfinite(x), values, 0)
