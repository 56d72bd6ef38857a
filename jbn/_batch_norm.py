"""Batch normalization and batch renormalization as pure functions."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

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
    count_domains,
    result_dtype,
)
from jbn._collectives import AxisName, NamedAxes, named_axes, split_devices
from jbn._domains import as_domain
from jbn._normalization import Context, Options, normalize_batch, normalize_batch_by_autodiff, normalize_by
from jbn._params import Params, split_affine
from jbn._renorm import Limits, as_limits, none_without_effect, only_where
from jbn._running import UpdateRule, discards_initial, ema
from jbn._sharding import shard_like
from jbn._spelling import explain_names
from jbn._statistics import Moments, merge_stacked, multiply_by_unit, select, with_count_per_feature
from jbn._update import apply_update_rule
from jbn._virtual_batches import count_parts, map_parts
from jbn._warnings import warn_if_single_value


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
    domain: ArrayLike | None = None,
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
      domain: for a batch of several kinds of examples, the index of each one's, (N,) integers, N being the
        size of the first axis that is not a feature axis; or that of all, (). Running moments have a leading
        axis of domains, as `jbn.init((domains, features))[1]` has it, and scale and bias may have it. Each
        example is normalized with the moments of its own domain, and updates them, and a domain that the
        batch has no example of keeps its moments. The result is that of a call for each domain, in one pass.
        An index that is out of range is an error, or makes NaN of its example where it is traced. Scale and
        bias of shape (domains, features) are by domain, even if `x` has that shape too.

    Returns:
      `y` in the shape of `x`, and the running moments in the shapes, dtypes and shardings of those given (the
      count in the mean's shape), without gradient.

    Raises:
      TypeError: `x` is an integer array, `mask` is complex, `dtype` cannot hold the result, `update` is not
        callable or does not return moments, `train` is not a Boolean scalar, `exact` is not a Boolean,
        `epsilon` is traced, `domain` holds no integers, or `params` or `running` is of another type.
      ValueError: `axis` is out of range or repeated, `epsilon` is too small, `mask` does not broadcast, could
        belong to other axes, or is negative, the shape of `params` or `running` is not that of the features
        of `x`, `x` is complex and `running.mean` is not, `axis_name` is not bound, `axis_index_groups` is not
        a partition, `virtual_batch_size` < 1, or `domain` is out of range or of another shape.

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
    return _batch_norm(
        x,
        params,
        running,
        limits=None,
        train=train,
        axis=axis,
        epsilon=epsilon,
        update=update,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        exact=exact,
        dtype=dtype,
        domain=domain,
    )


@explain_names
def batch_renorm(
    x: ArrayLike,
    params: Params | None,
    running: Moments,
    *,
    train: ArrayLike,
    r_max: ArrayLike = 3.0,
    d_max: ArrayLike = 5.0,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    update: UpdateRule = ema(0.99),
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    virtual_batch_size: int | None = None,
    exact: bool = True,
    dtype: DTypeLike | None = None,
    domain: ArrayLike | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalize as `jbn.batch_norm`, and in training correct the batch's moments towards the running ones.

        y = ((x - mean_B) / sd_B * r + d) * scale + bias
        r = clip(sd_B / sd, 1 / r_max, r_max);  d = clip((mean_B - mean) / sd, -d_max, d_max)

    mean_B and sd_B = sqrt(var_B + epsilon) are those of the batch, mean and sd of the running moments before
    the update. Within the limits `y` is what inference gives for the same `x`, so that training in small
    batches, or in batches whose examples are alike, sees what inference will see. r and d are constants to
    gradients, which flow through mean_B and sd_B as in batch normalization; so those of a feature without
    variance are finite. In inference, and with `r_max=1, d_max=0`, it is `jbn.batch_norm`, bit for bit.

    The running moments have to be near those of the data before they can correct anything. So begin with
    `r_max=1, d_max=0`, and raise the limits later, for example by `jbn.renorm_limits`; the modules' `renorm`
    takes such a schedule. Running moments of no samples, a count of 0 in a rule that discards them, correct
    nothing.

    Args:
      x, params, running, train: those of `jbn.batch_norm`.
      r_max: the largest ratio of standard deviations that is corrected, >= 1; a number or a traced scalar.
      d_max: the largest distance of means that is corrected, in running standard deviations, >= 0; a number
        or a traced scalar. For complex `x` it is that of |d|.
      axis, epsilon, update, mask, axis_name, axis_index_groups, virtual_batch_size, exact, dtype, domain:
        those of `jbn.batch_norm`. Each ghost batch is corrected by itself, each domain by its own moments.

    Returns:
      `y` in the shape of `x`, and the running moments, which are those of `jbn.batch_norm`.

    Raises:
      TypeError: a limit is not a number, or as `jbn.batch_norm`.
      ValueError: `r_max` < 1, `d_max` < 0, one of them is an array of several, or as `jbn.batch_norm`.

    Reference: Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
    Models", Algorithm 1.

    >>> import jax.numpy as jnp, jbn
    >>> running = jbn.Moments(mean=jnp.array([2.0]), var=jnp.array([4.0]))
    >>> x = jnp.array([[1.0], [3.0], [5.0]])
    >>> y, _ = jbn.batch_renorm(x, None, running, train=True)
    >>> print(y.ravel().round(4), ((x - 2) / 2).ravel())
    [-0.5  0.5  1.5] [-0.5  0.5  1.5]
    """
    return _batch_norm(
        x,
        params,
        running,
        limits=none_without_effect(as_limits(r_max, d_max)),
        train=train,
        axis=axis,
        epsilon=epsilon,
        update=update,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        exact=exact,
        dtype=dtype,
        domain=domain,
    )


