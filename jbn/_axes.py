"""Which axes of an array hold features, and how per-feature values line up with the array."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Axes = int | Sequence[int]


def feature_axes(ndim: int, axis: Axes) -> tuple[int, ...]:
    """Return the feature axes as sorted, non-negative numbers.

    Per-feature arrays list their axes in this order: for `x` of shape (N, H, W, C) and `axis=(-1, 1)`
    they have shape (H, C).

    Raises:
      ValueError: an axis is out of range, or named twice.
      TypeError: an axis is not an integer.
    """
    try:
        axes = [operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,))]
    except TypeError:
        raise TypeError(f"axis={axis!r}; expected an integer, or a sequence of integers.") from None
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis={axis} is out of range for x with {ndim} dimensions; "
                f"expected feature axes from {-ndim} to {ndim - 1}."
            )
    axes = sorted(a % ndim for a in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis={axis} names a feature axis twice; expected each one once.")
    return tuple(axes)


def feature_shape(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of per-feature values for samples `x`."""
    return tuple(x.shape[a] for a in axes)


def other_axes(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes that statistics reduce over: all that are not feature axes."""
    return tuple(a for a in range(ndim) if a not in axes)


def expand(values: jax.Array, ndim: int, axes: tuple[int, ...]) -> jax.Array:
    """Insert an axis of size 1 for each reduced axis, so that per-feature values broadcast to `x`."""
    return jnp.expand_dims(values, other_axes(ndim, axes))


def batch_axis(ndim: int, axes: tuple[int, ...]) -> int:
    """Return the axis of the examples: the first that is not a feature axis."""
    return other_axes(ndim, axes)[0]
