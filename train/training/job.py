"""What a config stands for, built: devices, data, network, optimizer, and the state at step 0."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

import jbn
from train.config import Config, total_steps
from train.data import augment
from train.data import dataset as data
from train.errors import UserError
from train.models import network as models
from train.models import norms
from train.models.network import Variables
from train.runs import directory as run_directory
from train.runs import processes as distributed
from train.runs.checkpoints import Checkpoints
from train.training import optimizer as optim
from train.training import steps as states
from train.training.steps import Recipe, Source

EVAL_BATCH = 512  # examples on each device, whatever their number, so that it cannot change the results


class Job:
    """A job, ready to be trained."""

    def __init__(self, config: Config):
        self.config = config
        self.data = data.load(config.data)
        self.mesh = distributed.make_mesh(config)
        input_shape = self.data.train.inputs.shape[1:]
        augment.check(config.data, input_shape)
        self.steps_per_epoch = data.steps_per_epoch(len(self.data.train), config.batch_size)
        self.total_steps = total_steps(config, self.steps_per_epoch)
        build = lambda rule: models.build(config.model, input_shape, self.data.classes, rule=rule)
        rule = norms.running_rule(config.model)
        self.recipe = Recipe(
            network=build(rule),
            pooling=build(jbn.pooled()),
            rule=rule,
            optimizer=optim.build(config.optimizer, steps=self.total_steps, batch_size=config.batch_size),
            data=config.data,
            options=config.optimizer,
            batch_size=config.batch_size,
            mesh=self.mesh,
        )
        # Waits for it, since a step that is given what memory did not hold may wait for ever.
        self.initial = jax.block_until_ready(states.create(self.recipe, config.seed, input_shape))
        if config.init_from is not None:
            self._start_from(Path(config.init_from))
        size = self.data.train.inputs.nbytes / 2**30
        self.on_device = size <= config.data.device_gib
        self.loop = self.on_device and states.loops_well(self.recipe.network, input_shape)
        self.source = Source(
            distributed.replicate(self.mesh, self.data.train.take(slice(None))) if self.on_device else None,
            distributed.replicate(self.mesh, self.data.preprocessing),
            distributed.replicate(self.mesh, np.uint32(config.seed)),
        )

    def evaluate(self, variables: Variables, split: data.Split) -> dict[str, float]:
        """Returns loss and accuracy over a split, each example counted once."""
        return evaluate_split(self.recipe.network, self.mesh, variables, self.source.preprocessing, split)

    def _start_from(self, run_dir: Path) -> None:
        trained = Trained(run_dir).variables
        ours, theirs = (
            jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (self.initial.variables, trained)
        )
        if ours != theirs:
            raise UserError(
                f"init_from = '{run_dir}' holds the parameters of another network; wanted a run with the "
                "same model, input shape and number of classes."
            )
        variables = distributed.replicate(self.mesh, jax.device_get(trained))
        average = None if self.initial.average is None else variables
        self.initial = self.initial._replace(variables=variables, average=average)


class Trained:
    """The best checkpoint of a run, without its training data: for evaluation, prediction and export."""

    def __init__(self, run_dir: Path):
        self.config = run_directory.read_config(run_dir)
        self.data = run_directory.read_data(run_dir)
        self.mesh = distributed.mesh_of(jax.devices())
        self.network = models.build(self.config.model, self.data.shape, self.data.classes)
        shapes = jax.eval_shape(
            self.network.init, jax.random.key(0), np.zeros((1, *self.data.shape), np.float32)
        )
        like = jax.tree.map(lambda leaf: distributed.replicated_like(self.mesh, leaf), shapes)
        with Checkpoints(run_dir) as checkpoints:
            self.step = best_step(run_dir, checkpoints)
            self.variables = checkpoints.restore_model(self.step, like)
        self.preprocessing = distributed.replicate(self.mesh, self.data.preprocessing)


def best_step(run_dir: Path, checkpoints: Checkpoints) -> int:
    """Returns the best step of a run, by validation.

    Raises:
      UserError: the run has no checkpoint.
    """
    if checkpoints.best_step is None:
        raise UserError(f"'{run_dir}' has no checkpoint yet; train it first.")
    return checkpoints.best_step


def evaluate_split(
    network: models.Network,
    mesh: jax.sharding.Mesh,
    variables: Variables,
    preprocessing: data.Preprocessing,
    split: data.Split,
) -> dict[str, float]:
    """Returns loss and accuracy over a split: sums in float64 over examples, each counted once."""
    loss, correct = 0.0, 0
    for batch in data.eval_batches(split, EVAL_BATCH * mesh.size):
        examples = distributed.shard(mesh, data.Examples(batch.inputs, batch.labels))
        scores: Any = states.eval_step(network, mesh, variables, preprocessing, examples)
        losses, answers = jax.device_get(scores)
        loss += float(losses[batch.mask].sum(dtype=np.float64))
        correct += int(answers[batch.mask].sum())
    return {"loss": loss / len(split), "accuracy": correct / len(split)}
