"""Moments: measuring the mean and the variance of a set of samples, and merging those of several sets."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jbn.axes import Axes, expand, feature_axes, other_axes
from jbn.checks import as_samples, as_weights
from jbn.dtypes import arithmetic_dtype, real_dtype


class Moments(NamedTuple):
    """Mean, biased variance and total weight of a set of samples, feature by feature.

    One type for the statistics of a mini-batch and for running statistics. What a running `count` counts is
    up to the update rule (`jbn.ema`, `jbn.cumulative`, `jbn.pooled`).
    """

    mean: jax.Array  # (features...), float32 or wider; complex for complex samples
    var: jax.Array  # (features...), real, >= 0: mean of |x - mean|^2, no Bessel correction
    count: jax.Array  # (features...), real, >= 0: the number of samples, or the sum of their weights


def moments(x: ArrayLike, *, axis: Axes = -1, mask: ArrayLike | None = None) -> Moments:
    """Measures the mean and the biased variance of each feature over all other axes.

        count = sum(mask)
        mean  = sum(mask * x) / count
        var   = sum(mask * |x - mean|^2) / count

    The variance is centred on the mean before squaring, so a large mean costs no more accuracy than its own
    rounding. Where `count` is 0 all three are 0, which is the identity of `jbn.merge`.

    Args:
      x: samples, of any shape; floating point or complex.
      axis: the feature axis or axes, which are kept; statistics reduce over every other axis.
      mask: which positions count: Booleans, or real weights >= 0 (a weight of 2 is the sample twice). It must
        broadcast to `x` and carries no gradient. Positions with weight 0 may hold anything, NaN included.

    Returns:
      Moments in the features' shape and in float32, or in the dtype of `x` where that is wider; variance and
      count are real. They carry the gradient to `x`.

    Raises:
      TypeError: `x` is an integer array, or `mask` is complex.
      ValueError: `axis` is out of range or repeated, or `mask` does not broadcast or is negative.

    Reference: Ioffe & Szegedy 2015, Algorithm 1, lines 1 and 2.

    >>> import jax.numpy as jnp, jbn
    >>> batch = jbn.moments(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> print(batch.mean, batch.var, batch.count)
    [ 2. 20.] [  1. 100.] [2. 2.]
    """
    x = as_samples(x)
    axes = feature_axes(x.ndim, axis)
    weights = as_weights(mask, x)
    x = where_counted(x.astype(arithmetic_dtype(x)), weights)
    count = _count(weights, x, axes)
    mean = ratio(weighted_sum(x, weights, axes), count)
    centred = where_counted(x - expand(mean, x.ndim, axes), weights)
    var = ratio(weighted_sum(abs_squared(centred), weights, axes), count)
    return Moments(mean, var, count)


def merge(*parts: Moments) -> Moments:
    """Merges the moments of disjoint sets of samples into the moments of their union, exactly.

        n    = n1 + n2;  d = mean2 - mean1;  w = n2 / n
        mean = mean1 + w*d
        var  = (1-w)*var1 + w*var2 + w*(1-w)*|d|^2

    The operation is associative and commutative, and a part with count 0 is its identity, whatever mean and
    variance that part holds.

    Args:
      *parts: one or more moments of the same features. A scalar count holds for every feature.

    Returns:
      The moments of all samples together, in float32 at least.

    Raises:
      ValueError: no moments were given.

    Reference: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> whole = jbn.merge(jbn.moments(x[:2]), jbn.moments(x[2:]))
    >>> print(whole.mean, whole.var, whole.count)
    [4. 5.] [8. 8.] [5. 5.]
    """
    if not parts:
        raise ValueError("merge got no moments; wanted one or more.")
    wide = arithmetic_dtype(*(part.mean for part in parts), *(part.var for part in parts))
    return functools.reduce(_merge_two, (with_count_per_feature(cast(part, wide)) for part in parts))


def _merge_two(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    weight = ratio(b.count, count)
    difference = b.mean - a.mean
    mean = a.mean + weight.astype(difference.dtype) * difference
    var = (1 - weight) * a.var + weight * b.var + weight * (1 - weight) * abs_squared(difference)
    return select(a.count == 0, b, select(b.count == 0, a, Moments(mean, var, count)))


def with_count_per_feature(m: Moments) -> Moments:
    """Returns the same moments with the count broadcast to the mean's shape."""
    mean, var = jnp.asarray(m.mean), jnp.asarray(m.var)
    return Moments(mean, var, jnp.broadcast_to(jnp.asarray(m.count, var.dtype), mean.shape))


def cast(m: Moments, dtype: DTypeLike) -> Moments:
    """Converts the mean to a dtype, variance and count to its real part's."""
    real = real_dtype(dtype)
    return Moments(jnp.asarray(m.mean, dtype), jnp.asarray(m.var, real), jnp.asarray(m.count, real))


def select(condition: ArrayLike, a: Moments, b: Moments) -> Moments:
    """Takes, feature by feature, `a` where `condition` holds and `b` elsewhere."""
    return jax.tree.map(lambda p, q: jnp.where(condition, p, q), a, b)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides by a total weight; nothing over nothing is 0 and has a finite derivative."""
    return numerator / jnp.where(denominator > 0, denominator, 1).astype(numerator.dtype)


def abs_squared(x: jax.Array) -> jax.Array:
    """Computes |x|^2, which is real for complex `x` too."""
    return jnp.real(x * jnp.conj(x))


def where_counted(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Puts 0 where the weight is 0, so that no NaN held there reaches a value or a derivative."""
    return x if weights is None else jnp.where(weights.astype(bool), x, 0)


def weighted_sum(x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Sums over all but the feature axes."""
    weighted = x if weights is None else x * weights.astype(x.dtype)
    return jnp.sum(weighted, other_axes(x.ndim, axes))


def _count(weights: jax.Array | None, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    if weights is None:
        weights = jnp.ones((1,) * x.ndim, bool)
    reduced = other_axes(x.ndim, axes)
    # A weight that is shared along an axis is summed once and multiplied: exact for more samples than
    # float32 can count one by one.
    shared = math.prod(x.shape[a] for a in reduced if weights.shape[a] == 1)
    total = jnp.sum(weights, reduced, dtype=real_dtype(x.dtype)) * shared
    return jnp.broadcast_to(total, tuple(x.shape[a] for a in axes))
