"""Batch normalization as a Flax NNX module. It needs Flax: `pip install "jbn[flax]"`."""

from jbn.nnx._batch_norm import BatchNorm

__all__ = ["BatchNorm"]
