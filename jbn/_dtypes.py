"""Which dtypes to compute in, under any of JAX's promotion modes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def promote(*values: ArrayLike | DTypeLike) -> np.dtype:
    """Return the dtype that arrays or dtypes promote to, under `jax_numpy_dtype_promotion="strict"` too.

    Floats of 8 bits or fewer, which JAX does not promote implicitly, promote as bfloat16 does: it holds each
    of their values.
    """
    with jax.numpy_dtype_promotion("standard"):
        if len({jnp.result_type(value) for value in values}) == 1:
            return jnp.result_type(*values)
        return jnp.result_type(*(jnp.bfloat16 if is_narrow(value) else value for value in values))


def arithmetic_dtype(*values: ArrayLike | DTypeLike) -> np.dtype:
    """Return the dtype to compute in: wide enough for every argument, and float32 at least."""
    return promote(jnp.float32, *values)


def widen(x: jax.Array) -> jax.Array:
    """Convert to the dtype to compute in."""
    return x.astype(arithmetic_dtype(x))


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the dtype of the real part: float32 for complex64; a real dtype itself."""
    return np.finfo(dtype).dtype if np.issubdtype(dtype, np.complexfloating) else np.dtype(dtype)


def is_narrow(value: ArrayLike | DTypeLike) -> bool:
    """Return whether an array or a dtype is a float of 8 bits or fewer."""
    dtype = jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8
