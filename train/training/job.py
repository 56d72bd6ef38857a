"""A job, built from its config: data, devices, network, optimizer, and the state at step 0."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train import data, models
from train.config import Config, total_steps
from train.data import Dataset
from train.runs import checkpoints, directory, processes
from train.training import mistakes, steps
from train.training.state import StepConfig, StepInputs, TrainState, create
from train.training.trained.pretrained import start_from


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
    notes: tuple[str, ...]  # what the user should know before it starts


def load_data(config: Config, run_dir: Path | None = None) -> Dataset:
    """Load the data of a job; what is made of them once is kept beside its run directory, wherever that is.

    Raises:
      UserError: a file is missing or malformed, or there is nothing to train on, or what can be known of the
        network without data rules it out.
    """
    models.check(config.model, accumulate=config.optimizer.accumulate, recalibrate=config.recalibrate)
    cache = directory.data_cache(run_dir or Path(config.run_dir))
    return data.load(config.data, loss=config.model.loss, cache=cache)


def prepare(config: Config, dataset: Dataset | None = None) -> Job:
    """Build a job: its data, if not given, devices, network, optimizer, and the state at step 0.

    Raises:
      UserError: the data, the network or the devices do not allow it.
    """
    dataset = dataset or load_data(config)
    data.check_augmentation(config.data, dataset.example_shape)
    data.check_renderings(config.data.renderings, dataset)
    steps_per_epoch = data.steps_per_epoch(len(dataset.train), config.batch_size)
    step_config = StepConfig(
        model=config.model,
        optimizer=config.optimizer,
        data=config.data,
        input_shape=dataset.example_shape,
        labels=dataset.labels,
        batch_size=config.batch_size,
        total_steps=total_steps(config, steps_per_epoch),
        mesh=processes.make_mesh(config),
    )
    # Waited for here, because a step whose input did not fit into memory may never return.
    initial = jax.block_until_ready(create(step_config, np.uint32(config.seed)))
    notes = ()
    # A job that resumes needs no other weights, which may be gone by then.
    if config.init_from is not None and not checkpoints.exist(Path(config.run_dir)):
        variables, notes = start_from(
            Path(config.init_from),
            config.model,
            initial.variables,
            head=step_config.network.head,
            labels=dataset.labels,
        )
        variables = processes.replicate(step_config.mesh, jax.device_get(variables))
        # A copy, because a step uses up the buffers of both.
        average = jax.tree.map(jnp.copy, variables) if config.optimizer.average else None
        initial = initial._replace(variables=variables, average=average)
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
        notes=(
            *dataset.notes,
            *notes,
            *(f"warning: {text}" for text in mistakes.likely(config, dataset, steps=step_config.total_steps)),
        ),
    )
