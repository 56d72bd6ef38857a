"""Parameters and running moments of a new layer, and normalization with given moments."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jbn._axes import Axes, feature_axes, feature_shape
from jbn._checks import as_epsilon, as_samples, as_shape, check_features, check_learnable, result_dtype
from jbn._dtypes import arithmetic_dtype, real_dtype
from jbn._normalization import normalize_by
from jbn._params import Params, split_affine
from jbn._spelling import explain_names
from jbn._statistics import Moments


@explain_names
def init(
    features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Params, Moments]:
    """Make the parameters and the running moments of one layer.

    Args:
      features: the number of features, or the shape of the feature axes.
      use_scale: learn a scale, which starts at 1.
      use_bias: learn a bias, which starts at 0.
      dtype: the parameters' dtype. The running moments are float32 at least, variance and count real.

    Returns:
      `Params` and `Moments` with mean 0, variance 1 and count 0, all in the features' shape.

    Raises:
      TypeError: `features` is no number, nor several, or `dtype` holds whole numbers.
      ValueError: `features` is negative.

    >>> import jbn
    >>> params, running = jbn.init(3)
    >>> print(params.scale, params.bias, running.mean, running.var)
    [1. 1. 1.] [0. 0. 0.] [0. 0. 0.] [1. 1. 1.]
    """
    shape = as_shape("features", features)
    check_learnable("dtype", dtype)
    wide = arithmetic_dtype(dtype)
    params = Params(
        scale=jnp.ones(shape, dtype) if use_scale else None,
        bias=jnp.zeros(shape, dtype) if use_bias else None,
    )
    running = Moments(
        mean=jnp.zeros(shape, wide),
        var=jnp.ones(shape, real_dtype(wide)),
        count=jnp.zeros(shape, real_dtype(wide)),
    )
    return params, running


@explain_names
def normalize(
    x: ArrayLike,
    moments: Moments,
    params: Params | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalize with given moments, then apply the learnt affine map.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
      x: samples, of any shape; floating point or complex.
      moments: the statistics to normalize with, in the features' shape; `count` is not used.
      params: scale and bias in the features' shape, or scalars; None for neither. For conditional
        normalization either may have all axes of `x` and broadcast to it, as `scale[:, None, None, :]` with
        one vector per example.
      axis: the feature axis or axes.
      epsilon: added to the variance; a normal number of the dtype of the arithmetic (1.2e-38 in float32).
      dtype: the dtype of the result; that of `x` if None. The arithmetic is in float32 at least.

    Returns:
      An array of the shape of `x`. It carries the gradient to `x`, to `moments` and to `params`.

    Raises:
      TypeError: `x` is an integer array, `dtype` cannot hold the result, or `moments` or `params` is of
        another type.
      ValueError: `axis` is out of range or repeated, `epsilon` is too small, or the shape of `moments` or
        `params` is not that of the features of `x`.

    Reference: Ioffe & Szegedy 2015, Algorithm 1, lines 3 and 4.

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.array([[1.0], [3.0]])
    >>> print(jbn.normalize(x, jbn.moments(x)).round(4))
    [[-1.]
     [ 1.]]
    """
    x = as_samples(x)
    axes = feature_axes(x.ndim, axis)
    params = Params(None, None) if params is None else params
    check_features(x, axes, "moments", moments, Moments)
    check_features(x, axes, "params", params, Params, may_broadcast=True)
    epsilon = as_epsilon(epsilon, x, moments.mean, moments.var, params)
    shape = feature_shape(x, axes)
    params, dtype, affine = split_affine(params, x, axes, result_dtype(x, dtype), shape)
    return affine(normalize_by(moments, axes, epsilon, dtype, x, params))
