"""Which axes of an array hold features, and how per-feature values line up with the array."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

Axes = int | Sequence[int]


def feature_axes(ndim: int, axis: Axes) -> tuple[int, ...]:
    """Returns the feature axes as sorted, non-negative numbers.

    Per-feature arrays list their axes in this order: for `x` of shape (N, H, W, C) and `axis=(-1, 1)`
    they have shape (H, C).

    Raises:
      ValueError: an axis is out of range, or named twice.
      TypeError: an axis is not an integer.
    """
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    axes = [operator.index(a) for a in given]
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis={axis} is out of range for x with {ndim} dimensions; "
                f"wanted feature axes from {-ndim} to {ndim - 1}."
            )
    axes = sorted(a % ndim for a in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis={axis} names a feature axis twice; wanted each one once.")
    return tuple(axes)


def other_axes(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes that statistics reduce over: all that are not feature axes."""
    return tuple(a for a in range(ndim) if a not in axes)


def expand(values: jax.Array, ndim: int, axes: tuple[int, ...]) -> jax.Array:
    """Gives per-feature values an axis of size 1 for each reduced axis, so that they broadcast to `x`."""
    return jnp.expand_dims(values, other_axes(ndim, axes))


def promote(*values: ArrayLike | DTypeLike) -> np.dtype:
    """Returns the dtype that arrays or dtypes promote to, under `jax_numpy_dtype_promotion="strict"` too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


def arithmetic_dtype(*values: ArrayLike | DTypeLike) -> np.dtype:
    """Returns the dtype to compute in: wide enough for every argument, and float32 at least."""
    return promote(jnp.float32, *values)


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype of the real part: float32 for complex64, and for real dtypes the same."""
    return np.finfo(dtype).dtype if np.issubdtype(dtype, np.complexfloating) else np.dtype(dtype)


def as_samples(x: ArrayLike) -> jax.Array:
    """Returns `x` as a JAX array of floating point or complex numbers.

    Raises:
      TypeError: `x` holds integers or Booleans.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"x has dtype {x.dtype}; wanted a floating point or complex dtype. "
            "Convert it first, as in x.astype(jnp.float32)."
        )
    return x


def as_weights(mask: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """Returns `mask` with as many axes as `x`, without a gradient; None stays None.

    Raises:
      ValueError: `mask` does not broadcast to `x`, or holds a weight that is negative or NaN (seen only
        outside `jit`).
      TypeError: `mask` is complex.
    """
    if mask is None:
        return None
    known = None if isinstance(mask, jax.core.Tracer) else np.asarray(mask)
    mask = jnp.asarray(mask)
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(f"mask has dtype {mask.dtype}; wanted Booleans or real weights.")
    shape = (1,) * (x.ndim - mask.ndim) + mask.shape
    if len(shape) != x.ndim or any(m not in (1, n) for m, n in zip(shape, x.shape)):
        raise ValueError(
            f"mask of shape {mask.shape} does not broadcast to x of shape {x.shape}; give it one value for "
            "each position, or size 1 along the axes that share a value, as in mask[:, None]."
        )
    if known is not None and not np.all(known >= 0):
        raise ValueError("mask holds a weight that is negative or NaN; wanted weights >= 0.")
    return jax.lax.stop_gradient(mask.reshape(shape))
