"""Batch normalization as a Flax NNX module. It needs Flax: `pip install "jbn[flax]"`."""

from jbn.nnx._batch_norm import BatchNorm
from jbn.nnx._convert import convert
from jbn.nnx._diagnosis import diagnose
from jbn.nnx._recalibration import recalibrate

__all__ = ["BatchNorm", "convert", "diagnose", "recalibrate"]
