"""By what running statistics differ from those of the data: how far, and in which of the known ways.

All of it in NumPy and float64, on one axis of features.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Gaussians(NamedTuple):
    """A mean and a variance for each feature, (features,) float64."""

    mean: Array
    var: Array


def divergence(running: Gaussians, population: Gaussians, epsilon: float) -> Array:
    """Return the divergence of a normal distribution of the running moments from the population's.

        KL = 1/2 (v_r/v + |mean_r - mean|^2/v - 1 - log(v_r/v)),  v = var + epsilon

    in nats, (features,). Epsilon is in both variances, as in what the layer divides by, so that a feature
    that is constant in both has 0. NaN and infinity stay.
    """
    with np.errstate(all="ignore"):
        v, v_r = population.var + epsilon, running.var + epsilon
        squared = np.abs(running.mean - population.mean) ** 2 / v
        # log1p, or nearly equal variances would be rounded to less than 0.
        return 0.5 * (squared + (v_r - v) / v - np.log1p((v_r - v) / v))


def typical(values: Array) -> float:
    """Return the mean without the largest tenth: a few rare features do not speak for a layer."""
    kept = np.sort(values[np.isfinite(values)])
    return float(kept[: len(kept) - len(kept) // 10].mean()) if kept.size else 0.0


class Lag(NamedTuple):
    """How much of the initial statistics is left in the running ones."""

    share: float  # running = share * initial + (1 - share) * population
    left: float  # the divergence that this does not explain


# Finer towards 1, where the decay is slow and the batches few.
SHARES = tuple(np.concatenate([np.linspace(0, 0.9, 46), 1 - np.geomspace(0.1, 1e-4, 40)]))


def lag(layers: Sequence[tuple[Gaussians, Gaussians, float]], shares: Sequence[float] = SHARES) -> Lag:
    """Fit one share of the initial mean 0 and variance 1 to several layers: (running, population, epsilon).

    An exponential average of decay m has m^n of them after n batches, the same in every layer.
    """

    def left(share):
        return typical_of(
            layers, lambda running, p: (running, Gaussians((1 - share) * p.mean, share + (1 - share) * p.var))
        )

    best = min(shares, key=left)
    return Lag(float(best), left(best))


class Scaling(NamedTuple):
    """Data that are `factor * x + constant`, where the running statistics are of `x`."""

    factor: float
    shifted: bool  # whether the means are off by more than the factor
    left: float  # the divergence that this does not explain


def scaling(running: Gaussians, population: Gaussians, epsilon: float) -> Scaling:
    """Fit the factor and the constant by which all features of a layer differ.

    The constant is of each feature, because it comes through the weights before the layer, and the factor
    common.
    """
    varies = (running.var > 0) & (population.var > 0)
    if not varies.any():
        return Scaling(1.0, False, np.inf)
    factor = float(np.exp(0.5 * np.median(np.log(population.var[varies] / running.var[varies]))))
    scaled = Gaussians(factor * running.mean, factor**2 * running.var)
    moved = scaled._replace(mean=population.mean)
    left, left_moved = (typical(divergence(g, population, epsilon)) for g in (scaled, moved))
    # A factor alone has to do better by a tenth of a deviation, or it would always lose to a constant more.
    shifted = left > 3 * left_moved + 0.005
    return Scaling(factor, shifted, left_moved if shifted else left)


def typical_of(
    layers: Sequence[tuple[Gaussians, Gaussians, float]],
    change: Callable[[Gaussians, Gaussians], tuple[Gaussians, Gaussians]] = lambda running, p: (running, p),
) -> float:
    """Return the mean over layers of the typical divergence, of what `change` makes of both moments."""
    found = [typical(divergence(*change(running, p), epsilon)) for running, p, epsilon in layers]
    return float(np.mean(found)) if found else 0.0
