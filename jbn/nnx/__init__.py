"""Flax NNX modules."""

from jbn.nnx.normalization import BatchNorm

__all__ = ["BatchNorm"]
