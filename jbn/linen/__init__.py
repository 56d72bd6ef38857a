"""Batch normalization as a Flax Linen module. It needs Flax: `pip install "jbn[flax]"`."""

from jbn.linen._batch_norm import BatchNorm

__all__ = ["BatchNorm"]
