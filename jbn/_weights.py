"""Sums and averages of weighted arrays. Weights of None count every position as 1."""

import jax
import jax.numpy as jnp


def weigh(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Multiply by the weights."""
    return values if weights is None else values * weights.astype(values.dtype)


def where_counted(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Replace values of weight 0 by 0, so that NaN there reaches neither results nor derivatives."""
    return values if weights is None else jnp.where(weights.astype(bool), values, 0)


def where_finite(values: jax.Array) -> jax.Array:
    """Replace infinities and NaN by 0."""
    return jnp.where(jnp.isfinite(values), values, 0)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divide by a total weight; where that is 0, by 1, so that 0 / 0 is 0 and has a finite derivative."""
    return numerator / jnp.where(denominator > 0, denominator, 1).astype(numerator.dtype)


def share_of(count: jax.Array | int, values: jax.Array) -> jax.Array | float:
    """Return 1 / count, the factor that makes a sum of such values an average; 1 where the count is 0."""
    if isinstance(count, int):
        return 1 / max(count, 1)
    return ratio(jnp.ones_like(count), count).astype(values.dtype)


def power_of_two(count: jax.Array) -> jax.Array:
    """Return a power of two near a total weight: dividing weights by it is exact and keeps sums in range.

    It stays in the range of the dtype: close to the smallest number for 0, to the largest for infinity.
    """
    finfo = jnp.finfo(count.dtype)
    most = 2.0 ** (finfo.maxexp - 2)
    return jax.lax.reduce_precision(jnp.clip(count, 1 / most, most), finfo.nexp, 0)


def abs_squared(x: jax.Array) -> jax.Array:
    """Return |x|^2, which is real for complex `x` too."""
    return jnp.real(x * jnp.conj(x))
