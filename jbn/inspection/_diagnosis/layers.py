"""What is known of one layer: the numbers that the verdict, the table and the picture are made from."""

from typing import NamedTuple

import numpy as np

from jbn.inspection._diagnosis.patterns import Gaussians, typical

Array = np.ndarray


class LayerDiagnosis(NamedTuple):
    """One batch norm. Arrays are (features,), of several feature axes flattened."""

    name: str  # as in the records; a path in models of Flax
    shape: tuple[int, ...]  # of the features
    divergence: Array  # of the running moments from the population, in nats; NaN if unknown
    running: Gaussians  # the mean and the variance that the layer has
    population: Gaussians  # those of all its inputs
    within: Array  # the variance within a typical batch
    of_means: Array  # the variance of the means of batches
    of_vars: Array  # the variance of the variances of batches
    samples: float  # that a feature has in a batch
    epsilon: float  # of the layer
    momentum: float | None  # of an exponential average; None for other rules
    is_debiased: bool  # whether its rule divides out the initial statistics
    frozen: bool  # whether it normalizes with the running moments in training
    untouched: bool  # whether the running moments are the initial ones
    constant: Array  # Boolean: the same in all examples
    near_zero_scale: Array  # Boolean: |scale| <= 1e-4
    nonfinite_inputs: Array  # Boolean: in some batch
    nonfinite_statistics: Array  # Boolean: NaN or infinite, or a negative variance
    nonfinite_params: Array  # Boolean: scale or bias

    @property
    def kl(self) -> float:
        """The divergence, averaged over features; NaN if it is known of none."""
        known = self.divergence[~np.isnan(self.divergence)]
        return float(known.mean()) if known.size else np.nan

    @property
    def typical_kl(self) -> float:
        """The divergence of typical features, by which the verdict goes."""
        return typical(np.where(self.constant, np.nan, self.divergence))

    @property
    def varying(self) -> Array:
        """The features whose divergence says something: (features,) Boolean."""
        return np.isfinite(self.divergence) & ~self.constant

    def worst(self, most: int = 3) -> list[int]:
        """Return the features of the largest divergences, worst first."""
        order = np.argsort(-np.nan_to_num(self.divergence, nan=-1.0), kind="stable")[:most]
        return [int(i) for i in order if self.divergence[i] > 0]

    def feature(self, index: int) -> str:
        """Name a feature by its index, or its indices if there are several feature axes."""
        return ",".join(str(int(i)) for i in np.unravel_index(index, self.shape))

    def marks(self) -> dict[str, Array]:
        """Return what may be wrong with single features, by its name."""
        return {
            "nonfinite_inputs": self.nonfinite_inputs,
            "nonfinite_statistics": self.nonfinite_statistics,
            "nonfinite_params": self.nonfinite_params,
            "constant": self.constant,
            "near_zero_scale": self.near_zero_scale,
        }
