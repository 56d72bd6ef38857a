"""Batch normalization for JAX: pure functions with explicit running statistics.

Flax users import `jbn.linen` or `jbn.nnx`.
"""

from jbn.checks import OneValueWarning
from jbn.functional import batch_norm, init, normalize
from jbn.normalization import Params
from jbn.running import cumulative, ema, pooled
from jbn.statistics import Moments, merge, moments

__all__ = [
    "Moments",
    "OneValueWarning",
    "Params",
    "batch_norm",
    "cumulative",
    "ema",
    "init",
    "merge",
    "moments",
    "normalize",
    "pooled",
]
