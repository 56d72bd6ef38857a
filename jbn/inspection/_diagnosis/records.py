"""What a diagnosis is made from: what one batch norm has, and what it was called with."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbn._axes import Axes
from jbn._params import Params
from jbn._running import UpdateRule, pooled
from jbn._statistics import Moments, moments
from jbn._update import apply_update_rule

# A loss is clearly worse if it is by a fifth, and by three standard errors of the difference over batches.
WORSE, ERRORS = 0.2, 3.0


class Batches(NamedTuple):
    """How the moments of batches differ from each other. Each batch counts once."""

    means: Moments  # (features...), of the means of the batches
    vars: Moments  # (features...), of their variances: the mean is the variance within a typical batch
    nonfinite: jax.Array  # (features...), Boolean: whether one of them had inputs that are not finite


class LayerRecord(NamedTuple):
    """A batch norm: its running statistics, what it was called with, and how it is made."""

    running: Moments  # (features...); the count is 0 where none is kept
    population: Moments  # (features...), of all inputs together
    batches: Batches  # how the moments of single batches differ
    params: Params = Params(None, None)  # (features...)
    epsilon: float = 1e-5  # added to the variance
    update: UpdateRule | None = None  # None for an ema without debiasing, as Flax's
    momentum: ArrayLike | None = None  # of that ema
    frozen: bool = False  # whether it normalizes with the running moments in training
    has_count: bool = False  # whether the rule keeps a count


class Losses(NamedTuple):
    """The loss of each batch, (batches,) each, by the statistics that the network normalizes with."""

    running: ArrayLike  # the running ones
    batch: ArrayLike  # the batch's own
    recalibrated: ArrayLike  # those of all batches together
    mismatched: ArrayLike  # the running ones, but the outputs of other examples: that of a network by chance
    sizes: ArrayLike  # examples of each batch, by which its losses are weighed

    def works(self) -> bool:
        """Return whether the network is as good with its running statistics as it gets, and not by chance."""
        means = self.means()
        best = min(means["batch"], means["recalibrated"])
        return means["running"] < best + 0.1 * abs(best) and self.is_worse("mismatched", "running", by=0.5)

    def means(self) -> dict[str, float]:
        """Return the losses over all examples."""
        return {name: float(np.average(getattr(self, name), weights=self.sizes)) for name in self._fields[:4]}

    def is_worse(self, name: str, other: str, by: float = WORSE) -> bool:
        """Return whether a loss is clearly higher than another; what is not finite is."""
        a, b = self.means()[name], self.means()[other]
        if not np.isfinite(a) or not np.isfinite(b):
            return np.isfinite(b).item()
        differences = np.subtract(getattr(self, name), getattr(self, other))
        count = len(differences)
        error = differences.std(ddof=1) / np.sqrt(count) if count > 2 else 0.0
        return a - b > max(by * abs(b), ERRORS * error)


def no_batches(like: Moments) -> Batches:
    """Return the identity of `add_batch`, in the shape and dtypes of some moments."""
    none = jax.tree.map(jnp.zeros_like, Moments(*like[:3]))
    return Batches(none, none._replace(mean=none.var), jnp.zeros(like.mean.shape, bool))


def add_batch(batches: Batches, batch: Moments, nonfinite: jax.Array) -> Batches:
    """Count one more batch."""
    once = (batch.count > 0).astype(batch.count.dtype)
    nothing = jnp.zeros_like(batch.var)
    return Batches(
        apply_update_rule(pooled(), batches.means, Moments(batch.mean, nothing, once)),
        apply_update_rule(pooled(), batches.vars, Moments(batch.var, nothing, once)),
        batches.nonfinite | nonfinite,
    )


def layer_record(
    inputs: Iterable[ArrayLike],
    running: Moments,
    params: Params = Params(None, None),
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    update: UpdateRule | None = None,
    frozen: bool = False,
) -> LayerRecord:
    """Make the record of a layer that is called as a pure function, for `diagnose`.

    Args:
      inputs: `x` of each batch, as `jbn.batch_norm` gets it in training: the layers before it normalize with
        the batch's own moments.
      running: its running moments.
      params: its scale and bias.
      axis: its feature axis or axes.
      epsilon: its epsilon.
      update: its rule; None for an ema without debiasing.
      frozen: whether it is called with `train=False` in training.

    Returns:
      LayerRecord.

    Raises:
      ValueError: there are no inputs.

    >>> import jax.numpy as jnp, jbn
    >>> from jbn import inspection
    >>> params, running = jbn.init(2)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> record = inspection.layer_record([x, x + 2], running, params)
    >>> print(record.population.mean, record.batches.means.var)
    [ 3. 21.] [1. 1.]
    """
    measured = [moments(x, axis=axis) for x in inputs]
    if not measured:
        raise ValueError("inputs is empty; expected x of one batch at least.")
    population = jax.tree.map(jnp.zeros_like, measured[0])
    batches = no_batches(population)
    for batch in measured:
        nonfinite = (batch.count > 0) & ~(jnp.isfinite(batch.mean) & jnp.isfinite(batch.var))
        population = apply_update_rule(pooled(), population, batch)
        usable = batch._replace(count=jnp.where(nonfinite, 0, batch.count))
        batches = add_batch(batches, usable, nonfinite)
    has_count = update is not None and bool(np.any(np.asarray(running.count) > 0))
    return LayerRecord(
        running, population, batches, params, epsilon, update, frozen=frozen, has_count=has_count
    )
