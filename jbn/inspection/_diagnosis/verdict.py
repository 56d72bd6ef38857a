"""What is wrong, computed from the numbers of all layers: each kind of illness by what it alone does."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jbn.inspection._diagnosis import sentences as say
from jbn.inspection._diagnosis.differences import find_differences
from jbn.inspection._diagnosis.layers import LayerDiagnosis
from jbn.inspection._diagnosis.records import Losses
from jbn.inspection._diagnosis.sentences import Finding


class Evidence(NamedTuple):
    """All that a verdict is made from."""

    layers: Sequence[LayerDiagnosis]  # in the order of their calls
    losses: Losses | None
    examples: int
    data_are_finite: bool


def find(evidence: Evidence) -> tuple[Finding, ...]:
    """Return what is wrong, worst first."""
    layers = evidence.layers
    found = [*_nonfinite(evidence)]
    single = [layer for layer in layers if 0 < layer.samples <= 1]
    if single:
        found.append(say.one_value(single))
    untouched = [layer for layer in layers if layer.untouched]
    if untouched:
        found.append(_untouched(evidence, untouched, is_reliable=not single))
    touched = [layer for layer in layers if not layer.untouched and layer.varying.any()]
    scaled = None
    if touched and not single:
        differing, scaled = find_differences(touched, layers[0], evidence.losses, evidence.examples)
        found += differing
    dead = [layer for layer in layers if layer.constant.any() and layer is not scaled]
    if dead and not single:
        found.append(say.constant(dead))
    if off := [layer for layer in layers if layer.near_zero_scale.any()]:
        found.append(say.near_zero_scale(off))
    return tuple(found)


def _nonfinite(evidence: Evidence) -> list[Finding]:
    """Say where values that are not finite come from; what a layer gets follows from the ones before."""
    found, layers = [], evidence.layers
    params = [layer for layer in layers if layer.nonfinite_params.any()]
    first = next((layer for layer in layers if layer.nonfinite_inputs.any()), None)
    if not evidence.data_are_finite:
        found.append(say.nonfinite_data())
    elif first is not None and not (params and layers.index(params[0]) < layers.index(first)):
        found.append(say.nonfinite_inputs(first, is_first=first is layers[0]))
    if params:
        found.append(say.nonfinite_params(params))
    if statistics := [layer for layer in layers if layer.nonfinite_statistics.any()]:
        found.append(say.nonfinite_statistics(statistics))
    losses = evidence.losses
    if not found and losses is not None and not np.isfinite(losses.means()["batch"]):
        found.append(say.nonfinite_loss())
    return found


def _untouched(evidence: Evidence, untouched: list[LayerDiagnosis], *, is_reliable: bool) -> Finding:
    """Tell statistics that the network was trained with from those that nobody has kept."""
    frozen, losses = all(layer.frozen for layer in untouched), evidence.losses
    if losses is not None and is_reliable:
        means = losses.means()
        # What it was trained with is what it is good with.
        frozen = frozen or means["running"] < min(means["batch"], means["recalibrated"])
    if frozen:
        return say.frozen_from_the_start(untouched, len(evidence.layers), has_losses=losses is not None)
    return say.never_updated(untouched, len(evidence.layers))
