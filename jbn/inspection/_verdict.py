"""What is wrong, computed from the numbers of all layers: each kind of illness by what it alone does."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jbn.inspection import _sentences as say
from jbn.inspection._layer_diagnosis import LayerDiagnosis
from jbn.inspection._patterns import Gaussians, divergence, lag, scaling, typical
from jbn.inspection._sentences import Finding

# Nats of a typical feature, from which on a layer's statistics are called wrong: a mean that is off by a
# third of a standard deviation, or a standard deviation off by a quarter. Averages of momentum 0.9 over
# batches of 8 have 0.01 to 0.02 from their noise and the variance within a batch, which is 7/8 of the whole;
# over batches of 2 they have 0.1 and more.
ALLOWED = 0.05
# Where there are losses, they decide what lies between: half as much where the loss suffers, twice where not.
BY_LOSS = {True: 0.5, False: 2.0, None: 1.0}
# Nats times examples that the moments of a finite sample differ by: 1/2 from the mean and (kurtosis - 1) / 4
# from the variance, which is 2 for a kurtosis of 7, as of rectified inputs; and three times that, which the
# average over features hardly ever exceeds.
SAMPLING = 6.0
# A pattern explains a difference if it leaves less than this part of it.
EXPLAINED = 1 / 3
# A loss is clearly worse if it is by a fifth, and by three standard errors of the difference over batches.
WORSE, ERRORS = 0.2, 3.0
# The rows of a batch below which its own loss says nothing of the network.
SMALL = 8


class MeanLosses(NamedTuple):
    """The loss of each batch, (batches,) each, by the statistics that the network normalizes with."""

    running: np.ndarray
    batch: np.ndarray
    recalibrated: np.ndarray
    sizes: np.ndarray

    def means(self) -> dict[str, float]:
        """Return the three losses over all examples."""
        weights = self.sizes / self.sizes.sum()
        return {name: float(np.sum(weights * getattr(self, name))) for name in self._fields[:3]}

    def is_worse(self, name: str, other: str, by: float = WORSE) -> bool:
        """Return whether a loss is clearly higher than another; what is not finite is."""
        a, b = self.means()[name], self.means()[other]
        if not np.isfinite(a) or not np.isfinite(b):
            return np.isfinite(b).item()
        differences = getattr(self, name) - getattr(self, other)
        count = len(differences)
        error = differences.std(ddof=1) / np.sqrt(count) if count > 2 else 0.0
        return a - b > max(by * abs(b), ERRORS * error)


class Evidence(NamedTuple):
    """All that a verdict is made from."""

    layers: Sequence[LayerDiagnosis]  # in the order of their calls
    losses: MeanLosses | None
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
        differing, scaled = _differing(evidence, touched)
        found += differing
    dead = [layer for layer in layers if layer.constant.any() and layer is not scaled]
    if dead:
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


def _differing(
    evidence: Evidence, layers: list[LayerDiagnosis]
) -> tuple[list[Finding], LayerDiagnosis | None]:
    """Say in which way running statistics differ from the population's; and which layer's data are scaled."""
    losses, found = evidence.losses, []
    suffers = None if losses is None else losses.is_worse("running", "recalibrated")
    allowed = BY_LOSS[suffers] * ALLOWED + SAMPLING / max(evidence.examples, 1)
    differing = [layer for layer in layers if layer.typical_kl > allowed]
    if not differing:
        return [], None
    noisy = [layer for layer in differing if _is_noise(layer)]
    if losses is not None and len(noisy) < len(differing) and min(layer.samples for layer in layers) >= SMALL:
        trained_with = all(losses.is_worse(other, "running", 0.5) for other in ("batch", "recalibrated"))
        if trained_with:
            return [say.frozen_otherwise(differing)], None
    if held := [layer for layer in differing if layer.frozen]:
        return [say.frozen_and_wrong(held)], None

    first, others = layers[0], layers[1:]
    corrected = {layer.name: layer.running for layer in layers}
    share = _lag(others or layers, allowed)
    if share and not others and scaling(*_fitted(first)).left < lag([_fitted(first)]).left:
        share = 0.0  # of one layer either may explain the same
    if share:
        corrected = {layer.name: _debiased(layer.running, share) for layer in layers}
    scaled = None
    if first is evidence.layers[0]:
        scaled = _scaled(first, others, corrected, allowed)
    if scaled:
        found.append(scaled)
    left = [layer for layer in differing if not (scaled and layer is first)]
    if share and left:
        found.append(say.lagging(left, share))
    elif left and _is_mostly_noise(left, layers):
        found.append(say.noisy(left))
    elif left and not (scaled and max(layer.typical_kl for layer in left) < 0.1 * first.typical_kl):
        found.append(say.other_statistics(left, suffers=suffers))
    return found, first if scaled else None


def _fitted(layer: LayerDiagnosis) -> tuple[Gaussians, Gaussians, float]:
    kept = layer.varying
    running, population = (Gaussians(g.mean[kept], g.var[kept]) for g in (layer.running, layer.population))
    return running, population, layer.epsilon


def _lag(layers: Sequence[LayerDiagnosis], allowed: float) -> float:
    """Return the share of the initial statistics, if it is the same in all layers and explains them; or 0."""
    able = [layer for layer in layers if not layer.is_debiased]
    before = typical_of_layers(able)
    if not able or before < allowed / 2:
        return 0.0
    fit = lag([_fitted(layer) for layer in able])
    return fit.share if fit.left < EXPLAINED * before else 0.0


def typical_of_layers(layers: Sequence[LayerDiagnosis]) -> float:
    """Return the mean of the layers' typical divergences."""
    return float(np.mean([layer.typical_kl for layer in layers])) if layers else 0.0


