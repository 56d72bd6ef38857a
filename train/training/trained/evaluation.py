"""Evaluation over a split, and the best checkpoint of a run to do it with."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from train import models
from train.config import Config, Data, RenderingName
from train.data import Description, Preprocessing, Split, eval_batches, render
from train.errors import UserError
from train.models import NORMS, Network, NormKind, Variables
from train.runs import directory, processes
from train.runs.checkpoints import Checkpoints, open_recalibrated
from train.training import losses
from train.training.losses import Loss, Metrics, Sums
from train.training.steps import eval_step

EVAL_BATCH = 512  # examples on each device, so that the number of devices cannot change the results


def check_norm(run_dir: Path, config: Config, fits: Callable[[NormKind], bool], having: str) -> None:
    """Raise a UserError unless a run has a norm that fits; `having` says what such a norm has."""
    if not fits(NORMS[config.model.norm]):
        names = " or ".join(repr(name) for name, kind in NORMS.items() if fits(kind))
        raise UserError(
            f"'{run_dir}': expected a run with model.norm = {names}, {having}, got {config.model.norm!r}."
        )


class TrainedNetwork(NamedTuple):
    """A network with all that evaluation needs, on the devices of a mesh."""

    network: Network
    loss: Loss
    mesh: Mesh
    variables: Variables
    preprocessing: Preprocessing

    def evaluate(self, split: Split, renderings: Sequence[RenderingName] = ()) -> Metrics:
        """Return the metrics over a split: sums in float64 over its examples, each counted once.

        With renderings each counts once in every one, as an example of the domain of that number; of several,
        "rendering_accuracy" (or whatever the loss is judged by) has that of each.
        """
        sums = [self._add_up(split, domain, name) for domain, name in enumerate(renderings or (None,))]
        metrics = self.loss.metrics({name: sum(part[name] for part in sums) for name in sums[0]})
        if len(renderings) > 1:
            headline = self.loss.headline
            of_each = (self.loss.metrics(part)[headline] for part in sums)
            metrics[f"rendering_{headline}"] = dict(zip(renderings, of_each))
        return metrics

    def _add_up(self, split: Split, domain: int, rendering: RenderingName | None) -> Sums:
        sums: Sums = {"examples": len(split)}
        size = EVAL_BATCH * self.mesh.size
        for number, (examples, mask) in enumerate(eval_batches(split, size)):
            examples = processes.shard(self.mesh, examples)
            if rendering:
                shown = shown_at(rendering, examples.inputs, np.int32(number * size))
                examples = examples._replace(inputs=shown)
            scores = eval_step(
                self.network,
                self.loss,
                self.mesh,
                self.variables,
                self.preprocessing,
                examples,
                np.int32(domain),
            )
            for name, values in jax.device_get(scores).items():
                total = values[mask].sum(0, dtype=np.float64 if values.dtype != bool else np.int64)
                sums[name] = sums.get(name, 0) + total
        return sums


@partial(jax.jit, static_argnums=0)
def shown_at(rendering: RenderingName, images: jax.Array, start: jax.Array) -> jax.Array:
    """Render images of a split whose first one is at `start`: the same on any number of devices."""
    at = start + jnp.arange(len(images), dtype=jnp.int32)
    return render(rendering, jax.random.key(0), images, at)


class TrainedRun(NamedTuple):
    """The best checkpoint of a run, without its training data."""

    config: Config
    data: Description
    step: int
    trained: TrainedNetwork

    def evaluate(self, split: Split) -> Metrics:
        """Return the metrics over a split, in every rendering that the run has."""
        return self.trained.evaluate(split, self.config.data.renderings)

    def fold(self) -> "TrainedRun":
        """Leave out the batch norms, which the layers before them absorb; one of the inputs stays.

        Raises:
          UserError: the network has none, or several for each layer.
        """
        norm, inputs = self.config.model.norm, jnp.zeros((1, *self.data.shape))
        if not NORMS[norm].over_batch:
            foldable = [repr(name) for name in NORMS if NORMS[name].over_batch]
            raise UserError(
                f"--fold: expected a run with model.norm = {' or '.join(foldable)}, affine maps once "
                f"trained, got {norm!r}; export it without."
            )
        if (domains := self.config.model.domains) > 1:
            raise UserError(
                "--fold: expected a run with model.domains = 1, one affine map for each norm, got "
                f"{domains}; export it without."
            )
        network, variables = self.trained.network.fold(self.trained.variables, inputs)
        expected = jax.eval_shape(network.init, jax.random.key(0), inputs)
        # A norm that was left unfolded would be missing, and the outputs wrong.
        assert jax.tree.map(jnp.shape, expected) == jax.tree.map(jnp.shape, variables)
        return self._replace(trained=self.trained._replace(network=network, variables=variables))


def data_at(config: Data, path: str | None) -> Data:
    """Return where a run's data are, or others like them: at a path that is given now, if one is."""
    if path is None:
        return config
    # The embedded digits have no file; others like them come in the general layout.
    name = "npz" if config.name == "digits" else config.name
    return dataclasses.replace(config, name=name, path=path)


def load_best(run_dir: Path, *, recalibrated: bool = True, mesh: Mesh | None = None) -> TrainedRun:
    """Load the best checkpoint of a run, by validation.

    Args:
      recalibrated: whether to load it as recalibration has left it, where that was done.
      mesh: where to put it; if not given, on all devices.

    Raises:
      UserError: it is not a run, or has no checkpoint.
    """
    config, data = directory.read_config(run_dir), directory.read_data(run_dir)
    mesh = mesh or processes.mesh_of(jax.devices())
    network = models.build(config.model, data.shape, data.labels.outputs)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, *data.shape), np.float32))
    like = jax.tree.map(lambda leaf: processes.replicated_like(mesh, leaf), shapes._asdict())
    with Checkpoints(run_dir) as checkpoints:
        step = checkpoints.best_step
        if step is None:
            raise UserError(f"'{run_dir}' has no checkpoint yet; train it first.")
        with open_recalibrated(run_dir, step) as of_best:
            source = of_best if of_best and recalibrated else checkpoints
            variables = Variables(**source.restore(step, {"model": like})["model"])
    preprocessing = processes.replicate(mesh, data.preprocessing)
    trained = TrainedNetwork(network, losses.of(config.model, data.labels), mesh, variables, preprocessing)
    return TrainedRun(config, data, step, trained)
