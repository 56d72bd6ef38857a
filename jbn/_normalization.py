"""Normalization with given moments, and with a batch's own moments: the derivative rule."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jbn._axes import other_axes
from jbn._collectives import NamedAxes, group_sum
from jbn._domains import Sets, at_samples
from jbn._dtypes import arithmetic_dtype
from jbn._params import Params
from jbn._renorm import Limits, renormalize
from jbn._sharding import shard_like, vary_like
from jbn._statistics import Moments, cast, divide_by_unit, measure, select, zero_mean_where_var_is_inf
from jbn._weights import share_of, weigh, where_counted
from jbn._xla import prefers_spread, spread, unshared_on_cpu


def normalize_by(
    used: Moments,
    axes: tuple[int, ...],
    epsilon: float,
    dtype: np.dtype,
    x: jax.Array,
    params: Params,
    weights: jax.Array | None = None,
    domain: jax.Array | None = None,
) -> jax.Array:
    """Normalize with given moments. A sample that has weight 0 and is not finite acts as the mean."""
    wide = arithmetic_dtype(x, *jax.tree.leaves((used, params)))
    used = zero_mean_where_var_is_inf(cast(used, wide))
    inv = inverse_sd(epsilon, used.var).astype(wide)
    return _normalize(used.mean, inv, axes, dtype, x, params, weights, domain)


def _normalize(mean, inv, axes, dtype, x, params, weights, domain):
    per_sample = lambda values: at_samples(values, x.ndim, axes, domain)
    multiplier = inv if params.scale is None else inv * params.scale.astype(inv.dtype)
    y = _centred(x, per_sample(mean), weights) * per_sample(multiplier)
    if params.bias is not None:
        y = y + per_sample(params.bias.astype(inv.dtype))
    return y.astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def inverse_sd(epsilon: float, var: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(var + epsilon)


@inverse_sd.defjvp
def _inverse_sd_jvp(epsilon, primals, tangents):
    """Multiply by the tangent first: the third power alone overflows if epsilon is below 1e-25."""
    inv = inverse_sd(epsilon, *primals)
    return inv, -0.5 * (inv * (inv * (inv * tangents[0])))


class Options(NamedTuple):
    """What is static: known while tracing."""

    axes: tuple[int, ...]  # of the features
    over: NamedAxes
    epsilon: float
    exact: bool
    dtype: np.dtype  # of the result


class Context(NamedTuple):
    """What a batch is normalized in; nothing here gets a gradient."""

    running: Moments
    weights: jax.Array | None = None  # as many axes as x
    train: jax.Array | None = None  # (), Boolean; None for true
    limits: Limits | None = None  # of batch renormalization; None for batch normalization
    domain: jax.Array | None = None  # () or (N,), from `as_domain`


def normalize_batch_by_autodiff(
    options: Options, x: jax.Array, params: Params, context: Context
) -> tuple[jax.Array, Moments, jax.Array | None]:
    """Return the normalized samples, the moments used, and the unit of the batch's count.

    The moments used are the batch's if `train` is None or true, else the running ones.
    """
    axes, _, epsilon, _, dtype = options
    running, weights, train, limits, domain = context
    used, unit = _moments_to_use(options, x, context)
    params = renormalize(params, used, running, limits, epsilon)
    return normalize_by(used, axes, epsilon, dtype, x, params, weights, domain), used, unit


def _moments_to_use(options, x, context):
    axes, over, epsilon, exact, _ = options
    running, weights, train, _, domain = context
    batch, unit = measure(
        x, axes, weights, over, shift=running.mean, exact=exact, epsilon=epsilon, domain=domain
    )
    wide = arithmetic_dtype(batch.mean, running.mean)
    batch = cast(batch, wide)
    if train is None:
        return batch, unit
    return select(train, batch, jax.tree.map(shard_like, cast(running, wide), batch)), unit


# The same function with a derivative rule.
normalize_batch = jax.custom_jvp(normalize_batch_by_autodiff, nondiff_argnums=(0,))


@normalize_batch.defjvp
def _normalize_batch_jvp(options, primals, tangents):
    """Derive in closed form, grouped per feature.

        x^ = (x - mean) * inv;  a = scale * inv
        P = dbias - a*mean(dx);  Q = dscale - a*mean(Re(conj(x^)*dx))
        dy = a*dx + x^*Q + P

    JAX transposes these two reductions into the two of the backward pass, summed over devices in one
    collective, which yield the gradients of scale and bias too. The rule is plain JAX code, and `used` keeps
    the derivative of `measure`, so that every higher derivative is right.
    """
    x, params, context = primals
    dx, dparams, _ = tangents
    used, unit = _moments_to_use(options, x, context)
    # A policy of `jax.checkpoint` that saves this name recomputes y from the moments without measuring again.
    used = checkpoint_name(used, "batch_norm_moments")
    correct = lambda params: renormalize(params, used, context.running, context.limits, options.epsilon)
    params, dparams = jax.jvp(correct, (params,), (dparams,))
    wide = arithmetic_dtype(x, used.mean, *jax.tree.leaves(params))
    finite = zero_mean_where_var_is_inf(cast(used, wide))
    inv = inverse_sd(options.epsilon, finite.var).astype(wide)
    y = _normalize(finite.mean, inv, options.axes, options.dtype, x, params, context.weights, context.domain)
    # Recomputed in the backward pass, so that the residual is x in its own dtype and not x - mean in float32.
    tangent = jax.checkpoint(_tangent, prevent_cse=False, static_argnums=0)
    dy, dused = tangent(options, x, params, finite, inv, unit, context, dx, dparams)
    return (y, used, unit), (dy, cast(dused, used.mean.dtype), None if unit is None else jnp.zeros_like(unit))


def _tangent(options, x, params, used, inv, unit, context, dx, dparams):
    axes, over, epsilon, _, dtype = options
    _, weights, train, _, domain = context
    wide, reduced = inv.dtype, other_axes(x.ndim, axes)
    sets = Sets(reduced, domain, 1 if domain is None else len(inv))
    per_sample = sets.expand
    mean_of_x, inv_of_x = per_sample(used.mean), per_sample(inv)

    def total(samples):
        weighed = weigh(where_counted(samples, weights), divide_by_unit(weights, unit, axes, domain))
        return sets.add_up(weighed)

    def or_constant(leaf, value):
        return jnp.full_like(used.mean, value) if leaf is None else leaf.astype(wide)

    dx = _where_usable(x, weights, dx.astype(wide))
    normal = _centred(x, mean_of_x, weights) * inv_of_x
    sums = total(dx), total(jnp.real(jnp.conj(normal) * dx).astype(wide))
    if over.names:
        sums = group_sum(jnp.stack(sums), over)
    size = math.prod(x.shape[axis] for axis in reduced)
    is_whole = weights is None and domain is None and not over.names
    share = share_of(size if is_whole else used.count, dx)
    mean_dx, mean_ndx = (part * share for part in sums)
    if train is not None:  # the moments depend on x in training only
        mean_dx, mean_ndx = jnp.where(train, mean_dx, 0), jnp.where(train, mean_ndx, 0)

    a = inv * or_constant(params.scale, 1)
    dscale, dbias = or_constant(dparams.scale, 0), or_constant(dparams.bias, 0)
    # The factor of Q is summed in the backward pass. So it is made of a third copy of x, after the two of
    # `measure`; or of the weights: `jax_debug_nans` would find NaN that they hide in a copy of x.
    if weights is None:
        again = _centred(unshared_on_cpu(x, times=3), unshared_on_cpu(mean_of_x), None)
    else:
        again = _centred(x, unshared_on_cpu(mean_of_x), unshared_on_cpu(weights))
    again = again * unshared_on_cpu(inv_of_x)
    Q, minus_mean = dscale - a * mean_ndx, -mean_dx
    if domain is None and prefers_spread(x.shape, reduced, dtype):
        minus_mean, Q, P = vary_like((minus_mean, Q, dbias), x)
        (scale,) = vary_like((a,), x)  # by itself, because it is not a tangent
        centring = spread(minus_mean, scale, shape=x.shape, new_axes=reduced)
        offset = per_sample(P) + _where_usable(x, weights, centring)
    elif weights is None:
        P, Q = vary_like((dbias + a * minus_mean, Q), x)
        offset = per_sample(P)
    else:  # what acts as the mean moves with it
        P, Q, minus_mean = vary_like((dbias, Q, a * minus_mean), x)
        offset = per_sample(P) + _where_usable(x, weights, per_sample(minus_mean))
    dy = per_sample(a) * dx + again * per_sample(Q) + offset
    # The derivative of an infinite variance is 0.
    in_range = used.var < jnp.inf
    dvar = 2 * jnp.real(mean_ndx) * jnp.sqrt(jnp.where(in_range, used.var, 0) + epsilon)
    dmean, dvar = jnp.where(in_range, mean_dx, 0), jnp.where(in_range, dvar, 0)
    return dy.astype(dtype), Moments(dmean, dvar, jnp.zeros_like(used.count))


def _centred(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    # Select before and after, so that no arithmetic sees what is not finite.
    return _where_usable(x, weights, _where_usable(x, weights, x.astype(mean.dtype)) - mean)


def _where_usable(x: jax.Array, weights: jax.Array | None, values: jax.Array) -> jax.Array:
    """Replace values by 0 where `x` is not finite and has weight 0."""
    if weights is None:
        return values
    return jnp.where(weights.astype(bool) | jnp.isfinite(x), values, 0)
