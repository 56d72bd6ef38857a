"""Batch normalization as pure functions, with the one derivative rule that they share."""

import math
import operator
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jbn.axes import Axes, expand, feature_axes, other_axes
from jbn.checks import as_samples, as_weights, check_epsilon, check_features, check_update, result_dtype
from jbn.collectives import AxisName, NamedAxes, named_axes, smallest_group, split_devices, total, vary_like
from jbn.dtypes import arithmetic_dtype, real_dtype
from jbn.running import UpdateRule, absorb, ema
from jbn.statistics import (
    Moments,
    cast,
    finite_centre,
    measure,
    merge_rows,
    ratio,
    select,
    weigh,
    where_counted,
    with_count_per_feature,
)
from jbn.virtual_batches import count_parts, map_parts


class Params(NamedTuple):
    """The learnt affine map that follows normalization; either part may be None."""

    scale: jax.Array | None  # (features...), gamma; None scales by 1
    bias: jax.Array | None  # (features...), beta; None adds 0


def init(
    features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Params, Moments]:
    """Makes the parameters and the running moments of one layer.

    Args:
      features: the number of features, or the shape of the feature axes.
      use_scale: learn a scale, which starts at 1.
      use_bias: learn a bias, which starts at 0.
      dtype: the parameters' dtype. The running moments are float32 at least, variance and count real.

    Returns:
      `Params` and `Moments` with mean 0, variance 1 and count 0, all in the features' shape.

    >>> import jbn
    >>> params, running = jbn.init(3)
    >>> print(params.scale, params.bias, running.mean, running.var)
    [1. 1. 1.] [0. 0. 0.] [0. 0. 0.] [1. 1. 1.]
    """
    shape = tuple(features) if isinstance(features, Sequence) else (operator.index(features),)
    wide = arithmetic_dtype(dtype)
    params = Params(
        scale=jnp.ones(shape, dtype) if use_scale else None,
        bias=jnp.zeros(shape, dtype) if use_bias else None,
    )
    running = Moments(
        mean=jnp.zeros(shape, wide),
        var=jnp.ones(shape, real_dtype(wide)),
        count=jnp.zeros(shape, real_dtype(wide)),
    )
    return params, running


