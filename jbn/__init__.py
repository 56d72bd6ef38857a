"""Batch normalization for JAX: pure functions with explicit running statistics.

Flax users import `jbn.linen` or `jbn.nnx`.
"""

from jbn._folding import as_affine, fold
from jbn._functional import batch_norm, init, normalize
from jbn._normalization import Params
from jbn._running import cumulative, ema, pooled
from jbn._statistics import Moments, merge, moments
from jbn._warnings import OneValueWarning

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "OneValueWarning",
    "Params",
    "as_affine",
    "batch_norm",
    "cumulative",
    "ema",
    "fold",
    "init",
    "merge",
    "moments",
    "normalize",
    "pooled",
]
