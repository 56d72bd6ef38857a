"""Findings in words: what it is, and what to do."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jbn.inspection._diagnosis.layers import LayerDiagnosis
from jbn.inspection._diagnosis.patterns import Scaling

Layers = Sequence[LayerDiagnosis]


class Finding(NamedTuple):
    """One thing that is wrong."""

    kind: str  # "not finite", "one value", "never updated", "frozen", "other data", "lag", "noise"...
    layers: tuple[str, ...]  # the names of those concerned, in the order of calls
    what: str  # it is, in a sentence
    remedy: str  # what to do, in a sentence


def nonfinite_data() -> Finding:
    return Finding(
        "not finite",
        (),
        "The data hold NaN or infinite values, with which no statistics can be measured.",
        "Look at how they are read and preprocessed, such as a division by a standard deviation of 0.",
    )


def nonfinite_inputs(layer: LayerDiagnosis, *, is_first: bool) -> Finding:
    before = (
        "in the weights before it" if is_first else "in the weights between it and the batch norm before it"
    )
    return Finding(
        "not finite",
        (layer.name,),
        f"{layer.name} is the first that is called with NaN or infinite values, in "
        f"{_features(layer, layer.nonfinite_inputs)}; the data are finite.",
        f"Look for them {before}, and go back to a checkpoint without them.",
    )


def nonfinite_params(layers: Layers) -> Finding:
    first = layers[0]
    return Finding(
        "not finite",
        _names(layers),
        f"Scale or bias of {_named(layers)} is NaN or infinite, in {_features(first, first.nonfinite_params)}"
        + (f" of {first.name}." if len(layers) > 1 else "."),
        "Go back to a checkpoint without them; a lower learning rate or clipped gradients prevent them.",
    )


def nonfinite_statistics(layers: Layers) -> Finding:
    first = layers[0]
    return Finding(
        "not finite",
        _names(layers),
        f"The running statistics of {_named(layers)} are NaN, infinite or of negative variance, in "
        f"{_features(first, first.nonfinite_statistics)}"
        + (f" of {first.name}." if len(layers) > 1 else "."),
        "Recalibrate them; with jbn's layers a batch that is not finite leaves them as they were.",
    )


def nonfinite_loss() -> Finding:
    return Finding(
        "not finite",
        (),
        "The loss is NaN or infinite, though all that the batch norms get and have is finite.",
        "Look at the weights after the last batch norm, and at the loss itself.",
    )


def one_value(layers: Layers) -> Finding:
    return Finding(
        "one value",
        _names(layers),
        f"{_named(layers)} gets one value per feature in a batch: the variance is 0, and only the bias "
        "comes out.",
        "Take larger batches, in training and for the diagnosis, whose other results mean nothing here.",
    )


def never_updated(layers: Layers, of: int) -> Finding:
    whose = _whose(layers, of)
    cause = (
        "Keep what training returns (updated['batch_stats'] in Linen)"
        if len(layers) == of
        else "Load their statistics too, if a checkpoint has them, or train them longer"
    )
    return Finding(
        "never updated",
        _names(layers),
        f"The running statistics of {whose} are still the initial ones, mean 0 and variance 1: "
        f"{_named(layers)}.",
        f"{cause}; recalibrate to repair this model without training it.",
    )


def frozen_from_the_start(layers: Layers, of: int, *, has_losses: bool) -> Finding:
    whose = _whose(layers, of)
    return Finding(
        "frozen",
        _names(layers),
        f"The running statistics of {whose} are frozen at the initial mean 0 and variance 1, which "
        f"normalizes nothing: {_named(layers)}."
        + (" The network was trained that way." if has_losses else ""),
        "Train with frozen=False and use_running_average=False; recalibrating this model would spoil it.",
    )


def frozen_otherwise(layers: Layers) -> Finding:
    return Finding(
        "frozen",
        _names(layers),
        "The network works with its running statistics and not with those of the data: it was trained with "
        f"them frozen, as they came from elsewhere, in {_named(layers)}.",
        "Train with frozen=False and use_running_average=False if that was not meant; do not recalibrate.",
    )


def frozen_and_wrong(layers: Layers) -> Finding:
    return Finding(
        "frozen",
        _names(layers),
        f"{_named(layers)} is frozen with statistics that are not those of the data.",
        "Train with frozen=False, or recalibrate if the other weights were trained with batch statistics.",
    )


def lagging(layers: Layers, share: float) -> Finding:
    momentum = max((layer.momentum for layer in layers if layer.momentum is not None), default=None)
    at = "" if momentum is None else f" with momentum {momentum:g}"
    return Finding(
        "lag",
        _names(layers),
        f"Running statistics lag behind: about {100 * share:.0f} % of them are still the initial mean 0 and "
        f"variance 1, since too few batches were averaged{at}, in {_named(layers)}.",
        "Recalibrate, or train with update=jbn.ema(momentum, debias=True), a lower momentum, or longer.",
    )


def noisy(layers: Layers) -> Finding:
    momentum = max((layer.momentum for layer in layers if layer.momentum is not None), default=None)
    average = (
        ""
        if momentum is None
        else f"; momentum {momentum:g} averages over about {(1 + momentum) / (1 - momentum):.0f} batches"
        if momentum < 1
        else ""
    )
    return Finding(
        "noise",
        _names(layers),
        "Running statistics are those of few samples: noisy, and of too small a variance, as within small "
        f"batches{average}, in {_named(layers)}.",
        "Train with larger batches or a slower momentum (nearer to 1); recalibrate to repair this model.",
    )


def other_data(layer: LayerDiagnosis, fit: Scaling | None, *, alone: bool) -> Finding:
    if fit is None:
        how = "distributed otherwise than in training, and not by a common factor alone"
        cause = "such as the order of channels, or a different preprocessing"
    else:
        scaled = not 0.87 < fit.factor < 1.15
        factor = f"{_factor(fit.factor)} times as large as" if scaled else ""
        how = factor + " in training" * bool(factor)
        if fit.shifted:
            how = (
                f"{how}, and shifted by a constant"
                if scaled
                else "shifted by a constant from those of training"
            )
        cause = "such as a division by 255 or by the standard deviation, or a mean that is subtracted"
    return Finding(
        "other data",
        (layer.name,),
        f"The data are {how}: {layer.name}, the first layer, gets what its running statistics do not "
        "describe"
        + ("." if alone else ", while those after it agree once it normalizes with the batch's own."),
        f"Preprocess them as in training ({cause}); recalibrate only if the new data are what is meant.",
    )


def other_statistics(layers: Layers, *, suffers: bool | None) -> Finding:
    loss = {True: ", and the loss suffers", False: ", though the loss does not suffer", None: ""}[suffers]
    return Finding(
        "other statistics",
        _names(layers),
        f"The running statistics of {_named(layers)} are not those of the data{loss}: they are of other "
        "weights or other data.",
        "Recalibrate, as after averaging weights or on new data, or train with a faster momentum; if the "
        "recalibrated loss is bad too, look at the preprocessing.",
    )


def constant(layers: Layers) -> Finding:
    return Finding(
        "constant",
        _names(layers),
        "Features are the same in all examples, so that only the bias comes out: "
        f"{_where(layers, 'constant')}.",
        "Dead units before the layer (weights of 0, ReLUs that are never active) or constant inputs: remove "
        "them, or train with a lower learning rate.",
    )


def near_zero_scale(layers: Layers) -> Finding:
    return Finding(
        "scale near 0",
        _names(layers),
        f"Features are scaled to nothing (|scale| <= 1e-4): {_where(layers, 'near_zero_scale')}.",
        "Weight decay on scales does that, as does an initial 0 that was not trained: mask it, or prune.",
    )


def _names(layers: Layers) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _whose(layers: Layers, of: int) -> str:
    if of == 1:
        return "the only layer"
    return f"all {of} layers" if len(layers) == of else f"{len(layers)} of {of} layers"


def _named(layers: Layers, most: int = 3) -> str:
    names = list(_names(layers))
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _where(layers: Layers, mark: str, most: int = 4) -> str:
    shown = [f"{_features(layer, layer.marks()[mark])} of {layer.name}" for layer in layers[:most]]
    more = [f"and in {len(layers) - most} more layers"] * (len(layers) > most)
    return "; ".join(shown + more)


def _features(layer: LayerDiagnosis, mark: np.ndarray, most: int = 5) -> str:
    marked = np.flatnonzero(mark)
    if len(marked) == len(mark):
        return f"all {len(mark)} features" if len(mark) > 1 else "its only feature"
    shown = ", ".join(layer.feature(i) for i in marked[:most])
    more = f" and {len(marked) - most} more" if len(marked) > most else ""
    return f"feature{'s' * (len(marked) > 1)} {shown}{more}"


def _factor(factor: float) -> str:
    """Write a factor, or 1 over it, as far as it is known."""
    size = max(factor, 1 / factor)
    whole = round(size)
    size = whole if abs(size - whole) < 0.04 * size and whole < 20 else float(f"{size:.2g}")
    return f"about {size:g}" if factor >= 1 else f"about 1/{size:g}"