def normalize(
    x: ArrayLike,
    moments: Moments,
    params: Params | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes with given moments, then applies the learnt affine map.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
      x: samples, of any shape; floating point or complex.
      moments: the statistics to normalize with, in the features' shape; `count` is not used.
      params: scale and bias in the features' shape; None for neither.
      axis: the feature axis or axes.
      epsilon: added to the variance; > 0.
      dtype: the result's dtype; that of `x` if None. The arithmetic is in float32 at least.

    Returns:
      An array of the shape of `x`. It carries the gradient to `x`, to `moments` and to `params`.

    Raises:
      TypeError: `x` is an integer array, `dtype` cannot hold the result, or `moments` or `params` is of
        another type.
      ValueError: `axis` is out of range or repeated, `epsilon` <= 0, or `moments` or `params` have another
        shape than the features of `x`.

    Reference: Ioffe & Szegedy 2015, Algorithm 1, lines 3 and 4.

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.array([[1.0], [3.0]])
    >>> print(jbn.normalize(x, jbn.moments(x)).round(4))
    [[-1.]
     [ 1.]]
    """
    x = as_samples(x)
    axes = feature_axes(x.ndim, axis)
    params = Params(None, None) if params is None else params
    check_epsilon(epsilon)
    check_features(x, axes, "moments", moments, Moments)
    check_features(x, axes, "params", params, Params)
    dtype = result_dtype(x, dtype)
    wide = arithmetic_dtype(x, *jax.tree.leaves((moments, params)))
    moments = finite_centre(cast(moments, wide))
    multiplier = jax.lax.rsqrt(moments.var + epsilon).astype(wide)
    if params.scale is not None:
        multiplier = multiplier * params.scale.astype(wide)
    y = (x.astype(wide) - expand(moments.mean, x.ndim, axes)) * expand(multiplier, x.ndim, axes)
    if params.bias is not None:
        y = y + expand(params.bias.astype(wide), x.ndim, axes)
    return y.astype(dtype)


def batch_norm(
    x: ArrayLike,
    params: Params | None,
    running: Moments,
    *,
    train: ArrayLike,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    update: UpdateRule = ema(0.99),
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    virtual_batch_size: int | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes each feature: with the batch's own moments in training, with the running ones in inference.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    In training `mean` and `var` are those of `jbn.moments(x, axis=axis, mask=mask, axis_name=axis_name)`, the
    gradient flows through them, and the running moments absorb them by the rule `update`. In inference `mean`
    and `var` are the running ones, which are constants and are returned as they came.

    Args:
      x: samples, of any shape; floating point or complex.
      params: scale and bias in the features' shape; None for neither.
      running: running moments in the features' shape.
      train: True in training, False in inference; or a traced Boolean scalar, so that one compiled function
        serves both.
      axis: the feature axis or axes; statistics reduce over every other axis.
      epsilon: added to the variance; > 0.
      update: how the running moments absorb the batch's: `jbn.ema`, `jbn.cumulative`, `jbn.pooled` or any
        function `(running, batch) -> running`. A feature whose batch moments are not finite, or that had no
        samples, keeps its running moments whatever the rule.
      mask: which positions count in the statistics: Booleans, or real weights >= 0, broadcastable to `x`; it
        carries no gradient. Every position is normalized, from its own `x`. Where the weight is 0 and `x` is
        not finite, `x` acts as the mean and gets no gradient. A batch without any weight is normalized with
        mean 0 and variance 0: finite, and of no use but to a masked loss.
      axis_name: name or names of the axes that `jax.shard_map` or `jax.vmap` map over and that share one
        batch: one collective forward, as `jbn.moments` tells, and one backward. It has no effect in
        inference. Under plain `jit`, statistics of a sharded batch are global without a name.
      axis_index_groups: a partition of the indices along the named axes; only members of one group share.
      virtual_batch_size: normalize ceil(N / virtual_batch_size) consecutive parts of the N examples each with
        its own moments (ghost batches: Hoffer et al. 2017). Their sizes differ by one at most, as in
        `numpy.array_split`. N is the size of the first axis that is no feature axis, on each device for
        itself; the running moments absorb the merge of all parts, over `axis_name` too. Under plain `jit`, N
        over the number of devices gives local statistics. It has no effect in inference.
      dtype: the dtype of `y`; that of `x` if None. The arithmetic is in float32 at least.

    Returns:
      `y` in the shape of `x`, and the running moments in the shapes and dtypes of those given (the count in
      the mean's shape), without gradient.

    Raises:
      TypeError: `x` is an integer array, `mask` is complex, `dtype` cannot hold the result, `update` is no
        function, or `params` or `running` is of another type.
      ValueError: `axis` is out of range or repeated, `epsilon` <= 0, `mask` does not broadcast or is
        negative, `params` or `running` have another shape than the features of `x`, `x` is complex and
        `running.mean` is not, `axis_name` is not bound, `axis_index_groups` is no partition, or
        `virtual_batch_size` < 1.

    Warns:
      UserWarning: in training there is one value per feature, so that every output is the bias.

    A feature whose variance is beyond the dtype's range (deviations above 1e19 in float32) is divided by
    infinity: the output is the bias.

    Reference: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    >>> import jax.numpy as jnp, jbn
    >>> params, running = jbn.init(2)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, running = jbn.batch_norm(x, params, running, train=True, update=jbn.ema(0.5))
    >>> print(y.round(4))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(running.mean, running.var)
    [ 1. 10.] [ 1.  50.5]
    """
    x = as_samples(x)
    axes = feature_axes(x.ndim, axis)
    weights = as_weights(mask, x)
    params = Params(None, None) if params is None else params
    check_epsilon(epsilon)
    check_update(update)
    check_features(x, axes, "running", running, Moments)
    check_features(x, axes, "params", params, Params)
    dtype = result_dtype(x, dtype)
    parts = count_parts(x, axes, virtual_batch_size)
    running = with_count_per_feature(jax.lax.stop_gradient(running))
    if isinstance(train, bool | np.bool_) and not train:
        return _normalize_usable(x, weights, running, params, axes, epsilon, dtype), running
    over = named_axes(axis_name, axis_index_groups)
    _warn_of_one_value(x, axes, parts, over)
    train = jnp.asarray(train, bool)
    if parts is None:
        # JAX forgets a vmap's axis name in a custom rule that jit stages inside it: autodiff does it there.
        vectorized, _ = split_devices(over)
        normalize_batch = _formula if vectorized.names else _normalize_batch
        y, used = normalize_batch(axes, over, epsilon, dtype, x, params, running, weights, train)
    else:
        normalize_part = partial(_normalize_batch, axes, NamedAxes(), epsilon, dtype)
        y, used = map_parts(normalize_part, parts, axes)(x, params, running, weights, train)
        used = merge_rows(used, over)
    return y, select(train, absorb(update, running, used), running)


def _formula(axes, over, epsilon, dtype, x, params, running, weights, train):
    """Returns the normalized samples and the moments used: the batch's if `train`, else the running ones."""
    batch = measure(x, axes, weights, over)
    wide = arithmetic_dtype(batch.mean, running.mean)
    used = select(train, cast(batch, wide), cast(running, wide))
    return _normalize_usable(x, weights, used, params, axes, epsilon, dtype), used


_normalize_batch = jax.custom_jvp(_formula, nondiff_argnums=(0, 1, 2, 3))


@_normalize_batch.defjvp
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
    y, used = _normalize_batch(axes, over, epsilon, dtype, *primals)

    # Recomputed in the backward pass, which then keeps x in its own dtype and not x - mean in float32.
    @partial(jax.checkpoint, prevent_cse=False)
    def tangent(x, params, used, weights, train, dx, dparams):
        def per_sample(values):
            return expand(values, x.ndim, axes)

        def sum_of(samples):
            return jnp.sum(weigh(where_counted(samples, weights), weights), other_axes(x.ndim, axes))

        def or_constant(leaf, value):
            return jnp.full_like(used.mean, value) if leaf is None else leaf.astype(wide)

        wide = arithmetic_dtype(x, used.mean, *jax.tree.leaves(params))
        used = finite_centre(cast(used, wide))
        scale = or_constant(params.scale, 1)
        dscale, dbias = or_constant(dparams.scale, 0), or_constant(dparams.bias, 0)
        dscale, dbias = vary_like(jnp.stack([dscale, dbias]), used.mean)

        mean = per_sample(used.mean)
        c = _where_usable(x, weights, x.astype(wide), mean) - mean
        dx = _where_usable(x, weights, dx.astype(wide), 0)
        sums = total(jnp.stack([sum_of(dx), sum_of(jnp.real(jnp.conj(c) * dx)).astype(wide)]), over)
        # The moments move with x only in training, and an infinite variance not at all.
        in_range = ~jnp.isinf(used.var)
        mean_dx, mean_cdx = jnp.where((train & in_range)[None], ratio(sums, used.count[None]), 0)

        inv = jax.lax.rsqrt(used.var + epsilon).astype(wide)
        a = inv * scale
        P = dbias - a * mean_dx
        Q = jnp.where(in_range, inv * dscale - a * inv**2 * mean_cdx, 0)
        P, Q = vary_like(jnp.stack([P, Q]), x)
        dy = per_sample(a) * dx + c * per_sample(Q) + per_sample(P)
        return dy.astype(dtype), Moments(mean_dx, 2 * jnp.real(mean_cdx), jnp.zeros_like(used.count))

    dy, dused = tangent(x, params, used, weights, train, dx, dparams)
    return (y, used), (dy, cast(dused, used.mean.dtype))


def _warn_of_one_value(x, axes, parts, over):
    """Counts what is known while tracing: positions, whatever a mask makes of them."""
    sizes, where = [x.shape[a] for a in other_axes(x.ndim, axes)], ""
    if parts is not None:
        sizes[0] //= parts
        where = f", in {parts} virtual batches"
    elif over.names:
        sizes.append(smallest_group(over))
        where = (
            f", counted over axis_name={over.names}" + (over.groups is not None) * " in the smallest group"
        )
    if math.prod(sizes) == 1:
        warnings.warn(
            f"x of shape {x.shape} has one value per feature{where}. It is its own mean, so that in training "
            "every output is the bias. Train on larger batches, or with the running moments (train=False).",
            stacklevel=3,
        )


def _normalize_usable(x, weights, used, params, axes, epsilon, dtype):
    """Normalizes, with the mean in place of what is neither counted nor finite."""
    if weights is not None:
        wide = arithmetic_dtype(x, used.mean)
        x = _where_usable(x, weights, x.astype(wide), expand(used.mean.astype(wide), x.ndim, axes))
    return normalize(x, used, params, axis=axes, epsilon=epsilon, dtype=dtype)


def _where_usable(
    x: jax.Array, weights: jax.Array | None, values: jax.Array, fallback: ArrayLike
) -> jax.Array:
    """Takes `fallback` where `x` is not finite and has weight 0, and `values` everywhere else."""
    if weights is None:
        return values
    return jnp.where(weights.astype(bool) | jnp.isfinite(x), values, fallback)
