"""The types of the training step: what is the same in every step, what changes, and the examples."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import models
from train.config import Data, Model, Optimizer
from train.data import Examples, Labels, Preprocessing
from train.models import Network, Variables
from train.models.norms import Rule
from train.training import losses, optimizer
from train.training.losses import Loss, Sums

ALL_FINITE = jnp.iinfo(jnp.int32).max  # for `nonfinite_step`


@dataclass(frozen=True)
class StepConfig:
    """What is the same in every step. Programs are compiled for it: equal jobs have equal ones."""

    model: Model
    optimizer: Optimizer
    data: Data  # for its augmentation and its renderings
    input_shape: tuple[int, ...]  # of one example
    labels: Labels
    batch_size: int
    total_steps: int  # which the learning rate follows
    mesh: Mesh

    @cached_property
    def network(self) -> Network:
        """The network that is trained."""
        return models.build(self.model, self.input_shape, self.labels.outputs, steps=self.total_steps)

    @cached_property
    def pooling_network(self) -> Network:
        """The same network, whose new running statistics are those of a part of a batch alone."""
        return models.build_pooling(self.model, self.input_shape, self.labels.outputs, steps=self.total_steps)

    def learning(self, variables: Variables) -> Variables:
        """Mark the variables that training changes."""
        return models.learning(self.model, self.network, variables)

    @cached_property
    def transformation(self) -> optax.GradientTransformation:
        """The optimizer."""
        learning = lambda params: self.learning(Variables(params, {})).params
        return optimizer.build(
            self.optimizer,
            steps=self.total_steps,
            batch_size=self.batch_size,
            # A tree of its own where all learn would make other checkpoints.
            learning=None if self.model.frozen == "none" else learning,
        )

    @property
    def rule(self) -> Rule:
        """The update rule of the running statistics."""
        return models.running_rule(self.model)

    @property
    def loss(self) -> Loss:
        """What the network is trained for."""
        return losses.of(self.model, self.labels)


class TrainState(NamedTuple):
    """What changes from step to step."""

    step: jax.Array  # (), int32: how many steps were taken
    variables: Variables
    average: Variables | None  # the moving average of `variables`, where the job asks for one
    opt_state: optax.OptState
    sums: Sums  # of the training examples since the last line of the log
    nonfinite_step: jax.Array  # (), int32: the first step, from 1, whose loss was not finite; or ALL_FINITE

    @property
    def evaluated(self) -> Variables:
        """What evaluation, prediction and export use."""
        return self.variables if self.average is None else self.average


class StepInputs(NamedTuple):
    """Where steps take their examples from; the same in every step if the data are on the devices."""

    examples: Examples | None  # all of the training data, on every device; or one batch, over the devices
    preprocessing: Preprocessing
    seed: jax.Array | np.uint32  # ()


@partial(jax.jit, static_argnums=0)
def create(config: StepConfig, seed: jax.Array | np.uint32) -> TrainState:
    """Initialize everything at step 0, on every device."""
    variables = config.network.init(jax.random.key(seed), jnp.zeros((1, *config.input_shape)))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        average=variables if config.optimizer.average else None,
        opt_state=config.transformation.init(variables.params),
        sums=no_sums(config),
        nonfinite_step=jnp.full((), ALL_FINITE, jnp.int32),
    )
    return jax.lax.with_sharding_constraint(state, NamedSharding(config.mesh, P()))


def no_sums(config: StepConfig) -> Sums:
    """Return the sums over no examples."""
    logits, labels = jnp.zeros((0, config.labels.outputs)), jnp.zeros(0, jnp.int32)
    sums = jax.eval_shape(lambda: losses.add_up(config.loss.scores(logits, labels)))
    return {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in sums.items()}


def to_items(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint holds of a state, under the names that are on disk.

    `model` is what is evaluated; `optimizer` the optimizer's state, and the variables that it trains where a
    moving average of them is evaluated; `meta` the step and what the next line of the log reports.
    """
    optimizer = {"opt_state": state.opt_state}
    if state.average is not None:
        optimizer["variables"] = state.variables._asdict()
    meta = {"step": state.step, "sums": state.sums, "failed_at": state.nonfinite_step}
    return {"model": state.evaluated._asdict(), "optimizer": optimizer, "meta": meta}


def from_items(items: dict[str, Any], like: TrainState) -> TrainState:
    """Return the state that a checkpoint holds, with the structure of `like`."""
    evaluated, optimizer, meta = Variables(**items["model"]), items["optimizer"], items["meta"]
    trained = evaluated if like.average is None else Variables(**optimizer["variables"])
    return like._replace(
        step=meta["step"],
        variables=trained,
        average=None if like.average is None else evaluated,
        opt_state=optimizer["opt_state"],
        sums=meta["sums"],
        nonfinite_step=meta["failed_at"],
    )
