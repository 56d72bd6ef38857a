"""The parameters with which batch normalization changes nothing."""

import jax.numpy as jnp

from jbn._checks import as_epsilon
from jbn._dtypes import arithmetic_dtype
from jbn._params import Params
from jbn._statistics import Moments, cast


def identity_params(moments: Moments, *, epsilon: float = 1e-5) -> Params:
    """Make the parameters with which normalization by given moments changes nothing.

        scale = sqrt(var + epsilon);  bias = mean

    `jbn.normalize(x, moments, identity_params(moments))` is `x`, up to rounding: with batch normalization a
    layer can represent every function that it can without.

    Args:
      moments: as `jbn.moments` measures them; finite.
      epsilon: that of the layer; > 0.

    Returns:
      `jbn.Params` in the features' shape and in float32 at least: a real scale, and a bias in the dtype of
      the mean.

    Raises:
      TypeError: `moments` is of another type, or `epsilon` is traced.
      ValueError: `epsilon` <= 0.

    Reference: Ioffe & Szegedy 2015, section 3.

    >>> import jax.numpy as jnp, jbn
    >>> from jbn import inspection
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> batch = jbn.moments(x)
    >>> print(jbn.normalize(x, batch, inspection.identity_params(batch)).round(4))
    [[ 1. 10.]
     [ 3. 30.]]
    """
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments is a {type(moments).__name__}; expected jbn.Moments, as jbn.moments returns."
        )
    epsilon = as_epsilon(epsilon, moments.mean, moments.var)
    moments = cast(moments, arithmetic_dtype(moments.mean, moments.var))
    return Params(scale=jnp.sqrt(moments.var + epsilon), bias=moments.mean)
