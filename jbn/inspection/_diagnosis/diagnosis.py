"""Why a network is good in training and bad in evaluation, from what its batch norms have and get."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jbn._running import cumulative, ema, pooled
from jbn.inspection._diagnosis.layers import LayerDiagnosis
from jbn.inspection._diagnosis.patterns import Gaussians, divergence
from jbn.inspection._diagnosis.picture import draw_layers, draw_losses, save
from jbn.inspection._diagnosis.records import LayerRecord, Losses
from jbn.inspection._diagnosis.sentences import Finding
from jbn.inspection._diagnosis.table import rows, table, worst_first
from jbn.inspection._diagnosis.verdict import Evidence, find

# A feature that varies this little has outputs of a hundredth of the scale or less: epsilon rules the rest.
CONSTANT = 1e-4  # of epsilon
# Examples from which on a feature that is the same in all of them is called constant, whatever the running
# variance says: one that differs in 1 example of 85 would have shown with 95 % (the rule of three).
ENOUGH = 256


class Diagnosis(NamedTuple):
    """What was found. It prints as a table with the verdict."""

    layers: tuple[LayerDiagnosis, ...]  # in the order of their calls
    losses: Losses | None  # of each batch, if they were measured
    findings: tuple[Finding, ...]  # the verdict, worst first; empty for a healthy network
    examples: int  # that the moments are of

    def __str__(self) -> str:
        return table(self.layers, self.losses, self.findings, self.examples)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON: numbers, texts, lists and dicts, and None for what is not finite."""
        return {
            "examples": self.examples,
            "losses": None
            if self.losses is None
            else {k: _number(v) for k, v in self.losses.means().items()},
            "findings": [finding._asdict() | {"layers": list(finding.layers)} for finding in self.findings],
            "layers": [_as_dict(layer) for layer in self.layers],
        }

    def save(self, path: Any) -> None:
        """Draw it into a picture, whose format is that of the file's name (.png, .svg, .pdf).

        Raises:
          ImportError: matplotlib is not installed.
        """
        save(path, self.layers, self.losses, self.findings)

    def draw_layers(self, axes: Any) -> None:
        """Draw the divergence of the worst layers into an axes of matplotlib, in the order of their calls."""
        draw_layers(axes, self.layers)

    def draw_losses(self, axes: Any) -> None:
        """Draw the losses into an axes of matplotlib; nothing if there are none."""
        if self.losses is not None:
            draw_losses(axes, self.losses)

    def rows(self, most: int = 12) -> list[tuple[str, ...]]:
        """Return the table of the worst layers: name, KL, worst features, share of constant ones, flags."""
        return rows(worst_first(self.layers)[:most])


def diagnose(
    records: Mapping[str, LayerRecord],
    *,
    losses: Losses | None = None,
    examples: int | None = None,
    data_are_finite: bool = True,
) -> Diagnosis:
    """Compare the running statistics of a network with the data, and say what is wrong with them.

    Of each layer it takes the divergence of the running moments from the population's,

        KL = 1/2 (v_r/v + (mean_r - mean)^2/v - 1 - log(v_r/v)),  v = var + epsilon

    in nats and averaged over features: 0.05 is a mean that is off by a third of a standard deviation, or a
    standard deviation off by a quarter. Findings are what such differences have in common over layers and
    features; `jbn/inspection/_diagnosis/differences.py` has how each is recognized, and from which size on.

    `jbn.linen.diagnose` and `jbn.nnx.diagnose` do all of it for models of Flax.

    Args:
      records: of the layers by name, in the order in which the network calls them.
      losses: of each batch; without them the verdict rests on the statistics alone, and cannot tell a network
        that was trained with what it has from one that was not.
      examples: how many independent ones the moments are of; if not given, the largest count of a layer,
        which in images counts every position.
      data_are_finite: whether the network's inputs are.

    Returns:
      Diagnosis.

    Raises:
      ValueError: there are no records.

    >>> import jax, jbn
    >>> from jbn import inspection
    >>> params, running = jbn.init(3)
    >>> x = 5 + 2 * jax.random.normal(jax.random.key(0), (4, 64, 3))
    >>> record = inspection.layer_record(x, running, params)
    >>> diagnosis = inspection.diagnose({"norm": record})
    >>> print([finding.kind for finding in diagnosis.findings])
    ['never updated']
    """
    if not records:
        raise ValueError("records is empty; expected one layer at least.")
    largest = max(float(np.max(record.population.count, initial=0)) for record in records.values())
    examples = int(largest) if examples is None else examples
    layers = tuple(_layer(name, record, examples) for name, record in records.items())
    losses = None if losses is None else Losses(*(np.asarray(loss, np.float64) for loss in losses))
    return Diagnosis(layers, losses, find(Evidence(layers, losses, examples, data_are_finite)), examples)