def _debiased(running: Gaussians, share: float) -> Gaussians:
    rest = 1 - share
    var = (running.var - share) / rest
    # Noise may have made it negative: then it is small.
    return Gaussians(running.mean / rest, np.maximum(var, 1e-3 * running.var))


def _scaled(
    first: LayerDiagnosis, others: Sequence[LayerDiagnosis], corrected: dict[str, Gaussians], allowed: float
) -> Finding | None:
    """Say that the data are not those of training, if the first layer is off and those after it are not.

    With the batch's own statistics, every layer after the first normalizes what the data were scaled by away.
    """

    def left(layer):
        kept, of_running = layer.varying, corrected[layer.name]
        return typical(divergence(of_running, layer.population, layer.epsilon)[kept])

    of_first, of_others = left(first), [left(layer) for layer in others]
    if of_first < allowed or of_first < 4 * np.mean(of_others or [0.0]):
        return None
    kept = first.varying
    running = Gaussians(*(values[kept] for values in corrected[first.name]))
    fit = scaling(running, _fitted(first)[1], first.epsilon)
    is_explained = fit.left < EXPLAINED * of_first
    if not others and (not is_explained or _is_noise(first)):
        return None
    return say.other_data(first, fit if is_explained else None)


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


def _is_mostly_noise(differing: Sequence[LayerDiagnosis], layers: Sequence[LayerDiagnosis]) -> bool:
    """Return whether running statistics are those of small batches, be they of this size or of another.

    The variance within n samples is (n - 1)/n of the whole: too small in all layers, by about as much.
    """
    if 2 * sum(map(_is_noise, differing)) > len(differing):
        return True
    if len(differing) < max(2, len(layers) / 2) or any(layer.momentum is None for layer in differing):
        return False
    ratios = [
        np.median(layer.running.var[layer.varying] / np.maximum(layer.population.var[layer.varying], 1e-30))
        for layer in differing
    ]
    biased = [
        Gaussians(layer.population.mean, ratio * layer.population.var)
        for layer, ratio in zip(differing, ratios)
    ]
    left = [
        typical(divergence(layer.running, g, layer.epsilon)[layer.varying])
        for layer, g in zip(differing, biased)
    ]
    # From 1/2, for batches of 2, to 7/8, with room for their own noise.
    return all(0.3 < ratio < 0.9 for ratio in ratios) and np.mean(left) < 0.6 * typical_of_layers(differing)
