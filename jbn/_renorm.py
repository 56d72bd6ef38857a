"""Batch renormalization: the correction of a batch's moments towards the running ones, and its limits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbn._checks import as_float
from jbn._dtypes import arithmetic_dtype, real_dtype, widen
from jbn._params import Params
from jbn._spelling import explain_names
from jbn._statistics import Moments


class Limits(NamedTuple):
    """How far batch renormalization may correct; with `r_max` 1 and `d_max` 0 it is batch normalization."""

    r_max: ArrayLike  # () or (features...), >= 1: of the ratio of standard deviations
    d_max: ArrayLike  # () or (features...), >= 0: of the distance of the means, in running sds


Schedule = Callable[[jax.Array], tuple[ArrayLike, ArrayLike]]


@dataclass(frozen=True, kw_only=True)
class renorm_limits:  # in lower case, like the rules, because users call it as a function
    """A schedule of the limits of batch renormalization: from batch normalization to the full correction.

        r_max(n) = 1 + (r_max - 1) * clip((n - plain) / r_steps, 0, 1)
        d_max(n) = d_max * clip((n - plain) / d_steps, 0, 1)

    n is the number of updates so far. The defaults are those of the paper, whose r_max reaches 3 after 40,000
    updates and whose d_max reaches 5 after 25,000. With `plain=100_000, r_steps=0, d_steps=0` it is that of
    CrossQ: batch normalization for 100,000 updates, and then the full correction.

    Args:
      r_max: the limit of r at last, >= 1.
      d_max: the limit of d at last, >= 0.
      plain: how many updates are batch normalization.
      r_steps, d_steps: in how many updates after that r_max and d_max grow to the full; 0 for at once.

    Returns:
      A function of the number of updates, a scalar that may be traced, to `(r_max, d_max)`, for `renorm` in
      the modules.

    Raises:
      TypeError: one of them is not a number.
      ValueError: `r_max` is below 1, or another of them is negative.

    Reference: Ioffe 2017, "Batch Renormalization", section 4; Bhatt et al. 2024, "CrossQ: Batch
    Normalization in Deep Reinforcement Learning for Greater Sample Efficiency and Simplicity", and its code.

    >>> import jbn
    >>> limits = jbn.renorm_limits()
    >>> [tuple(map(float, limits(n))) for n in (0, 5_000, 15_000, 25_000, 40_000)]
    [(1.0, 0.0), (1.0, 0.0), (1.5714285373687744, 2.5), (2.142857074737549, 5.0), (3.0, 5.0)]
    """

    r_max: float = 3.0
    d_max: float = 5.0
    plain: int = 5_000
    r_steps: int = 35_000
    d_steps: int = 20_000

    def __post_init__(self):
        as_limits(self.r_max, self.d_max)
        for name in ("plain", "r_steps", "d_steps"):
            _as_number(name, getattr(self, name), 0, "a number of updates")

    def __call__(self, num_updates: ArrayLike) -> tuple[jax.Array, jax.Array]:
        after = jnp.asarray(num_updates).astype(jnp.float32) - float(self.plain)

        def grown(steps):
            # Without steps, all at the first update after the plain ones.
            return jnp.clip(after / float(steps), 0, 1) if steps else jnp.where(after < 0, 0.0, 1.0)

        r_max, d_max = (jnp.asarray(limit, jnp.float32) for limit in as_limits(self.r_max, self.d_max))
        return 1 + (r_max - 1) * grown(self.r_steps), d_max * grown(self.d_steps)


renorm_limits.__init__ = explain_names(renorm_limits.__init__)


def as_limits(r_max: Any, d_max: Any) -> Limits:
    """Return checked limits, each a Python float or a traced scalar.

    Raises:
      TypeError: one is not a number.
      ValueError: one is out of range, or an array of several.
    """
    return Limits(
        _as_number("r_max", r_max, 1, "the largest r, whose reciprocal is the smallest"),
        _as_number("d_max", d_max, 0, "the largest |d|"),
    )


def none_without_effect(limits: Limits) -> Limits | None:
    """Return None for limits that are known to allow no correction."""
    traced = any(isinstance(limit, jax.core.Tracer) for limit in limits)
    return limits if traced or limits != (1, 0) else None


def _as_number(name: str, value: Any, least: int, meaning: str) -> ArrayLike:
    """Return a Python float, which is hashable and of any dtype; if it is traced, a float that is."""
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}; expected one number for all features.")
    if isinstance(value, jax.core.Tracer):
        return widen(value)
    try:
        number = as_float(value)
    except (TypeError, ValueError):
        fix = " Call a schedule: r_max, d_max = schedule(num_updates)." if callable(value) else ""
        raise TypeError(f"{name}={value!r}; expected a number >= {least}: {meaning}.{fix}") from None
    if not number >= least:
        raise ValueError(f"{name}={number:g}; expected a number >= {least}: {meaning}.")
    return number


def only_where(allowed: jax.Array, limits: Limits) -> Limits:
    """Allow no correction elsewhere."""
    return Limits(jnp.where(allowed, limits.r_max, 1.0), jnp.where(allowed, limits.d_max, 0.0))


def renormalize(
    params: Params, batch: Moments, running: Moments, limits: Limits | None, epsilon: float
) -> Params:
    """Make the correction of normalized samples part of the scale and bias that follow.

        r = clip(sd_B / sd, 1 / r_max, r_max);  d = clip((mean_B - mean) / sd, -d_max, d_max)
        (normal * r + d) * scale + bias = normal * (r * scale) + (d * scale + bias)

    r and d are constants: they carry no gradient. They are 1 and 0 where the batch's variance is infinite.
    """
    if limits is None:
        return params
    wide = arithmetic_dtype(batch.mean, running.mean, *jax.tree.leaves(params))
    real = real_dtype(wide)
    batch, limits = jax.lax.stop_gradient((batch, limits))
    r_max, d_max = (jnp.asarray(limit, real) for limit in limits)
    sd = lambda moments: jnp.sqrt(moments.var.astype(real) + epsilon)
    r = jnp.clip(sd(batch) / sd(running), 1 / r_max, r_max)
    d = (batch.mean.astype(wide) - running.mean.astype(wide)) / sd(running).astype(wide)
    d = _clip(d, d_max)
    in_range = batch.var < math.inf
    r, d = jnp.where(in_range, r, 1).astype(wide), jnp.where(in_range, d, 0)
    scale = r if params.scale is None else r * params.scale.astype(wide)
    # Adding -0.0 changes no bit, 0.0 those of -0.0.
    shift = jnp.where(d == 0, -0.0, d if params.scale is None else d * params.scale.astype(wide))
    return Params(scale, shift if params.bias is None else shift + params.bias.astype(wide))


def _clip(d: jax.Array, most: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(d):
        return jnp.clip(d, -most, most)
    size = jnp.abs(d)
    return jnp.where(size > most, d * (most / size).astype(d.dtype), d)