def _layer(name: str, record: LayerRecord, examples: int) -> LayerDiagnosis:
    shape = np.shape(record.population.mean)
    flat = lambda leaf: np.broadcast_to(np.asarray(leaf), shape).reshape(-1)
    wide = lambda leaf: flat(leaf).astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
    running, population, means, variances = (
        jax.tree.map(wide, type(m)(*m[:3]))
        for m in (record.running, record.population, record.batches.means, record.batches.vars)
    )
    scale, bias = (np.ones(shape).reshape(-1) if p is None else wide(p) for p in record.params)
    measured = population.count > 0
    known, of_running = Gaussians(population.mean, population.var), Gaussians(running.mean, running.var)
    nonfinite_statistics = ~(np.isfinite(running.mean) & np.isfinite(running.var)) | (running.var < 0)

    tiny = lambda g: (
        g.var <= np.maximum(CONSTANT * record.epsilon, (4 * np.finfo(np.float32).eps * np.abs(g.mean)) ** 2)
    )
    constant = measured & tiny(known)
    with np.errstate(all="ignore"):
        squared = np.abs(running.mean - population.mean) ** 2
        # P(x != c) >= (mean - c)^2 / ((mean - c)^2 + var), by Cauchy and Schwarz: if the running statistics
        # are right, so many examples that are all c are less likely than this.
        by_chance = (running.var / (squared + running.var)) ** examples
    proven = constant & (tiny(of_running) | (by_chance < 1e-3 / constant.size) | (examples >= ENOUGH))
    diverged = np.where(
        measured & ~nonfinite_statistics & (proven | ~constant),
        divergence(of_running, known, record.epsilon),
        np.nan,
    )
    untouched = not nonfinite_statistics.any() and bool(
        ((running.mean == 0) & (running.var == 1)).all()
        or (record.has_count and (running.count == 0).all() and np.nanmean(diverged) > 0.05)
    )
    update = record.update
    momentum = update.decay if isinstance(update, ema) else record.momentum if update is None else None
    times = np.max(means.count, initial=0)
    return LayerDiagnosis(
        name=name,
        shape=shape,
        divergence=diverged,
        running=of_running,
        population=known,
        within=np.where(variances.count > 0, variances.mean.real, known.var),
        of_means=means.var.real,
        of_vars=variances.var.real,
        samples=float(np.max(population.count, initial=0) / times) if times else 0.0,
        epsilon=record.epsilon,
        momentum=None if momentum is None else float(np.asarray(momentum)),
        is_debiased=isinstance(update, cumulative | pooled) or (isinstance(update, ema) and update.debias),
        frozen=record.frozen,
        untouched=untouched,
        constant=proven,
        near_zero_scale=np.abs(scale) <= 1e-4,  # outputs that vary by less than the next layer can use
        nonfinite_inputs=flat(record.batches.nonfinite).astype(bool),
        nonfinite_statistics=nonfinite_statistics,
        nonfinite_params=~(np.isfinite(scale) & np.isfinite(bias)),
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _as_dict(layer: LayerDiagnosis) -> dict[str, Any]:
    values = {
        "divergence": layer.divergence,
        "running_mean": np.real(layer.running.mean),
        "running_var": layer.running.var,
        "mean": np.real(layer.population.mean),
        "var": layer.population.var,
    }
    features = {key: [_number(v) for v in value] for key, value in values.items()}
    marked = {name: np.flatnonzero(mark).tolist() for name, mark in layer.marks().items()}
    return {
        "name": layer.name,
        "kl": _number(layer.kl),
        "worst_features": layer.worst(),
        "samples_in_a_batch": _number(layer.samples),
        "untouched": layer.untouched,
        "frozen": layer.frozen,
        **marked,
        "features": features,
    }
