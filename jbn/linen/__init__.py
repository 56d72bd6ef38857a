"""Batch normalization as a Flax Linen module. It needs Flax: `pip install "jbn[flax]"`."""

from jbn.linen._batch_norm import BatchNorm
from jbn.linen._folding import fold, without_norms
from jbn.linen._pairs import find_pairs

__all__ = ["BatchNorm", "find_pairs", "fold", "without_norms"]
