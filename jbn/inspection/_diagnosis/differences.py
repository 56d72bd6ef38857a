"""In which way the running statistics of a network differ from the population's."""

from collections.abc import Sequence

import numpy as np

from jbn.inspection._diagnosis import sentences as say
from jbn.inspection._diagnosis.layers import LayerDiagnosis
from jbn.inspection._diagnosis.patterns import Gaussians, Scaling, divergence, lag, scaling, typical
from jbn.inspection._diagnosis.records import Losses
from jbn.inspection._diagnosis.sentences import Finding

# Nats of a typical feature, from which on a layer's statistics are called wrong: a mean that is off by a
# third of a standard deviation, or a standard deviation off by a quarter. Averages of momentum 0.9 over
# batches of 8 have 0.01 to 0.02 from their noise and the variance within a batch, which is 7/8 of the whole;
# over batches of 2 they have 0.1 and more.
ALLOWED = 0.05
# Half as much counts where the loss suffers too.
IF_LOSS_SUFFERS = 0.5
# Nats times examples that the moments of a finite sample differ by: 1/2 from the mean and (kurtosis - 1) / 4
# from the variance, which is 2 for a kurtosis of 7, as of rectified inputs; and three times that, which the
# average over features hardly ever exceeds.
SAMPLING = 6.0
# A pattern explains a difference if it leaves less than this part of it.
EXPLAINED = 1 / 3
# The samples of a batch below which its own loss says nothing of the network.
SMALL = 8
# A momentum that averages over at most 40 batches, in which weights move little.
SHORT = 0.95
# Nats times samples by which layers differ then: 0.11 in batches of 2, and twice that to be sure.
OWN_MOMENTS = 0.5
# Nats that no network stands that was not trained with such statistics: a mean off by 0.8 deviations.
LARGE = 0.3
# Other data leave the layers after the first with less than this part of its difference: a tenth if they are
# other pictures, next to nothing if they are scaled. What statistics of earlier weights leave is more.
FIRST = 0.1


def find_differences(
    layers: list[LayerDiagnosis], entry: LayerDiagnosis, losses: Losses | None, examples: int
) -> tuple[list[Finding], LayerDiagnosis | None]:
    """Say in which way running statistics differ from the population's; and which layer's data are others.

    The patterns are tried from the most particular to the least.

    Args:
      layers: those that were updated and have features that vary, in the order of calls.
      entry: the layer that is called first, be it among these or not.
    """
    found = []
    suffers = None if losses is None else losses.is_worse("running", "recalibrated")
    allowed = ALLOWED * (IF_LOSS_SUFFERS if suffers else 1) + SAMPLING / max(examples, 1)
    # Small batches, normalized with their own moments, change what the layers after the first get.
    slack = {layer.name: OWN_MOMENTS / layer.samples for layer in layers[1:] if layer.samples < SMALL}
    differing = [layer for layer in layers if layer.typical_kl > allowed + slack.get(layer.name, 0)]
    if not differing:
        return [], None
    # A network may also stand other data, where all but the first layer agree.
    deeper = _typical_of(layers[1:]) > FIRST * layers[0].typical_kl
    works = losses is not None and losses.works() and (deeper or losses.is_worse("recalibrated", "running"))
    if works and _is_large(differing):
        return [say.frozen_otherwise(differing)], None
    share = _lag(layers, allowed)
    if share:
        lagging = [layer for layer in differing if not layer.is_debiased]
        found.append(say.lagging(lagging, share))
        if lagging and lagging[0] is entry and (other := _other_data_behind_lag(layers)):
            found.append(other)
        differing = [layer for layer in differing if layer.is_debiased]
    if held := [layer for layer in differing if layer.frozen]:
        found.append(say.frozen_and_wrong(held))
        differing = [layer for layer in differing if not layer.frozen]
    if differing and _are_of_small_batches(differing, layers):
        return [*found, say.noisy(differing)], None
    first = layers[0]
    other = None
    if first is entry and any(layer is first for layer in differing):
        other = _other_data(first, layers[1:])
    if other:
        found.append(other)
        # What is left is what the new data do to deeper layers.
        differing = [layer for layer in differing[1:] if layer.typical_kl > FIRST * first.typical_kl]
    if differing:
        found.append(say.other_statistics(differing, suffers=suffers))
    return found, first if other else None


def _is_large(differing: Sequence[LayerDiagnosis]) -> bool:
    """Return whether a network that was not trained with these statistics would suffer."""
    return max(layer.typical_kl for layer in differing) > LARGE and all(
        layer.samples >= SMALL for layer in differing
    )


def _lag(layers: Sequence[LayerDiagnosis], allowed: float) -> float:
    """Return the share of the initial statistics, if it is the same in all layers and explains them; or 0."""
    able = [layer for layer in layers if not layer.is_debiased]
    # The first may differ because of other data, which has to be told from this by the others.
    judged = [layer for layer in able if layer is not layers[0]] or able
    before = _typical_of(judged)
    if not judged or before < allowed / 5:
        return 0.0
    fit = lag([_fitted(layer) for layer in judged])
    if fit.left > EXPLAINED * before:
        return 0.0
    # That share of the initial variance is in every layer, whatever its data are; and no layer that agrees
    # with its data would do so with it.
    if any(np.quantile(_fitted(layer)[0].var, 0.25) < 0.9 * fit.share for layer in able):
        return 0.0
    agreeing = [layer for layer in able if layer.typical_kl <= allowed]
    if any(lag([_fitted(a)], [fit.share]).left > a.typical_kl + allowed / 5 for a in agreeing):
        return 0.0
    # Of a single layer either may explain much.
    is_scaled = judged == able and scaling(*_fitted(able[0])).left < fit.left
    return 0.0 if is_scaled else fit.share


