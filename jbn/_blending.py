"""Blending running moments with those of the batch at hand, for evaluation on data of another kind."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jbn._axes import Axes, feature_axes
from jbn._checks import as_epsilon, as_weights, result_dtype
from jbn._collectives import AxisName, named_axes
from jbn._domains import as_domain
from jbn._dtypes import real_dtype
from jbn._normalization import normalize_by
from jbn._params import Params, split_affine
from jbn._spelling import explain_names
from jbn._statistics import Moments, measure, merge, multiply_by_unit


@explain_names
def blend(running: Moments, batch: Moments, *, prior: ArrayLike, between: bool = True) -> Moments:
    """Blend running moments with a batch's, as if the running ones were those of `prior` samples.

        w = n / (prior + n);  d = mean_B - mean;  n = batch.count
        mean' = mean + w*d
        var'  = (1-w)*var + w*var_B + w*(1-w)*|d|^2;  count' = prior + n

    To normalize data that are distributed otherwise than those of training with statistics that are partly
    their own: the more samples a batch has, the more its moments count. A convolution has as many samples as
    examples times positions. The modules' `blend=prior` does it in evaluation.

    Args:
      running: running moments; their count is not used.
      batch: moments of a batch in the same shape, such as `jbn.moments(x)`.
      prior: how many samples the running moments count for, >= 0, a number or one for each feature; may be
        traced. With 0 the result are the batch's moments, and those of a batch without samples the running.
      between: whether the variance includes the spread between the two means, the last term.

    Returns:
      Moments in the same shape. They carry the gradient to both.

    Raises:
      TypeError: `running` or `batch` is not `Moments`, or `prior` is not a number.
      ValueError: their shapes differ, or `prior` is negative or not finite.

    Reference: Nado et al. 2020, "Evaluating Prediction-Time Batch Normalization for Robustness under
    Covariate Shift"; Schneider et al. 2020, "Improving robustness against common corruptions by covariate
    shift adaptation", section 3.

    >>> import jax.numpy as jnp, jbn
    >>> running = jbn.Moments(mean=jnp.array([0.0]), var=jnp.array([1.0]))
    >>> batch = jbn.Moments(mean=jnp.array([4.0]), var=jnp.array([1.0]), count=jnp.array([16.0]))
    >>> print(*jbn.blend(running, batch, prior=48))
    [1.] [4.] [64.]
    >>> print(*jbn.blend(running, batch, prior=48, between=False))
    [1.] [1.] [64.]
    """
    check_prior("prior", prior)
    for name, moments in (("running", running), ("batch", batch)):
        if not isinstance(moments, Moments):
            raise TypeError(f"{name} is a {type(moments).__name__}; expected jbn.Moments.")
    shape = np.shape(running.mean)
    if np.shape(batch.mean) != shape:
        raise ValueError(f"batch.mean has shape {np.shape(batch.mean)}; expected {shape}, as running.mean.")
    if np.shape(prior) not in ((), shape[len(shape) - np.ndim(prior) :]):
        raise ValueError(f"prior has shape {np.shape(prior)}; expected {shape} or a number.")
    real = real_dtype(jnp.result_type(running.var))
    prior = jnp.broadcast_to(jnp.asarray(prior, real), shape)
    # Of no samples and none, those are the running moments.
    samples = jnp.where((prior == 0) & (jnp.asarray(batch.count) == 0), 1, prior)
    parts = running._replace(count=samples), batch
    if between:
        return merge(*parts)
    # The mean that values would have that are each part's variance.
    variances = merge(*(part._replace(mean=part.var, var=jnp.zeros_like(part.var)) for part in parts))
    return merge(*parts)._replace(var=variances.mean)


def normalize_blended(
    x: jax.Array,
    params: Params,
    running: Moments,
    *,
    prior: ArrayLike,
    axis: Axes,
    epsilon: float,
    mask: ArrayLike | None,
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    dtype: DTypeLike,
    domain: ArrayLike | None,
) -> jax.Array:
    """Normalize with the running moments blended with those of `x`; options as in `jbn.batch_norm`.

    A feature whose batch has moments that are not finite is normalized with the running ones.
    """
    axes, weights = feature_axes(x.ndim, axis), as_weights(mask, x)
    running = jax.lax.stop_gradient(running)
    index = None if domain is None else as_domain(domain, x, axes, running.mean.shape[0])
    over = named_axes(axis_name, axis_index_groups)
    batch = multiply_by_unit(*measure(x, axes, weights, over, shift=running.mean, domain=index))
    # A NaN among the samples is one of its own output, as in inference.
    finite = jnp.isfinite(batch.mean) & jnp.isfinite(batch.var)
    batch = batch._replace(count=jnp.where(finite, batch.count, 0))
    blended = blend(running, batch, prior=prior)
    epsilon = as_epsilon(epsilon, x, blended.mean, blended.var, params)
    shape = running.mean.shape
    params, dtype, affine = split_affine(params, x, axes, result_dtype(x, dtype), shape, index)
    return affine(normalize_by(blended, axes, epsilon, dtype, x, params, weights, index))


def check_prior(name: str, prior: Any) -> None:
    """Raise an error unless it is a number of samples, or several, or traced.

    Raises:
      TypeError: it is not a number.
      ValueError: it is negative or not finite.
    """
    if isinstance(prior, jax.core.Tracer):
        return
    try:
        if prior is None or np.asarray(prior).dtype.kind in "SUc":  # NumPy makes NaN of None
            raise TypeError
        known = np.asarray(prior, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={prior!r}; expected a number of samples >= 0.") from None
    if not np.all((known >= 0) & (known < np.inf)):
        raise ValueError(f"{name}={prior!r}; expected a finite number of samples >= 0.")
