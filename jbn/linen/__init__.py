"""Flax Linen modules."""

from jbn.linen.normalization import BatchNorm

__all__ = ["BatchNorm"]
