"""Stochastic rounding: sums of many small steps, right on average where rounding would lose each step."""

from typing import Any

import jax
import jax.numpy as jnp


def add(x: jax.Array, step: jax.Array, noise: jax.Array | None) -> jax.Array:
    """Adds a step; what the sum has no room for decides how likely it is rounded away from the nearest.

    Args:
      x: real or complex.
      step: likewise.
      noise: in [0, 1), in the shape of `x`; None rounds to the nearest.

    Reference: Connolly, Higham & Mary 2021, "Stochastic rounding and its probabilistic backward error
    analysis".
    """
    if noise is None:
        return x + step
    if jnp.iscomplexobj(x):
        return jax.lax.complex(add(x.real, step.real, noise), add(x.imag, step.imag, noise))
    nearest = x + step
    # What was rounded away, exactly (Knuth's two-sum).
    moved = nearest - x
    lost = (x - (nearest - moved)) + (step - moved)
    beyond = jnp.nextafter(nearest, jnp.where(lost > 0, jnp.inf, -jnp.inf).astype(nearest.dtype))
    return jnp.where(noise * jnp.abs(beyond - nearest) < jnp.abs(lost), beyond, nearest)


def random_bits(*values: Any) -> jax.Array | None:
    """Returns numbers in [0, 1) that are a function of float32 arrays of one shape, and look random.

    No state and no key: whoever computes with the same values gets the same numbers. None for float64, which
    has room enough.
    """
    state = jnp.uint32(0)
    for leaf in jax.tree.leaves(values):
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            if part.dtype != jnp.float32:
                return None
            state = _mixed(state ^ jax.lax.bitcast_convert_type(part, jnp.uint32))
    return (_mixed(state) >> 8).astype(jnp.float32) * 2.0**-24


def _mixed(state):
    """One round of a multiplicative hash (the constant is the golden ratio's, as Knuth proposes)."""
    state = state * jnp.uint32(0x9E3779B1)
    return state ^ (state >> 15)
