"""Moments: measuring the mean and the variance of a set of samples, and merging those of several sets."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jbn._axes import Axes, feature_axes, other_axes
from jbn._checks import as_samples, as_weights
from jbn._collectives import AxisName, NamedAxes, named_axes
from jbn._domains import at_samples
from jbn._dtypes import arithmetic_dtype, real_dtype
from jbn._merging import Part, merge_named, merge_rows
from jbn._samples import measure_samples
from jbn._weights import power_of_two


class Moments(NamedTuple):
    """Mean, biased variance and total weight of a set of samples, feature by feature.

    One type for the statistics of a mini-batch and for running statistics. What a running `count` counts is
    up to the update rule (`jbn.ema`, `jbn.cumulative`, `jbn.pooled`). A count of 0, the default, is that of
    no samples: to merge moments from elsewhere, give them one.
    """

    mean: jax.Array  # (features...), float32 or wider; complex for complex samples
    var: jax.Array  # (features...), real, >= 0: mean of |x - mean|^2, no Bessel correction
    # (features...), real, >= 0: the number of samples, or their weight
    count: jax.Array = 0  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]


def moments(
    x: ArrayLike,
    *,
    axis: Axes = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Measure the mean and the biased variance of each feature over all other axes.

        count = sum(mask)
        mean  = sum(mask * x) / count
        var   = sum(mask * |x - mean|^2) / count

    A large mean costs no accuracy. Both are measured about a shift c, and the rounding error of the variance
    is that of a two-pass algorithm times 1 + (mean - c)^2 / var. That factor is at most 10 on a CPU, and of
    an array that the compiler shards (c is 0, or else the samples are read once more). Elsewhere it is 1 with
    a mask, which takes two passes; without one, c is the mean of a pilot, 64 of N samples, and the factor
    hardly more than 2 for samples in random order, and at most N/64 in any. `jbn/_samples.py` has a table.
    Where `count` is 0, all three are 0, the identity of `jbn.merge`. A variance beyond the dtype's range is
    infinite.

    With `axis_name`, moments are those of all devices' samples together: each device measures its own, and
    `jbn.merge` merges them by count, so that unequal masks and empty shards are exact. It takes one
    collective of 4 D values per feature for D devices, or three of fewer values where that is cheaper.

    Args:
      x: samples, of any shape; floating point or complex.
      axis: the feature axis or axes, which are kept; statistics reduce over every other axis.
      mask: which positions count: Booleans, or real weights >= 0 (a weight of 2 is the sample twice), of any
        size: only their ratios matter to mean and variance. It carries no gradient, and must broadcast to
        `x`: fewer axes are the last ones; if they could be the first ones too, it is an error. Positions with
        weight 0 may hold anything, NaN included, which reaches no result.
      axis_name: name or names of the axes that `jax.shard_map` or `jax.vmap` map over and that share one
        batch. A `vmap` axis inside a `shard_map` needs `check_vma=False` there.
      axis_index_groups: a partition of the indices along the named axes; only members of one group share.

    Returns:
      Moments in the features' shape and in float32, or in the dtype of `x` where that is wider; variance and
      count are real. They carry the gradient to `x`.

    Raises:
      TypeError: `x` is an integer array, or `mask` is complex.
      ValueError: `axis` is out of range or repeated, `mask` does not broadcast, could belong to other axes,
        or is negative, `axis_name` is not bound, or `axis_index_groups` is not a partition.

    Reference: Ioffe & Szegedy 2015, Algorithm 1, lines 1 and 2.

    >>> import jax, jax.numpy as jnp, jbn
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> batch = jbn.moments(x)
    >>> print(batch.mean, batch.var, batch.count)
    [ 2. 20.] [  1. 100.] [2. 2.]
    >>> per_example = jax.vmap(lambda x: jbn.moments(x, axis_name="batch").mean, axis_name="batch")
    >>> print(per_example(x))
    [[ 2. 20.]
     [ 2. 20.]]
    """
    x = as_samples(x)
    axes = feature_axes(x.ndim, axis)
    return multiply_by_unit(*measure(x, axes, as_weights(mask, x), named_axes(axis_name, axis_index_groups)))


def measure(
    x: jax.Array,
    axes: tuple[int, ...],
    weights: jax.Array | None,
    over: NamedAxes = NamedAxes(),
    *,
    shift: jax.Array | None = None,
    exact: bool = True,
    epsilon: float = 0.0,
    domain: jax.Array | None = None,
) -> tuple[Moments, jax.Array | None]:
    """Measure moments from checked arguments, with the options of `measure_samples`.

    With `domain`, an index from `as_domain`, those of each domain, in the shape of `shift`.

    Returns:
      The moments, whose count is that of `divide_by_unit(weights, unit, axes, domain)`, and this unit in the
      shape of the moments; None for 1.
    """
    reduced = other_axes(x.ndim, axes)
    part = measure_samples(x, weights, reduced, shift=shift, exact=exact, epsilon=epsilon, index=domain)
    part = merge_named(part, over)
    return _moments(part), part.unit


