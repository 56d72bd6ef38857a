"""Inference as one affine map, and that map folded into the layer before it."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbn._checks import as_array, as_epsilon
from jbn._dtypes import arithmetic_dtype
from jbn._normalization import inverse_sd
from jbn._params import Params
from jbn._spelling import explain_names
from jbn._statistics import Moments, cast, zero_mean_where_var_is_inf


@explain_names
def as_affine(
    params: Params | None, running: Moments, *, epsilon: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Return the scale and the shift that batch normalization is in inference.

        scale = gamma / sqrt(var + epsilon);  shift = beta - mean * scale;  y = x * scale + shift

    Args:
      params: gamma and beta, in the features' shape or scalars; None for neither.
      running: the running moments; `count` is not used.
      epsilon: that of the layer.

    Returns:
      Two arrays in the features' shape, in the dtype that params and moments promote to, float32 at least.
      They carry the gradient to both.

    Raises:
      TypeError: `params` or `running` is of another type, or `epsilon` is traced.
      ValueError: shapes differ, or `epsilon` is too small.

    `jbn.normalize` subtracts first, this map last: where a mean is far larger than the standard deviation,
    two large numbers cancel, and an output is off by up to about 2e-7 * |gamma * mean| / sd in float32. With
    a mean of 1000 standard deviations that is 2e-4.

    Reference: Ioffe & Szegedy 2015, Algorithm 2, line 11.

    >>> import jax.numpy as jnp, jbn
    >>> running = jbn.Moments(mean=jnp.array([3.0]), var=jnp.array([4.0]))
    >>> scale, shift = jbn.as_affine(jbn.Params(jnp.array([2.0]), None), running)
    >>> print(scale.round(4), shift.round(4))
    [1.] [-3.]
    """
    mean, scale, beta = _parts(params, running, epsilon)
    return scale, beta - mean * scale


@explain_names
def fold(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: Params | None,
    running: Moments,
    *,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
    """Fold inference into the dense layer or convolution whose output is normalized.

        scale = gamma / sqrt(var + epsilon);  kernel * scale;  (bias - mean) * scale + beta

    With what is returned the layer computes by itself what it did with the norm after it, whatever its
    padding, strides, dilation and groups.

    Args:
      kernel: of any number of axes, one of which is that of the outputs.
      bias: of the layer, (features,); None for 0.
      params: gamma and beta of the norm, (features,) or scalars; None for neither.
      running: its running moments, (features,); `count` is not used.
      epsilon: that of the norm.
      axis: the kernel's axis of outputs. In Flax it is the last one, also of grouped, depthwise and
        transposed convolutions; but of `ConvTranspose(transpose_kernel=True)` it is -2.

    Returns:
      A kernel and a bias in the dtype of `kernel`. The arithmetic is in float32 at least.

    Raises:
      TypeError: an argument is of another type, or complex where `kernel` is real.
      ValueError: `axis` is out of range, shapes differ, or `epsilon` is too small.

    Reference: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 3.2.

    >>> import jax.numpy as jnp, jbn
    >>> running = jbn.Moments(mean=jnp.array([3.0, 0.0]), var=jnp.array([4.0, 1.0]))
    >>> kernel, bias = jbn.fold(jnp.ones((1, 2)), None, None, running)
    >>> print(kernel.round(4), bias.round(4))
    [[0.5 1. ]] [-1.5  0. ]
    """
    kernel = as_array(kernel)
    if not jnp.issubdtype(kernel.dtype, jnp.inexact):
        raise TypeError(f"kernel: expected a floating point or complex dtype, got {kernel.dtype}.")
    axis = operator.index(axis)
    if not -kernel.ndim <= axis < kernel.ndim:
        raise ValueError(f"axis: expected one of the kernel's {kernel.ndim} axes, got {axis}.")
    features = (kernel.shape[axis],)
    if bias is not None:
        _check_shape("bias", bias, features)
    mean, scale, beta = _parts(params, running, epsilon, features)
    wide = arithmetic_dtype(kernel, scale, *([] if bias is None else [bias]))
    if jnp.issubdtype(wide, jnp.complexfloating) and not jnp.iscomplexobj(kernel):
        raise TypeError(f"kernel: expected a complex dtype, as of the other arguments, got {kernel.dtype}.")
    mean, scale, beta = (value.astype(wide) for value in (mean, scale, beta))
    centred = -mean if bias is None else jnp.asarray(bias, wide) - mean
    others = [i for i in range(kernel.ndim) if i != axis % kernel.ndim]
    folded = kernel.astype(wide) * jnp.expand_dims(scale, others)
    return folded.astype(kernel.dtype), (centred * scale + beta).astype(kernel.dtype)


def _parts(
    params: Params | None, running: Moments, epsilon: float, features: tuple[int, ...] | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return mean, scale and beta of y = (x - mean) * scale + beta, in one dtype and the features' shape."""
    params = Params(None, None) if params is None else params
    for name, value, kind in (("running", running, Moments), ("params", params, Params)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected jbn.{kind.__name__}, got a {type(value).__name__}.")
    features = np.shape(running.mean) if features is None else features
    _check_shape("running.mean", running.mean, features)
    _check_shape("running.var", running.var, features)
    for name, leaf in params._asdict().items():
        if np.shape(leaf) != ():  # as that of None is
            _check_shape(f"params.{name}", leaf, features)
    epsilon = as_epsilon(epsilon, running.mean, running.var, params)
    wide = arithmetic_dtype(running.mean, running.var, *jax.tree.leaves(params))
    used = zero_mean_where_var_is_inf(cast(Moments(*map(as_array, running)), wide))
    scale = inverse_sd(epsilon, used.var).astype(wide)
    if params.scale is not None:
        scale = scale * jnp.broadcast_to(jnp.asarray(params.scale, wide), features)
    beta = jnp.broadcast_to(jnp.asarray(0 if params.bias is None else params.bias, wide), features)
    return used.mean, scale, beta


def _check_shape(name: str, value: ArrayLike, features: tuple[int, ...]) -> None:
    if np.shape(value) != features:
        raise ValueError(f"{name}: expected shape {features}, that of the features, got {np.shape(value)}.")
