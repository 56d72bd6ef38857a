"""Flax NNX modules."""

from jbn.nnx._normalization import BatchNorm

__all__ = ["BatchNorm"]