def _batch_norm(
    x: Any,
    params: Params | None,
    running: Moments,
    *,
    limits: Limits | None,
    train: Any,
    axis: Axes,
    epsilon: float,
    update: UpdateRule,
    mask: Any,
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    virtual_batch_size: int | None,
    exact: bool,
    dtype: DTypeLike | None,
    domain: Any,
) -> tuple[jax.Array, Moments]:
    x = as_samples(x)
    axes = feature_axes(x.ndim, axis)
    weights = as_weights(mask, x)
    params = Params(None, None) if params is None else params
    check_update(update)
    check_train(train)
    check_exact(exact)
    domains = count_domains(domain, axes, running)
    check_features(x, axes, "running", running, Moments, domains=domains)
    check_features(x, axes, "params", params, Params, may_broadcast=True, domains=domains)
    epsilon = as_epsilon(epsilon, x, running.mean, running.var, params)
    index = None if domains is None else as_domain(domain, x, axes, domains)
    shape = np.shape(running.mean)
    params, dtype, affine = split_affine(params, x, axes, result_dtype(x, dtype), shape, index)
    parts = count_parts(x, axes, virtual_batch_size)
    running = with_count_per_feature(jax.lax.stop_gradient(running))
    if isinstance(train, bool | np.bool_) and not train:
        return affine(normalize_by(running, axes, epsilon, dtype, x, params, weights, index)), running
    over = named_axes(axis_name, axis_index_groups)
    warn_if_single_value(x, axes, parts, over)
    traced = None if isinstance(train, bool | np.bool_) else jnp.asarray(train)
    if limits is not None and traced is not None:
        limits = only_where(traced, limits)  # on a GPU sd / sd may be other than 1
    if limits is not None and discards_initial(update):
        limits = only_where(running.count > 0, limits)
    context = Context(running, weights, traced, limits, index)
    options = Options(axes, over if parts is None else NamedAxes(), epsilon, exact, dtype)
    f = partial(normalize_batch, options)
    if parts is None and split_devices(over)[0].names:
        # JAX loses the axis name of a vmap in a custom rule that jit stages inside it. So the function is
        # differentiated without its rule there, and recomputed instead of keeping its residuals.
        f = jax.checkpoint(partial(normalize_batch_by_autodiff, options), prevent_cse=False)
    if parts is None:
        y, used, unit = f(x, params, context)
    else:
        y, used, unit = map_parts(f, parts, axes, x, params, context)
        used, unit = merge_stacked(used, unit, over)
    used = multiply_by_unit(used, unit)
    used = jax.tree.map(shard_like, used, running)
    is_whole = weights is None and parts is None and index is None and not over.names
    size = math.prod(x.shape[axis] for axis in other_axes(x.ndim, axes)) if is_whole else None
    new = apply_update_rule(update, running, used, size)
    return affine(y), new if traced is None else select(traced, new, running)
