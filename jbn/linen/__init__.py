"""Batch normalization as a Flax Linen module. It needs Flax: `pip install "jbn[flax]"`."""

from jbn.linen._batch_norm import BatchNorm
from jbn.linen._diagnosis import diagnose
from jbn.linen._override import override
from jbn.linen._recalibration import recalibrate

__all__ = ["BatchNorm", "diagnose", "override", "recalibrate"]
