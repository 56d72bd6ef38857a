"""Batch normalization for Flax NNX: the layer, and tools for any NNX model that has batch norms.

It needs Flax: `pip install "jbn[flax]"`.
"""

from jbn._tools.masks import batch_norm_mask
from jbn.nnx._batch_norm import BatchNorm
from jbn.nnx._convert import convert
from jbn.nnx._diagnosis import diagnose
from jbn.nnx._recalibration import recalibrate
from jbn.nnx._torch import load_torch

__all__ = ["BatchNorm", "batch_norm_mask", "convert", "diagnose", "load_torch", "recalibrate"]
