"""How the inputs of a unit are distributed, and how that changes while the layers before it learn."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbn._axes import Axes, feature_axes, feature_shape
from jbn._dtypes import arithmetic_dtype
from jbn.inspection._vectors import norm_over


def percentiles(
    x: ArrayLike, percentages: ArrayLike | Sequence[float] = (15, 50, 85), *, axis: Axes = -1
) -> jax.Array:
    """Measure percentiles of each feature over all other axes.

    The p-th percentile is the value below which p per cent of the samples lie, with linear interpolation
    between the two nearest samples. Over the steps of a training run, they show how stable the distribution
    of a unit's inputs is.

    Args:
      x: samples, of any shape; floating point.
      percentages: (k,), each from 0 to 100.
      axis: the feature axis or axes, which are kept.

    Returns:
      (k, features...), in float32, or in the dtype of `x` where that is wider. NaN for a feature that has
      a NaN, or no samples.

    Raises:
      TypeError: `x` is complex, or an integer array.
      ValueError: `axis` is out of range or repeated, `percentages` does not have one axis, or one of them is
        not from 0 to 100 (checked only outside `jit`).

    Reference: Ioffe & Szegedy 2015, section 4.1 and figure 1(b, c).

    >>> import jax.numpy as jnp
    >>> from jbn import inspection
    >>> x = jnp.stack([jnp.arange(101.0), 10 * jnp.arange(101.0)], axis=-1)
    >>> print(inspection.percentiles(x).round(2))
    [[ 15. 150.]
     [ 50. 500.]
     [ 85. 850.]]
    """
    x = _samples("x", x)
    rows = _rows(x, feature_axes(x.ndim, axis))
    known = None if isinstance(percentages, jax.core.Tracer) else np.asarray(percentages)
    percentages = jnp.asarray(percentages, rows.dtype)
    if percentages.ndim != 1:
        raise ValueError(f"percentages has shape {percentages.shape}; expected one axis, as in (15, 50, 85).")
    if known is not None and not np.all((known >= 0) & (known <= 100)):
        raise ValueError(f"percentages={known.tolist()}; expected each from 0 to 100.")
    if not rows.shape[0]:
        return jnp.full((*percentages.shape, *rows.shape[1:]), jnp.nan, rows.dtype)
    return jnp.percentile(rows, percentages, axis=0)


def movement(before: ArrayLike, after: ArrayLike, *, axis: Axes = -1) -> jax.Array:
    """Measure how far the distribution of each feature has moved, in standard deviations of `before`.

        movement = W2(before, after) / sd(before)
        W2       = sqrt(mean((sort(before) - sort(after))^2))

    W2 is the Wasserstein-2 distance of the two sets of samples: the smallest root mean square distance by
    which the samples of one can be moved to those of the other. A shift of all samples by d gives |d| / sd; a
    change of their standard deviation about the same mean from sd to s*sd gives |s - 1|. The result does not
    depend on the order of the samples, nor on the unit in which a feature is measured.

    Args:
      before: samples, of any shape; floating point.
      after: as many samples of the same features, in the shape of `before`.
      axis: the feature axis or axes, which are kept.

    Returns:
      (features...), >= 0, in float32, or in the dtype of the samples where that is wider. It is 0 for a
      feature that did not move, even if it is constant or has no samples; infinite for a constant feature
      that moved; NaN for a feature that has a NaN, or is not finite in `before`.

    Raises:
      TypeError: an argument is complex, or an integer array.
      ValueError: the shapes differ, or `axis` is out of range or repeated.

    Reference: Peyre & Cuturi 2019, "Computational Optimal Transport", remark 2.28, for the distance; Ioffe &
    Szegedy 2015, section 4.1, for what it measures.

    >>> import jax.numpy as jnp
    >>> from jbn import inspection
    >>> x = jnp.array([[1.0, 1.0], [3.0, 3.0]])  # standard deviation 1
    >>> print(inspection.movement(x, x + jnp.array([[0.0, 0.5]])))
    [0.  0.5]
    """
    before, after = _samples("before", before), _samples("after", after)
    if after.shape != before.shape:
        raise ValueError(
            f"after has shape {after.shape}; expected that of before, {before.shape}: "
            "as many samples of the same features."
        )
    axes, wide = feature_axes(before.ndim, axis), arithmetic_dtype(before, after)
    before, after = (_rows(x.astype(wide), axes) for x in (before, after))
    distance = norm_over(jnp.sort(before, 0) - jnp.sort(after, 0), (0,))
    # Shifted by the first sample, so that a constant feature deviates by 0, and large means lose no accuracy.
    deviations = before - before[:1]
    deviations = deviations - jnp.mean(deviations, 0, keepdims=True)
    # Both are norms and not root mean squares: the number of samples cancels.
    return distance / jnp.where(distance == 0, 1, norm_over(deviations, (0,)))


def mean_slope(activation: Callable[[jax.Array], jax.Array], x: ArrayLike, *, axis: Axes = -1) -> jax.Array:
    """Measure how much of the gradient passes an activation, on average over the samples.

        mean_slope = mean(activation'(x))

    For a sigmoid it is at most 0.25, and near 0 where large inputs saturate it; for ReLU it is the fraction
    of samples for which the unit is active.

    Args:
      activation: an elementwise function, such as `jax.nn.sigmoid`.
      x: its inputs, of any shape; floating point.
      axis: the feature axis or axes, which are kept.

    Returns:
      (features...), in float32, or in the dtype of `x` where that is wider. NaN for a feature without
      samples.

    Raises:
      TypeError: `x` or the result of `activation` is complex, or an integer array.
      ValueError: `activation` changes the shape, or `axis` is out of range or repeated.

    Reference: Ioffe & Szegedy 2015, section 1, on saturation.

    >>> import jax, jax.numpy as jnp
    >>> from jbn import inspection
    >>> x = jnp.array([[0.0, 20.0], [0.0, -20.0]])
    >>> print(inspection.mean_slope(jax.nn.sigmoid, x).round(4))
    [0.25 0.  ]
    """
    x = _samples("x", x)
    axes = feature_axes(x.ndim, axis)
    x = x.astype(arithmetic_dtype(x))
    y, slopes = jax.jvp(activation, (x,), (jnp.ones_like(x),))
    y = _samples("activation(x)", y)
    if y.shape != x.shape:
        raise ValueError(f"activation(x) has shape {y.shape}; expected that of x, {x.shape}: elementwise.")
    return jnp.mean(_rows(slopes.astype(x.dtype), axes), 0)


def _samples(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected a real floating point dtype. "
            f"Convert it first, as in {name}.astype(jnp.float32)."
        )
    return x


def _rows(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return the samples as (n, features...), in float32 at least."""
    shape = feature_shape(x, axes)
    x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    n = math.prod(x.shape[: x.ndim - len(axes)])
    return x.reshape(n, *shape).astype(arithmetic_dtype(x))
