"""Update rules: how the moments of one more batch update the running moments.

A rule is any function `(running, batch) -> running`. Those here are frozen dataclasses, so that two rules
with the same options are equal and hash alike, and `jit` compiles once for both.

Most are weighted averages of two, `running + w * (batch - running)`. Where w is small, float32 loses most of
a step: rounded to nearest, an average stops short of its limit by a relative error of up to 3e-8 / w, which
is 4e-6 for w = 0.01 and 4e-3 for w = 1e-5. So below w = 1/1024 steps are rounded stochastically
(`jbn/_rounding.py`), and the relative error stays below about 4e-8 / sqrt(w). The random bits are a hash of
the data and of the count, so that identical batches without a count always round the same way.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn._checks import as_decay
from jbn._dtypes import arithmetic_dtype, real_dtype
from jbn._rounding import add, random_numbers
from jbn._spelling import explain_names
from jbn._statistics import Moments, cast, select, with_count_per_feature
from jbn._weights import abs_squared, ratio

UpdateRule = Callable[[Moments, Moments], Moments]


@dataclass(frozen=True)
class ema:  # in lower case, like the other rules, because users call it as a function that makes a rule
    """Exponential moving average of the batches' means and variances.

        running = decay * running + (1 - decay) * batch

    With `debias`, the weight of the initial values is divided out, so that the first batch counts in full and
    inference is right from the first step on:

        count' = decay * count + (1 - decay);  w = (1 - decay) / count'
        running = (1 - w) * running + w * batch

    PyTorch's `momentum=m` is `ema(1 - m, unbiased=True)`; Flax's `momentum=m` is `ema(m)`.

    Args:
      decay: the weight of the old value, in [0, 1]: what Flax, Haiku, Equinox and Keras call momentum. It
        may be a traced scalar, such as the value of a schedule.
      unbiased: average the unbiased variance n/(n-1) * var, as PyTorch does, n being the batch's total weight
        (and leave a feature with n <= 1 unchanged).
      debias: divide out the initial values, as Adam does. The running `count` then holds
        1 - prod(decay); otherwise it counts batches. Give moments from elsewhere, such as a checkpoint of
        Flax, a count of 1, which marks them as complete: with 0 the first batch replaces them.

    Raises:
      TypeError: `decay` is not a number.
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
        old_weight: Any = self.decay  # a Python float, or a tracer
        # Subtracted before it is rounded: 1 - float32(0.99) has a relative error of 1e-6.
        decay, new = (jnp.asarray(weight, running.count.dtype) for weight in (old_weight, 1 - old_weight))
        traced = isinstance(old_weight, jax.core.Tracer)
        noise = _noise(running, batch) if traced or 1 - old_weight < 1 / 1024 else None
        if self.debias:
            share, counted = _share(decay * running.count, new), new - new * running.count
        else:
            smaller = jnp.minimum(decay, new) if traced else min(old_weight, 1 - old_weight)
            share = _Share(jnp.asarray(smaller, running.count.dtype), old_weight < 0.5)
            counted = jnp.ones_like(running.count)
        return _average(running, batch, share, counted, noise, unbiased=self.unbiased)


ema.__init__ = explain_names(ema.__init__)


@dataclass(frozen=True)
class cumulative:
    """The plain average of all batches' means and variances, with the same weight for each batch.

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

    The variance includes the spread between batches. `count` counts samples: exactly up to 2^24 in float32,
    beyond that with stochastic rounding, to 0.1 %, up to the largest number. (The rounding is a hash of the
    data, so that identical batches are counted only up to 2^24 of them; their moments do not change anyway.)

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


@dataclass(frozen=True)
class keep:
    """No update: the running moments stay what they are.

    For a layer without running statistics, PyTorch's `track_running_stats=False`, whose evaluation uses the
    batch's moments as well: `train=True` in evaluation too; in a module `use_running_average=False`. A module
    then updates nothing: Linen needs no `mutable=["batch_stats"]` in `apply`, nor the collection, and NNX no
    model that is an argument of the transform. There is no `count`.

    >>> import jax.numpy as jnp, jbn
    >>> params, running = jbn.init(1)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, running = jbn.batch_norm(x, params, running, train=True, update=jbn.keep())
    >>> print(y.ravel().round(4), running.mean, running.var, running.count)
    [-1.  1.] [0.] [1.] [0.]
    """

    def __call__(self, running: Moments, batch: Moments) -> Moments:
        return running


def discards_initial(update: UpdateRule) -> bool:
    """Return whether a rule takes running moments with a count of 0 for those of no samples."""
    return isinstance(update, cumulative | pooled) or (isinstance(update, ema) and update.debias)


class _Share(NamedTuple):
    """The smaller of the relative weights of the running moments and of the batch."""

    share: jax.Array  # () or (features...), at most 1/2
    is_old: bool | jax.Array  # whether it is that of the running moments


def _share(old: jax.Array, new: jax.Array) -> _Share:
    # As a ratio of ratios, because the sum of two weights may overflow.
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
    """Average the running moments and a batch's, with the spread between the two if `spread`, and count.

    It moves the moments of larger weight towards the others. So equal moments do not move, and where one of
    the weights is 0, the result is exactly the other moments, whatever the first ones hold.
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
    """Give the running moments a count for each feature, and both a common dtype."""
    both = with_count_per_feature(running), Moments(*map(jnp.asarray, batch))
    if len({real_dtype(leaf.dtype) for moments in both for leaf in moments}) == 1:
        return both
    wide = arithmetic_dtype(running.mean, running.var, batch.mean, batch.var)
    return cast(both[0], wide), cast(both[1], wide)


def _noise(running, batch):
    return random_numbers(running.count, running.mean, batch.mean, batch.var)
