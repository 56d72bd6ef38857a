"""Batch normalization for Flax Linen: the layer, and tools for any Linen model that has batch norms.

It needs Flax: `pip install "jbn[flax]"`.
"""

from jbn._tools.masks import batch_norm_mask
from jbn.linen._batch_norm import BatchNorm
from jbn.linen._diagnosis import diagnose
from jbn.linen._folding.folding import fold, without_norms
from jbn.linen._folding.pairs import find_pairs
from jbn.linen._override import override
from jbn.linen._recalibration import recalibrate
from jbn.linen._torch import load_torch

__all__ = [
    "BatchNorm",
    "batch_norm_mask",
    "diagnose",
    "find_pairs",
    "fold",
    "load_torch",
    "override",
    "recalibrate",
    "without_norms",
]
