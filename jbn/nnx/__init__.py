"""Batch normalization as a Flax NNX module. It needs Flax: `pip install "jbn[flax]"`."""

from jbn._masks import batch_norm_mask
from jbn.nnx._batch_norm import BatchNorm
from jbn.nnx._torch import load_torch

__all__ = ["BatchNorm", "batch_norm_mask", "load_torch"]
