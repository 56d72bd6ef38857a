"""Measurements of any model: what batch normalization does to its distributions and its loss.

Import it as `from jbn import inspection`. Losses are functions of the parameters alone. For a Flax NNX model,
split them off with `graph, params, rest = nnx.split(model, nnx.Param, ...)`, and merge them in the loss with
`nnx.merge(graph, params, rest, copy=True)`.
"""

from jbn.inspection._distributions import mean_slope, movement, percentiles
from jbn.inspection._identity import identity_params
from jbn.inspection._landscape import Landscape, along_gradient
from jbn.inspection._layers import Layers, split_layers
from jbn.inspection._shift import GradientShift, gradient_shift

__all__ = [
    "GradientShift",
    "Landscape",
    "Layers",
    "along_gradient",
    "gradient_shift",
    "identity_params",
    "mean_slope",
    "movement",
    "percentiles",
    "split_layers",
]
