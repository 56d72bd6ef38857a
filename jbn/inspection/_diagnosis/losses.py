"""The losses of a diagnosis over all batches, and which of them are clearly different."""

from typing import NamedTuple

import numpy as np

# A loss is clearly worse if it is by a fifth, and by three standard errors of the difference over batches.
WORSE, ERRORS = 0.2, 3.0


class MeanLosses(NamedTuple):
    """The loss of each batch, (batches,) each, by the statistics that the network normalizes with."""

    running: np.ndarray
    batch: np.ndarray
    recalibrated: np.ndarray
    mismatched: np.ndarray  # with the running statistics, but the outputs of other examples
    sizes: np.ndarray

    def works(self) -> bool:
        """Return whether the network is as good with its running statistics as it gets, and not by chance."""
        means = self.means()
        best = min(means["batch"], means["recalibrated"])
        return means["running"] < best + 0.1 * abs(best) and self.is_worse("mismatched", "running", by=0.5)

    def means(self) -> dict[str, float]:
        """Return the losses over all examples."""
        weights = self.sizes / self.sizes.sum()
        return {name: float(np.sum(weights * getattr(self, name))) for name in self._fields[:4]}

    def is_worse(self, name: str, other: str, by: float = WORSE) -> bool:
        """Return whether a loss is clearly higher than another; what is not finite is."""
        a, b = self.means()[name], self.means()[other]
        if not np.isfinite(a) or not np.isfinite(b):
            return np.isfinite(b).item()
        differences = getattr(self, name) - getattr(self, other)
        count = len(differences)
        error = differences.std(ddof=1) / np.sqrt(count) if count > 2 else 0.0
        return a - b > max(by * abs(b), ERRORS * error)
