"""Conditional normalization: a scale or a bias that differs from one position of `x` to the next."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jbn._axes import expand, feature_shape
from jbn._dtypes import arithmetic_dtype
from jbn._normalization import Params


def split_affine(
    params: Params, x: jax.Array, axes: tuple[int, ...], dtype: np.dtype
) -> tuple[Params, np.dtype, Callable[[jax.Array], jax.Array]]:
    """Split off an affine map that is not the same at every position.

    Returns:
      Parameters and dtype for the normalization, and a function to apply to its result. Parameters in the
      features' shape, to which scalars are broadcast here, stay in the normalization, whose derivative rule
      has them, and the function is the identity.
    """
    features = feature_shape(x, axes)
    params = jax.tree.map(lambda leaf: leaf if np.shape(leaf) else jnp.broadcast_to(leaf, features), params)
    leaves = jax.tree.leaves(params)
    if all(np.shape(leaf) == features for leaf in leaves):
        return params, dtype, lambda y: y
    wide = arithmetic_dtype(x, *leaves)

    def at_positions(leaf):
        leaf = jnp.asarray(leaf, wide)
        return expand(leaf, x.ndim, axes) if leaf.shape == features else leaf

    def affine(y):
        if params.scale is not None:
            y = y * at_positions(params.scale)
        if params.bias is not None:
            y = y + at_positions(params.bias)
        return y.astype(dtype)

    return Params(None, None), wide, affine
