"""Batch normalization as pure functions."""

import math
import operator
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jbn._axes import Axes, feature_axes, other_axes
from jbn._checks import (
    as_epsilon,
    as_samples,
    as_weights,
    check_exact,
    check_features,
    check_train,
    check_update,
    result_dtype,
)
from jbn._collectives import AxisName, NamedAxes, named_axes, split_devices
from jbn._conditional import split_affine
from jbn._dtypes import arithmetic_dtype, real_dtype
from jbn._normalization import Options, Params, normalize_batch, normalize_batch_by_autodiff, normalize_by
from jbn._running import UpdateRule, ema
from jbn._sharding import shard_like
from jbn._spelling import explain_names
from jbn._statistics import Moments, merge_stacked, multiply_by_unit, select, with_count_per_feature
from jbn._update import apply_update_rule
from jbn._virtual_batches import count_parts, map_parts
from jbn._warnings import warn_if_single_value


@explain_names
def init(
    features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Params, Moments]:
    """Make the parameters and the running moments of one layer.

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


@explain_names
def normalize(
    x: ArrayLike,
    moments: Moments,
    params: Params | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalize with given moments, then apply the learnt affine map.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
      x: samples, of any shape; floating point or complex.
      moments: the statistics to normalize with, in the features' shape; `count` is not used.
      params: scale and bias in the features' shape, or scalars; None for neither. For conditional
        normalization either may have all axes of `x` and broadcast to it, as `scale[:, None, None, :]` with
        one vector per example.
      axis: the feature axis or axes.
      epsilon: added to the variance; a normal number of the dtype of the arithmetic (1.2e-38 in float32).
      dtype: the dtype of the result; that of `x` if None. The arithmetic is in float32 at least.

    Returns:
      An array of the shape of `x`. It carries the gradient to `x`, to `moments` and to `params`.

    Raises:
      TypeError: `x` is an integer array, `dtype` cannot hold the result, or `moments` or `params` is of
        another type.
      ValueError: `axis` is out of range or repeated, `epsilon` is too small, or the shape of `moments` or
        `params` is not that of the features of `x`.

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
    check_features(x, axes, "moments", moments, Moments)
    check_features(x, axes, "params", params, Params, may_broadcast=True)
    epsilon = as_epsilon(epsilon, x, moments.mean, moments.var, params)
    params, dtype, affine = split_affine(params, x, axes, result_dtype(x, dtype))
    return affine(normalize_by(moments, axes, epsilon, dtype, x, params, None))


@explain_names
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
    exact: bool = True,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalize each feature: with the batch's own moments in training, with the running ones in inference.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    In training `mean` and `var` are those of `jbn.moments(x, axis=axis, mask=mask, axis_name=axis_name)`, the
    gradient flows through them, and the rule `update` updates the running moments by them. In inference
    `mean` and `var` are the running ones, which are constants and are returned unchanged.

    Args:
      x: samples, of any shape; floating point or complex.
      params: scale and bias in the features' shape, or scalars; None for neither. For conditional
        normalization either may have all axes of `x` and broadcast to it, as `scale[:, None, None, :]` with
        one vector per example.
      running: running moments in the features' shape.
      train: True in training, False in inference; or a traced Boolean scalar, so that one compiled function
        serves both.
      axis: the feature axis or axes; statistics reduce over every other axis.
      epsilon: added to the variance; a normal number of the dtype of the arithmetic (1.2e-38 in float32).
      update: the update rule of the running moments: `jbn.ema`, `jbn.cumulative`, `jbn.pooled`, `jbn.keep`
        or any function `(running, batch) -> running`. Whatever the rule, a feature keeps its running moments
        if it had no samples, or if the batch's or the new moments are not finite.
      mask: which positions count in the statistics: Booleans, or real weights >= 0 of any size, as
        `jbn.moments` takes them; it carries no gradient. Every position is normalized, from its own `x`.
        Where the weight is 0 and `x` is not finite, `x` acts as the mean and gets no gradient. If all weights
        are 0, mean and variance are taken to be 0: outputs are finite; mask them in the loss.
      axis_name: name or names of the axes that `jax.shard_map` or `jax.vmap` map over and that share one
        batch: one collective forward, as in `jbn.moments`, and one backward. It has no effect in inference.
        Under plain `jit`, statistics of a sharded batch are global without a name, and take one collective
        each way too; a second and third one forward only if the running mean is far from the batch's.
      axis_index_groups: a partition of the indices along the named axes; only members of one group share.
      virtual_batch_size: normalize ceil(N / virtual_batch_size) consecutive parts of the N examples each with
        its own moments (ghost batches: Hoffer et al. 2017). Their sizes differ by one at most, as in
        `numpy.array_split`. N is the size of the first axis that is not a feature axis, on each device
        separately; the running moments are updated by the merge of all parts, over `axis_name` too. Under
        plain `jit`, N over the number of devices gives local statistics. For `jax.export`, a symbolic N must
        be a multiple of the size, like "4*parts". It has no effect in inference.
      exact: whether the moments are as accurate on every platform as `jbn.moments` says. If False, a TPU
        takes one pass, about 0 and about the running mean, and selects the nearer of the two for each
        feature; its compiler fuses such sums into the matrix product that makes `x`. The rounding error of
        the variance is then that of two passes times 1 + min(mean^2, (mean - running mean)^2) / var: small as
        soon as the running mean is near, never larger than that of E[x^2] - E[x]^2, which is Flax's default,
        and the variance is never negative. On CPUs and GPUs the moments are always exact, at no cost.
      dtype: the dtype of `y`; that of `x` if None. The arithmetic is in float32 at least.

    Returns:
      `y` in the shape of `x`, and the running moments in the shapes, dtypes and shardings of those given (the
      count in the mean's shape), without gradient.

    Raises:
      TypeError: `x` is an integer array, `mask` is complex, `dtype` cannot hold the result, `update` is not
        callable or does not return moments, `train` is not a Boolean scalar, `exact` is not a Boolean,
        `epsilon` is traced, or `params` or `running` is of another type.
      ValueError: `axis` is out of range or repeated, `epsilon` is too small, `mask` does not broadcast, could
        belong to other axes, or is negative, the shape of `params` or `running` is not that of the features
        of `x`, `x` is complex and `running.mean` is not, `axis_name` is not bound, `axis_index_groups` is not
        a partition, or `virtual_batch_size` < 1.

    Warns:
      OneValueWarning: in training there is one value per feature, so that every output is the bias.

    A feature whose squared deviations overflow when they are added up (in float32, deviations from about
    1e19 / sqrt(N) on) has an infinite variance: its outputs are the bias, and its running moments stay. They
    could not hold such a variance, and scaling would take one more pass over `x`. Scale such inputs.

    `jax.experimental.jet` does not work with custom derivative rules like this one.

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
    check_update(update)
    check_train(train)
    check_exact(exact)
    check_features(x, axes, "running", running, Moments)
    check_features(x, axes, "params", params, Params, may_broadcast=True)
    epsilon = as_epsilon(epsilon, x, running.mean, running.var, params)
    params, dtype, affine = split_affine(params, x, axes, result_dtype(x, dtype))
    parts = count_parts(x, axes, virtual_batch_size)
    running = with_count_per_feature(jax.lax.stop_gradient(running))
    if isinstance(train, bool | np.bool_) and not train:
        return affine(normalize_by(running, axes, epsilon, dtype, x, params, weights)), running
    over = named_axes(axis_name, axis_index_groups)
    warn_if_single_value(x, axes, parts, over)
    traced = None if isinstance(train, bool | np.bool_) else jnp.asarray(train)
    options = Options(axes, over if parts is None else NamedAxes(), epsilon, exact, dtype)
    f = partial(normalize_batch, options)
    if parts is None and split_devices(over)[0].names:
        # JAX loses the axis name of a vmap in a custom rule that jit stages inside it. So the function is
        # differentiated without its rule there, and recomputed instead of keeping its residuals.
        f = jax.checkpoint(partial(normalize_batch_by_autodiff, options), prevent_cse=False)
    if parts is None:
        y, used, unit = f(x, params, running, weights, traced)
    else:
        y, used, unit = map_parts(f, parts, axes, x, params, running, weights, traced)
        used, unit = merge_stacked(used, unit, over)
    used = multiply_by_unit(used, unit)
    used = jax.tree.map(shard_like, used, running)
    is_whole = weights is None and parts is None and not over.names
    size = math.prod(x.shape[axis] for axis in other_axes(x.ndim, axes)) if is_whole else None
    new = apply_update_rule(update, running, used, size)
    return affine(y), new if traced is None else select(traced, new, running)
