"""Stochastic rounding: sums of small steps, right on average where rounding to nearest loses each step."""

import jax
import jax.numpy as jnp
import numpy as np


def add(
    values: tuple[jax.Array, ...], steps: tuple[jax.Array, ...], noise: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Add a step to each value, and round each sum up or down, with probabilities by distance.

    Args:
      values: real or complex, all of one shape.
      steps: likewise.
      noise: in [0, 1), of that shape; None rounds to nearest.

    Reference: Connolly, Higham & Mary 2021, "Stochastic rounding and its probabilistic backward error
    analysis".
    """
    if noise is None:
        return tuple(value + step for value, step in zip(values, steps))
    x, step = _real(values), _real(steps)
    nearest = x + step
    # The rounding error, exactly (Knuth's two-sum).
    moved = nearest - x
    lost = (x - (nearest - moved)) + (step - moved)
    towards = jnp.where((lost > 0) == (nearest > 0), jnp.int32(1), jnp.int32(-1))
    bits = jax.lax.bitcast_convert_type(nearest, jnp.int32)
    beyond = jax.lax.bitcast_convert_type(bits + towards, jnp.float32)
    parts = iter(jnp.where(noise[None] * jnp.abs(beyond - nearest) < jnp.abs(lost), beyond, nearest))
    return tuple(
        jax.lax.complex(next(parts), next(parts)) if jnp.iscomplexobj(value) else next(parts)
        for value in values
    )


def random_numbers(*values: jax.Array) -> jax.Array | None:
    """Return pseudorandom numbers in [0, 1), a hash of float32 arrays of one shape.

    Without state or key: all devices that hold the same values get the same numbers. None for float64, whose
    precision suffices.
    """
    parts = _real(values)
    if parts.dtype != jnp.float32:
        return None
    # A multiplicative hash of the bits, with the golden ratio's constant (Knuth) and its odd multiples.
    odd = np.uint32(0x9E3779B1) * (2 * np.arange(len(parts), dtype=np.uint32) + 1)
    factors = odd.reshape(-1, *(1,) * (parts.ndim - 1))
    state = jnp.sum(jax.lax.bitcast_convert_type(parts, jnp.uint32) * factors, 0, dtype=jnp.uint32)
    for _ in range(2):
        state = (state ^ (state >> 15)) * odd[0]
    return (state >> 8).astype(jnp.float32) * 2.0**-24


def _real(values):
    """Stack real and imaginary parts along a new first axis."""
    parts = [p for v in values for p in ((v.real, v.imag) if jnp.iscomplexobj(v) else (v,))]
    return jnp.stack(parts)
