"""Update rules: how running moments absorb the moments of one more batch.

A rule is any function `(running, batch) -> running`. The three here are frozen dataclasses, so that two rules
with the same options are equal and hash alike, and `jit` compiles once for both.

Each is a weighted average of two, `running + w * (batch - running)`. Where w is small, float32 has no room
for most of a step: rounded to the nearest, an average stops up to 3e-8 / w of its value short of its limit,
4e-6 for w = 0.01 and 4e-3 for w = 1e-5. So below w = 1/1024 each step is rounded up or down at random, in
proportion (`jbn/_rounding.py`), and the average stays within about 4e-8 / sqrt(w) of its value. What is
random are bits of the data and of the count; without a count, batches that are all the same have none.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbn._checks import as_decay
from jbn._dtypes import arithmetic_dtype, real_dtype
from jbn._merging import abs_squared, ratio
from jbn._rounding import add, random_numbers
from jbn._spelling import explain_names
from jbn._statistics import Moments, cast, select, with_count_per_feature

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
        1 - prod(decay); otherwise it counts batches. Give moments from elsewhere, a checkpoint of Flax say,
        a count of 1, which takes them for complete: with 0 the first batch replaces them.

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
        object.__setattr__(self, "decay", as_decay("decay", self.decay))

    def __call__(self, running: Moments, batch: Moments) -> Moments:
        running, batch = _alike(running, batch)
        # Subtracted before it is rounded: 1 - float32(0.99) is off by 1e-6 of itself.
        decay, new = (jnp.asarray(weight, running.count.dtype) for weight in (self.decay, 1 - self.decay))
        small = isinstance(self.decay, jax.core.Tracer) or 1 - self.decay < 1 / 1024
        noise = _noise(running, batch) if small else None
        if self.debias:
            share, counted = _share(decay * running.count, new), new - new * running.count
        else:
            lesser = (
                jnp.minimum(decay, new)
                if isinstance(self.decay, jax.Array)
                else min(self.decay, 1 - self.decay)
            )
            share = _Share(jnp.asarray(lesser, running.count.dtype), self.decay < 0.5)
            counted = jnp.ones_like(running.count)
        return _average(running, batch, share, counted, noise, unbiased=self.unbiased)


ema.__init__ = explain_names(ema.__init__)


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
        running, batch = _alike(running, batch)
        one = jnp.ones_like(running.count)
        share, noise = _share(running.count, one), _noise(running, batch)
        return _average(running, batch, share, one, noise, unbiased=self.unbiased)


@dataclass(frozen=True)
class pooled:
    """The moments of all samples ever seen, as if they had come in one batch: `jbn.merge`.

    The variance holds the spread between batches too. `count` counts samples: exactly up to 2^24 in float32,
    and from there on right on average, to 0.1 %, up to the largest number that there is. (What is rounded up
    and what down depends on bits of the data: batches that are all the same are counted up to 2^24 of them,
    and their moments do not need more.)

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> _, running = jbn.init(2)
    >>> for batch in x[:2], x[2:]:
    ...     running = jbn.pooled()(running, jbn.moments(batch))
    >>> print(running.mean, running.var.round(5), running.count)
    [4. 5.] [8. 8.] [5. 5.]
    """

    def __call__(self, running: Moments, batch: Moments) -> Moments:
        running, batch = _alike(running, batch)
        share, noise = _share(running.count, batch.count), _noise(running, batch)
        new = _average(running, batch, share, batch.count, noise, spread=True)
        return new._replace(count=jnp.minimum(new.count, jnp.finfo(new.count.dtype).max))


def absorb(update: UpdateRule, running: Moments, batch: Moments, size: int | None = None) -> Moments:
    """Applies a rule as `jbn.batch_norm` does, and protects the running moments from what it is given.

    The rule computes in float32 at least; the result has the dtypes of `running` and carries no gradient. A
    feature that had no samples, or whose moments are not finite, the batch's or the new ones, keeps every
    leaf as it was. `size` is the batch's count where that is the same for all features and known.
    """
    batch = jax.lax.stop_gradient(batch)
    if type(update) in (ema, cumulative, pooled) and not isinstance(getattr(update, "decay", 0), jax.Array):
        # One number, of which a compiler knows that it is not 0.
        count = batch.count if size is None else jnp.asarray(size, batch.count.dtype)
        return _absorb_once(update, running, batch._replace(count=count))
    return _absorb(update, running, batch)


def _absorb(update, running, batch):
    if jnp.iscomplexobj(batch.mean) and not jnp.iscomplexobj(running.mean):
        raise ValueError(
            f"running.mean has dtype {running.mean.dtype}, but x is complex; wanted a complex one, as made "
            "by jbn.init(features, dtype=jnp.complex64), or by a module with param_dtype=jnp.complex64."
        )
    wide = arithmetic_dtype(running.mean, batch.mean)
    old, batch = cast(running, wide), cast(batch, wide)
    usable = (batch.count > 0) & jnp.isfinite(batch.mean) & jnp.isfinite(batch.var)
    # A rule computes with nothing that it is not to see.
    new = update(old, select(usable, batch, old)._replace(count=batch.count))
    if not isinstance(new, Moments):
        raise TypeError(f"update={update!r} returned a {type(new).__name__}; wanted jbn.Moments.")
    shapes = [np.shape(leaf) for leaf in new]
    if not set(shapes) <= {(), running.mean.shape}:
        raise ValueError(
            f"update={update!r} returned leaves of shapes {shapes}; wanted {running.mean.shape}, as given."
        )
    new = jax.tree.map(lambda leaf, old: jnp.asarray(leaf).astype(old.dtype), new, running)
    return select(usable & jnp.isfinite(new.mean) & jnp.isfinite(new.var), new, running)


# Traced once for all layers of one shape.
_absorb_once = jax.jit(_absorb, static_argnums=0)


class _Share(NamedTuple):
    """Of two weights, the share of the smaller one."""

    share: jax.Array  # () or (features...), at most 1/2
    is_old: bool | jax.Array  # whether it is that of the running moments


def _share(old: jax.Array, new: jax.Array) -> _Share:
    # As a ratio of ratios, which is right for weights of any size.
    is_old = old < new
    smaller = ratio(jnp.minimum(old, new), jnp.maximum(old, new))
    return _Share(smaller / (1 + smaller), is_old)


def _average(
    running: Moments,
    batch: Moments,
    share: _Share,
    counted: jax.Array,
    noise: jax.Array | None,
    *,
    unbiased: bool = False,
    spread: bool = False,
) -> Moments:
    """Averages the running moments and a batch's, with the spread between the two if wanted, and counts.

    It goes from the one that counts more towards the other, so that nothing moves where the two are the same,
    and the result is exactly one of the two where the other counts nothing, whatever that one holds.
    """
    var = batch.var * ratio(batch.count, batch.count - 1) if unbiased else batch.var
    w, is_old = share
    near, far = running, batch._replace(var=var, count=running.count)
    if isinstance(is_old, bool):
        near, far = (far, near) if is_old else (near, far)
    else:
        near, far = select(is_old, far, near), select(is_old, near, far)
        far = select(w > 0, far, near)

    def step(near, far):
        v = w.astype(near.dtype)
        return v * far - v * near

    steps = step(near.mean, far.mean), step(near.var, far.var), jnp.broadcast_to(counted, near.count.shape)
    if spread:
        between = (1 - w) * w * abs_squared(far.mean - near.mean)
        steps = steps[0], steps[1] + between, steps[2]
    new = Moments(*add((near.mean, near.var, running.count), steps, noise))
    return select(batch.count > (1 if unbiased else 0), new, running)


def _alike(running: Moments, batch: Moments) -> tuple[Moments, Moments]:
    """Gives the running moments a count for each feature, and one dtype to both where they differ."""
    both = with_count_per_feature(running), Moments(*map(jnp.asarray, batch))
    if len({real_dtype(leaf.dtype) for moments in both for leaf in moments}) == 1:
        return both
    wide = arithmetic_dtype(running.mean, running.var, batch.mean, batch.var)
    return cast(both[0], wide), cast(both[1], wide)


def _noise(running, batch):
    return random_numbers(running.count, running.mean, batch.mean, batch.var)
