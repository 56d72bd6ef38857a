"""Measurements of any model: what batch normalization does to its distributions and its loss, and what is
wrong with its running statistics.

Import it as `from jbn import inspection`. Losses are functions of the parameters alone. For a Flax NNX model,
split them off with `graph, params, rest = nnx.split(model, nnx.Param, ...)`, and merge them in the loss with
`nnx.merge(graph, params, rest, copy=True)`.
"""

from jbn.inspection._diagnosis.diagnosis import Diagnosis, diagnose
from jbn.inspection._diagnosis.layers import LayerDiagnosis
from jbn.inspection._diagnosis.records import LayerRecord, Losses, layer_record
from jbn.inspection._diagnosis.sentences import Finding
from jbn.inspection._distributions import mean_slope, movement, percentiles
from jbn.inspection._identity import identity_params
from jbn.inspection._landscape import Landscape, along_gradient
from jbn.inspection._layers import Layers, split_layers
from jbn.inspection._shift import GradientShift, gradient_shift

__all__ = [
    "Diagnosis",
    "Finding",
    "GradientShift",
    "Landscape",
    "LayerDiagnosis",
    "LayerRecord",
    "Layers",
    "Losses",
    "along_gradient",
    "diagnose",
    "gradient_shift",
    "identity_params",
    "layer_record",
    "mean_slope",
    "movement",
    "percentiles",
    "split_layers",
]
