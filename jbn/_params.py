"""The learnt affine map, the same at every position of `x` or, in conditional normalization, not."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn._domains import at_samples
from jbn._dtypes import arithmetic_dtype


class Params(NamedTuple):
    """The learnt affine map that follows normalization; either leaf may be None.

    For conditional normalization a leaf has all axes of `x` and broadcasts to it. With domains it may have a
    leading axis of domains.
    """

    scale: jax.Array | None  # (features...), gamma; None scales by 1
    bias: jax.Array | None  # (features...), beta; None adds 0


def split_affine(
    params: Params,
    x: jax.Array,
    axes: tuple[int, ...],
    dtype: np.dtype,
    shape: tuple[int, ...],
    domain: jax.Array | None = None,
) -> tuple[Params, np.dtype, Callable[[jax.Array], jax.Array]]:
    """Split off an affine map that is not the same at every position, or at every one of a domain.

    Args:
      shape: that of the moments: the features' shape, with domains after a leading axis of domains.

    Returns:
      Parameters and dtype for the normalization, and a function to apply to its result. Parameters that fit
      the moments, to which scalars and what domains share are broadcast here, stay in the normalization,
      whose derivative rule has them, and the function is the identity.
    """
    features = shape if domain is None else shape[1:]
    fits = lambda leaf: np.shape(leaf) in (shape, features, ())
    if all(map(fits, jax.tree.leaves(params))):
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, shape), params), dtype, lambda y: y
    wide = arithmetic_dtype(x, *jax.tree.leaves(params))

    def at_positions(leaf):
        leaf = jnp.asarray(leaf, wide)
        return at_samples(jnp.broadcast_to(leaf, shape), x.ndim, axes, domain) if fits(leaf) else leaf

    def affine(y):
        if params.scale is not None:
            y = y * at_positions(params.scale)
        if params.bias is not None:
            y = y + at_positions(params.bias)
        return y.astype(dtype)

    return Params(None, None), wide, affine
