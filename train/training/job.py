"""A job, built from its config: data, devices, network, optimizer, and the state at step 0."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from train import data, models
from train.config import Config, total_steps
from train.data import Dataset
from train.errors import UserError
from train.runs import processes
from train.training import steps
from train.training.evaluation import load_best
from train.training.state import StepConfig, StepInputs, TrainState, create


class Job(NamedTuple):
    """A job, built from its config."""

    config: Config
    data: Dataset
    step_config: StepConfig
    initial: TrainState
    inputs: StepInputs
    steps_per_epoch: int
    on_device: bool  # whether all training data are on the devices
    loop: bool  # whether many steps are a loop in one program


def prepare(config: Config, dataset: Dataset | None = None) -> Job:
    """Build a job: its data, if not given, devices, network, optimizer, and the state at step 0.

    Raises:
      UserError: the data, the network or the devices do not allow it.
    """
    models.check(config.model, accumulate=config.optimizer.accumulate)
    dataset = dataset or data.load(config.data)
    data.check_augmentation(config.data, dataset.example_shape)
    steps_per_epoch = data.steps_per_epoch(len(dataset.train), config.batch_size)
    step_config = StepConfig(
        model=config.model,
        optimizer=config.optimizer,
        data=config.data,
        input_shape=dataset.example_shape,
        classes=dataset.classes,
        batch_size=config.batch_size,
        total_steps=total_steps(config, steps_per_epoch),
        mesh=processes.make_mesh(config),
    )
    # Waited for here, because a step whose input did not fit into memory may never return.
    initial = jax.block_until_ready(create(step_config, np.uint32(config.seed)))
    if config.init_from is not None:
        initial = _start_from(Path(config.init_from), initial, step_config)
    on_device = dataset.train.inputs.nbytes / 2**30 <= config.data.device_gib
    inputs = StepInputs(
        examples=dataset.train.take(slice(None)) if on_device else None,
        preprocessing=dataset.preprocessing,
        seed=np.uint32(config.seed),
    )
    return Job(
        config=config,
        data=dataset,
        step_config=step_config,
        initial=initial,
        inputs=processes.replicate(step_config.mesh, inputs),
        steps_per_epoch=steps_per_epoch,
        on_device=on_device,
        loop=on_device and steps.prefers_device_loop(step_config),
    )


def _start_from(run_dir: Path, initial: TrainState, step_config: StepConfig) -> TrainState:
    if not (run_dir / "config.json").exists():
        raise UserError(f"init_from: expected a run directory, got '{run_dir}', which has no config.json.")
    variables = load_best(run_dir).trained.variables
    ours, theirs = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (initial.variables, variables))
    if ours != theirs:
        raise UserError(
            f"init_from: expected a run with the same model, input shape and number of classes, got "
            f"'{run_dir}', which holds the parameters of another network."
        )
    variables = processes.replicate(step_config.mesh, jax.device_get(variables))
    return initial._replace(variables=variables, average=variables if step_config.optimizer.average else None)
