"""Flax Linen modules."""

from jbn.linen._normalization import BatchNorm

__all__ = ["BatchNorm"]