def divide_by_unit(
    weights: jax.Array | None,
    unit: jax.Array | None,
    axes: tuple[int, ...],
    domain: jax.Array | None = None,
) -> jax.Array | None:
    """Divide weights by their unit, a power of two per feature."""
    if weights is None or unit is None:
        return weights
    return weights * at_samples(1 / unit, weights.ndim, axes, domain)


def multiply_by_unit(m: Moments, unit: jax.Array | None) -> Moments:
    """Multiply a count by its unit; beyond the dtype's range it becomes the largest number."""
    if unit is None:
        return m
    count = m.count * unit.astype(m.count.dtype)
    return m._replace(count=jnp.minimum(count, jnp.finfo(count.dtype).max))


def in_units_of_1(part: Part) -> Part:
    """Count the samples of a part in units of 1."""
    count = multiply_by_unit(_moments(part), part.unit).count
    return part._replace(count=count, unit=None)


def merge(*parts: Moments) -> Moments:
    """Merge the moments of disjoint sets of samples into the moments of their union, exactly.

        n    = n1 + n2;  d = mean2 - mean1;  w = n2 / n
        mean = mean1 + w*d
        var  = (1-w)*var1 + w*var2 + w*(1-w)*|d|^2

    The operation is associative and commutative, and a part with count 0 is its identity, whatever mean and
    variance that part holds. Counts may be of any size and ratio. Their sum is rounded to float32, and
    saturates at the largest number.

    Args:
      *parts: one or more moments of the same features. A scalar count holds for every feature.

    Returns:
      The moments of all samples together, in float32 at least.

    Raises:
      TypeError: an argument is not `Moments`.
      ValueError: no moments were given, or of different shapes.

    Reference: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> whole = jbn.merge(jbn.moments(x[:2]), jbn.moments(x[2:]))
    >>> print(whole.mean, whole.var, whole.count)
    [4. 5.] [8. 8.] [5. 5.]
    """
    if not parts:
        raise ValueError("merge got no moments; expected one or more.")
    for part in parts:
        if not isinstance(part, Moments):
            raise TypeError(f"merge got a {type(part).__name__}; expected jbn.Moments, each as an argument.")
        features = np.shape(parts[0].mean)
        for field, leaf in part._asdict().items():
            if np.shape(leaf) != features and not (field == "count" and np.shape(leaf) == ()):
                raise ValueError(
                    f"merge got a {field} of shape {np.shape(leaf)}; expected {features}, as the first mean."
                )
    wide = arithmetic_dtype(*(part.mean for part in parts), *(part.var for part in parts))
    widened = [with_count_per_feature(cast(part, wide)) for part in parts]
    return merge_rows_of(jax.tree.map(lambda *leaves: jnp.stack(leaves), *widened))


def merge_rows_of(stacked: Moments) -> Moments:
    """Merge moments that are stacked along a first axis."""
    unit = power_of_two(stacked.count)
    return multiply_by_unit(*merge_stacked(stacked._replace(count=stacked.count / unit), unit))


def merge_stacked(
    parts: Moments, unit: jax.Array | None, over: NamedAxes = NamedAxes()
) -> tuple[Moments, jax.Array | None]:
    """Merge moments that are stacked along a first axis, and then those of all members of a group.

    Their counts are in a unit, as those of `measure` are, and so is that of the result.
    """
    part = Part(parts.mean, jnp.zeros_like(parts.mean), parts.var, parts.count, unit)
    whole = merge_named(merge_rows(part), over)
    return _moments(whole), whole.unit


def with_count_per_feature(m: Moments) -> Moments:
    """Broadcast the count to the shape of the mean."""
    var, count = jnp.asarray(m.var), jnp.asarray(m.count)
    # A sum, so that it has the sharding of the variance too.
    dtype = count.dtype if jnp.issubdtype(count.dtype, jnp.floating) else var.dtype
    count = jnp.zeros_like(var, dtype) + jnp.expand_dims(count.astype(dtype), range(var.ndim - count.ndim))
    return Moments(jnp.asarray(m.mean), var, count)


def cast(m: Moments, dtype: DTypeLike) -> Moments:
    """Convert the mean to a dtype, variance and count to the dtype of its real part."""
    real = real_dtype(dtype)
    return Moments(jnp.asarray(m.mean, dtype), jnp.asarray(m.var, real), jnp.asarray(m.count, real))


def zero_mean_where_var_is_inf(m: Moments) -> Moments:
    """Set the mean to 0 where the variance is infinite: finite samples then normalize to 0, not to NaN."""
    return m._replace(mean=jnp.where(m.var == jnp.inf, 0, m.mean))


def select(condition: ArrayLike, a: Moments, b: Moments) -> Moments:
    """Select `a` where `condition` holds and `b` elsewhere, feature by feature."""
    return jax.tree.map(lambda p, q: jnp.where(condition, p, q), a, b)


def _moments(part: Part) -> Moments:
    return Moments(part.mean + part.mean_low, part.var, part.count)