def _other_data(first: LayerDiagnosis, others: Sequence[LayerDiagnosis]) -> Finding | None:
    """Say that the data are not those of training, if the first layer is off and those after it are not.

    With the batch's own statistics, every layer after the first gets what it got in training: the first
    normalizes away what the data were scaled by, and most of other changes.
    """
    fit = scaling(*_fitted(first))
    is_explained = fit.left < EXPLAINED * first.typical_kl
    if fit.shifted:  # a constant of each feature explains much by itself: then it has to be nearly all
        is_explained = fit.left < min(0.1 * first.typical_kl, ALLOWED / 2)
    if _typical_of(others) > FIRST * first.typical_kl or not (others or is_explained):
        return None
    return say.other_data(first, fit if is_explained else None, alone=not others)


def _other_data_behind_lag(layers: Sequence[LayerDiagnosis]) -> Finding | None:
    """Say that data are scaled where statistics lag: running means are another share of the means there."""
    first, *others = layers
    slopes = [_slope_of_means(layer) for layer in others]
    slope = _slope_of_means(first)
    if not slope or not (known := [found for found in slopes if found]):
        return None
    factor = float(np.median(known) / slope)
    # What the weights have changed meanwhile is within a fifth or so.
    if 1 / 1.6 < factor < 1.6:
        return None
    return say.other_data(first, Scaling(factor, False, 0.0), alone=False)


def _slope_of_means(layer: LayerDiagnosis) -> float | None:
    """Return by which share of the population's means the running ones are, if they are in proportion."""
    running, population, _ = _fitted(layer)
    deviations = np.sqrt(np.maximum(population.var, np.finfo(np.float32).tiny))
    a, b = np.real(running.mean) / deviations, np.real(population.mean) / deviations
    product = a @ b
    return float(product / (b @ b)) if product > 0 and product**2 > 0.8 * (a @ a) * (b @ b) else None


def _are_of_small_batches(differing: Sequence[LayerDiagnosis], layers: Sequence[LayerDiagnosis]) -> bool:
    """Return whether running statistics are those of small batches, be they of the size here or of another.

    The variance within n samples is (n - 1)/n of the whole, and the mean the same. The layers after the first
    differ too, but by less, as they get what small batches make of it.
    """
    if any(layer.momentum is None for layer in differing):
        return False
    if 2 * sum(map(_is_noise, differing)) > len(differing):
        return True
    first, *others = layers
    if not any(first is layer for layer in differing):
        return False
    running, population, epsilon = _fitted(first)
    ratio = float(np.median((running.var + epsilon) / (population.var + epsilon)))
    left = typical(divergence(running, Gaussians(population.mean, ratio * population.var), epsilon))
    moved = typical(np.abs(running.mean - population.mean) ** 2 / (population.var + epsilon))
    scaled = scaling(running, population, epsilon)
    if others and _typical_of(others) < 0.05 * first.typical_kl or not scaled.shifted and scaled.left < left:
        return False
    # The means of such batches are noisy: a variance that is too small while they are not is of other data.
    # A tenth of what is expected, because few directions of the data may be behind all features.
    momentum = first.momentum or 0.0
    if moved < 0.1 * (1 - momentum) / (1 + momentum) * (1 - ratio):
        return False
    # From 1/2, for batches of 2, to 7/8, with room for their own noise.
    # Averages over few batches have no other reason; those over many may be of weights that have moved.
    return 0.3 < ratio < 0.9 and moved < 0.1 and (momentum <= SHORT or left < 0.6 * first.typical_kl)


def _is_noise(layer: LayerDiagnosis) -> bool:
    """Return whether the noise of batches, and the variance that is not within one, explain the difference.

    An average of decay m is that of (1 + m) / (1 - m) independent batches.
    """
    if layer.momentum is None:
        return False
    v = layer.population.var + layer.epsilon
    share = (1 - layer.momentum) / (1 + layer.momentum)
    noise = share * (0.5 * layer.of_means / v + 0.25 * layer.of_vars / v**2)
    within = Gaussians(layer.population.mean, layer.within)
    expected = noise + divergence(within, layer.population, layer.epsilon)
    return layer.typical_kl < 4 * typical(expected[layer.varying])


def _fitted(layer: LayerDiagnosis) -> tuple[Gaussians, Gaussians, float]:
    kept = layer.varying
    running, population = (Gaussians(g.mean[kept], g.var[kept]) for g in (layer.running, layer.population))
    return running, population, layer.epsilon


def _typical_of(layers: Sequence[LayerDiagnosis]) -> float:
    return float(np.mean([layer.typical_kl for layer in layers])) if layers else 0.0
