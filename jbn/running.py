"""Update rules: how running moments absorb the moments of one more batch.

A rule is any function `(running, batch) -> running`. The three here are frozen dataclasses, so that two rules
with the same options are equal and hash alike, and `jit` compiles once for both.
"""

import functools
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbn.dtypes import arithmetic_dtype
from jbn.merging import ratio
from jbn.statistics import Moments, cast, merge, select, with_count_per_feature

UpdateRule = Callable[[Moments, Moments], Moments]


@dataclass(frozen=True)
class ema:  # lower case, like the other rules: to its user it is a function
    """Exponential moving average of the batches' means and variances.

        running = decay * running + (1 - decay) * batch

    with `debias`, the weight that the initial values would have is divided out, so that the first
    batch counts in full and inference is right from the first step on:

        count' = decay * count + (1 - decay);  w = (1 - decay) / count'
        running = (1 - w) * running + w * batch

    PyTorch's `momentum=m` is `ema(1 - m, unbiased=True)`; Flax's `momentum=m` is `ema(m)`.

    Args:
      decay: the weight of the old value, in [0, 1]: what Flax, Haiku, Equinox and Keras call momentum. It
        may be a traced scalar, from a schedule say.
      unbiased: keep the unbiased variance n/(n-1) * var, as PyTorch does, n being the batch's total weight
        (and leave a feature with n <= 1 unchanged).
      debias: divide out the initial values, as Adam does. The running `count` then holds
        1 - prod(decay); otherwise it counts batches.

    Raises:
      TypeError: `decay` is no number.
      ValueError: `decay` is outside [0, 1], or an array of several.

    Reference: Ioffe & Szegedy 2015, section 3.1; debiasing: Kingma & Ba 2015, section 3.

    >>> import jax.numpy as jnp, jbn
    >>> running = jbn.Moments(mean=jnp.zeros(1), var=jnp.ones(1), count=jnp.zeros(1))
    >>> batch = jbn.Moments(mean=jnp.array([2.0]), var=jnp.array([5.0]), count=jnp.array([64.0]))
    >>> new = jbn.ema(0.75)(running, batch)
    >>> print(new.mean, new.var, new.count)
    [0.5] [2.] [1.]
    >>> new = jbn.ema(0.75, debias=True)(running, batch)
    >>> print(new.mean, new.var, new.count)
    [2.] [5.] [0.25]
    """

    decay: ArrayLike = 0.99
    _: KW_ONLY
    unbiased: bool = False
    debias: bool = False

    def __post_init__(self):
        if np.shape(self.decay) != ():
            raise ValueError(f"decay has shape {np.shape(self.decay)}; wanted one number for all features.")
        if isinstance(self.decay, jax.core.Tracer):
            return
        try:
            object.__setattr__(self, "decay", float(self.decay))  # which is hashable
        except TypeError:
            raise TypeError(f"decay={self.decay!r}; wanted a number in [0, 1].") from None
        if not 0 <= self.decay <= 1:
            raise ValueError(
                f"decay={self.decay} (momentum in the Flax modules) is outside [0, 1]; it is the weight of "
                "the old value. PyTorch's momentum m is decay 1 - m."
            )

    def __call__(self, running: Moments, batch: Moments) -> Moments:
        running = with_count_per_feature(running)
        # Subtracted before it is rounded: 1 - float32(0.99) is off by 1e-6 of itself.
        decay, new = (jnp.asarray(weight, running.count.dtype) for weight in (self.decay, 1 - self.decay))
        if self.debias:
            count = decay * running.count + new
            return _average(running, batch, ratio(new, count), count, self.unbiased)
        return _average(running, batch, new, running.count + 1, self.unbiased)


@dataclass(frozen=True)
class cumulative:
    """The plain average of all batches' means and variances, each batch counting the same.

        count = count + 1;  w = 1 / count
        running = (1 - w) * running + w * batch

    PyTorch's `momentum=None` is `cumulative(unbiased=True)`. The variance is that within a batch;
    `jbn.pooled` adds the variance between batches.

    Args:
      unbiased: average n/(n-1) * var, n being the batch's total weight (and leave a feature with n <= 1
        unchanged).

    >>> import jax.numpy as jnp, jbn
    >>> running = jbn.Moments(mean=jnp.zeros(1), var=jnp.ones(1), count=jnp.zeros(1))
    >>> for mean in 1.0, 3.0, 8.0:
    ...     batch = jbn.Moments(jnp.array([mean]), var=jnp.array([5.0]), count=jnp.array([64.0]))
    ...     running = jbn.cumulative()(running, batch)
    >>> print(running.mean, running.var, running.count)
    [4.] [5.] [3.]
    """

    _: KW_ONLY
    unbiased: bool = False

    def __call__(self, running: Moments, batch: Moments) -> Moments:
        running = with_count_per_feature(running)
        count = running.count + 1
        return _average(running, batch, 1 / count, count, self.unbiased)


@dataclass(frozen=True)
class pooled:
    """The moments of all samples ever seen, as if they had come in one batch: `jbn.merge`.

    The variance holds the spread between batches too. `count` counts samples.

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> _, running = jbn.init(2)
    >>> for batch in x[:2], x[2:]:
    ...     running = jbn.pooled()(running, jbn.moments(batch))
    >>> print(running.mean, running.var, running.count)
    [4. 5.] [8. 8.] [5. 5.]
    """

    def __call__(self, running: Moments, batch: Moments) -> Moments:
        return merge(running, batch)


def absorb(update: UpdateRule, running: Moments, batch: Moments) -> Moments:
    """Applies a rule as `jbn.batch_norm` does, and protects the running moments from what it is given.

    The rule computes in float32 at least; the result has the dtypes of `running` and carries no gradient. A
    feature that had no samples, or whose moments are not finite, the batch's or the new ones, keeps every
    leaf as it was.
    """
    batch = jax.lax.stop_gradient(batch)
    if jnp.iscomplexobj(batch.mean) and not jnp.iscomplexobj(running.mean):
        raise ValueError(
            f"running.mean has dtype {running.mean.dtype}, but x is complex; wanted a complex one, as made "
            "by jbn.init(features, dtype=jnp.complex64), or by a module with param_dtype=jnp.complex64."
        )
    wide = arithmetic_dtype(running.mean, batch.mean)
    new = update(cast(running, wide), cast(batch, wide))
    if not isinstance(new, Moments):
        raise TypeError(f"update={update!r} returned a {type(new).__name__}; wanted jbn.Moments.")
    shapes = [np.shape(leaf) for leaf in new]
    if not set(shapes) <= {(), running.mean.shape}:
        raise ValueError(
            f"update={update!r} returned leaves of shapes {shapes}; wanted {running.mean.shape}, as given."
        )
    new = jax.tree.map(lambda leaf, old: jnp.asarray(leaf).astype(old.dtype), new, running)
    finite = [jnp.isfinite(leaf) for leaf in (batch.mean, batch.var, new.mean, new.var)]
    return select(functools.reduce(jnp.logical_and, finite, batch.count > 0), new, running)


def _average(
    running: Moments, batch: Moments, weight: jax.Array, count: jax.Array, unbiased: bool
) -> Moments:
    """Weighs the old values and the batch's; exactly the batch's with weight 1."""
    batch_var = batch.var * ratio(batch.count, batch.count - 1) if unbiased else batch.var
    var = (1 - weight) * running.var + weight * batch_var
    weight = weight.astype(running.mean.dtype)
    mean = (1 - weight) * running.mean + weight * batch.mean
    enough = batch.count > (1 if unbiased else 0)
    return select(enough, Moments(mean, var, count), running)
