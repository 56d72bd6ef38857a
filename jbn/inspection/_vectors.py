"""Pytrees of real arrays as vectors: their norm, difference and angle."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jbn._dtypes import arithmetic_dtype


def as_vector(name: str, tree: Any) -> Any:
    """Return the pytree with JAX arrays as leaves, each in its own dtype.

    Raises:
      TypeError: a leaf is not real and floating point.
      ValueError: there is no leaf.
    """
    if not jax.tree.leaves(tree):
        raise ValueError(f"{name} has no leaves; expected a pytree with one array or more.")

    def as_leaf(path, leaf):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {dtype}; expected a real floating point "
                "dtype. Leave out what gradient descent does not train."
            )
        return jnp.asarray(leaf, dtype)

    return jax.tree_util.tree_map_with_path(as_leaf, tree)


def subtract(a: Any, b: Any) -> Any:
    """Return `a - b`, in float32 at least."""
    wide = arithmetic_dtype(*jax.tree.leaves(a))
    return jax.tree.map(lambda p, q: p.astype(wide) - q.astype(wide), a, b)


def norm(tree: Any) -> jax.Array:
    """Return the Euclidean norm of all leaves together, in float32 at least."""
    leaves = jax.tree.leaves(tree)
    wide = arithmetic_dtype(*leaves)
    return norm_over(jnp.stack([norm_over(leaf.astype(wide), range(leaf.ndim)) for leaf in leaves]), (0,))


def norm_over(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Return the Euclidean norm over some axes."""
    axes = tuple(axes)
    # Divided by the largest: squares of float32 overflow above 1e19, and underflow below 1e-19, where
    # gradients may well be.
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    unit = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    return jnp.squeeze(unit, axes) * jnp.sqrt(jnp.sum((x / unit) ** 2, axes))


def cosine(a: Any, b: Any) -> jax.Array:
    """Return the cosine of the angle between two vectors; 0 if one of them is 0."""
    wide = arithmetic_dtype(*jax.tree.leaves((a, b)))

    def direction(tree):
        length = norm(tree).astype(wide)
        return [leaf.astype(wide) / jnp.where(length == 0, 1, length) for leaf in jax.tree.leaves(tree)]

    products = [jnp.sum(p * q) for p, q in zip(direction(a), direction(b))]
    return jnp.clip(sum(products), -1, 1)
