"""Batch normalization for JAX: pure functions with explicit running statistics.

Flax users import `jbn.linen` or `jbn.nnx`.
"""

from jbn._batch_norm import batch_norm, batch_renorm
from jbn._blending import blend
from jbn._functional import init, normalize
from jbn._params import Params
from jbn._renorm import renorm_limits
from jbn._running import cumulative, ema, keep, pooled
from jbn._statistics import Moments, merge, moments
from jbn._tools.folding import as_affine, fold
from jbn._tools.torch import from_torch, to_torch
from jbn._tools.trees import merge_trees
from jbn._warnings import OneValueWarning

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "OneValueWarning",
    "Params",
    "as_affine",
    "batch_norm",
    "batch_renorm",
    "blend",
    "cumulative",
    "ema",
    "fold",
    "from_torch",
    "init",
    "keep",
    "merge",
    "merge_trees",
    "moments",
    "normalize",
    "pooled",
    "renorm_limits",
    "to_torch",
]
