"""What batch normalization is said to do, measured at one step of a job: a line of inspection.jsonl."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbn
from jbn import inspection
from train.data import dataset as data
from train.data.dataset import Examples
from train.runs import processes as distributed
from train.training import optimizer as optim
from train.training import steps as states
from train.training.job import Job
from train.training.steps import Recipe, Source, TrainState

EXAMPLES = 512  # of the training data, the same ones at every step
UNITS = 3  # whose percentiles are kept: the first ones of the last hidden layer
EDGES = np.linspace(-8, 8, 65)  # of the histograms; what lies beyond counts in the outermost bins
STEP_SIZES = (0.5, 1.0, 2.0, 4.0)  # along the gradient, in learning rates (Santurkar et al. 2018, figure 4)
OF_THE_STEP = ("movement", "losses", "gradient_changes", "smoothness", "gradient_shift", "gradient_cosine")


def inspect(job: Job, state: TrainState) -> dict[str, Any]:
    """Measures a job at a step that it has reached, and at the step that it is about to take.

    Layers are seen through the inputs of their activations, on fixed examples, with those examples' own
    statistics. Losses are those of the next batch as it is in the data, without augmentation or smoothing.
    All of it follows from the state, and nothing of the training changes. Where the learning rate is 0, as
    that of a cosine is at its end, there is no step, and what belongs to one is NaN.

    Returns:
      units: percentiles 15, 50 and 85 of what the first units of the last hidden layer get (Ioffe & Szegedy
        2015, figure 1), a list each.
      movement: for each layer, how far the inputs of a typical unit move in the next step, in their standard
        deviations.
      histograms: for each layer, the share of all units' inputs in each bin between `EDGES`.
      slope: for each layer, the mean derivative of the activation.
      loss, losses, gradient_changes, smoothness: of the next batch, here, along its gradient, and what they
        say of how smooth the loss is (Santurkar et al. 2018, section 3.1).
      gradient_shift, gradient_cosine: for each layer, what the next step of the layers before it does to its
        gradient (the same, definition 2.1).
      batch_statistics, running_statistics: loss and accuracy on the fixed examples, with either.
      identity_error: how far batch norm with scale = sqrt(var + epsilon) and bias = mean is from giving the
        inputs of the last hidden layer back, over the largest of them.
    """
    step, size = int(state.step), job.config.batch_size
    epoch, at = divmod(step, job.steps_per_epoch)
    rows = data.order(job.config.seed, epoch, len(job.data.train))[at * size :][:size]
    source = job.source._replace(examples=distributed.shard(job.mesh, job.data.train.take(rows)))
    examples = distributed.replicate(job.mesh, job.data.train.take(slice(EXAMPLES)))
    schedule = optim.schedule(job.config.optimizer, steps=job.total_steps, batch_size=size)
    rate = distributed.replicate(job.mesh, np.float32(schedule(step)))
    measured = jax.device_get(_measure(job.recipe, state, source, examples, rate))
    return jax.tree.map(_rounded, measured)


def _rounded(values: np.ndarray) -> Any:
    """Returns lists of numbers of no more digits than float32 has."""
    return [_rounded(value) for value in values] if values.ndim else float(f"{values:.7g}")


@partial(jax.jit, static_argnums=0)
def _measure(recipe: Recipe, state: TrainState, source: Source, examples: Examples, rate: jax.Array):
    following = states.train_step(recipe, state, source, None)
    seen = _of_layers(recipe, state, following, source.preprocessing(examples.inputs))
    measured = seen | _of_gradients(recipe, state, following, source, rate)
    for name in OF_THE_STEP:
        measured[name] = jax.tree.map(lambda value: jnp.where(rate > 0, value, jnp.nan), measured[name])
    return measured | _gap(recipe, state, source, examples)


def _of_layers(recipe, state, following, inputs):
    before, after = (
        [x.astype(jnp.float32) for x in recipe.network.activation_inputs(variables, inputs, train=True)]
        for variables in (state.variables, following.variables)
    )
    last = before[-1]
    moments = jbn.moments(last)
    restored = jbn.normalize(last, moments, inspection.identity_params(moments))
    return {
        "units": inspection.percentiles(last[..., :UNITS]).T,
        "movement": [jnp.median(inspection.movement(*pair)) for pair in zip(before, after)],
        "histograms": [_histogram(x) for x in before],
        "slope": [inspection.mean_slope(recipe.network.activation, x).mean() for x in before],
        "identity_error": jnp.max(jnp.abs(restored - last)) / jnp.max(jnp.abs(last)),
    }


def _histogram(x):
    counts, _ = jnp.histogram(jnp.clip(x, EDGES[0], EDGES[-1]), EDGES)
    return counts / x.size


def _of_gradients(recipe, state, following, source, rate):
    inputs, labels = source.preprocessing(source.examples.inputs), source.examples.labels
    loss = lambda params: _score(recipe, state.variables._replace(params=params), inputs, labels, True)[
        "loss"
    ]
    params, next_params = state.variables.params, following.variables.params
    landscape = inspection.along_gradient(loss, params, rate * np.float32(STEP_SIZES))
    layers = inspection.split_layers(loss, params)
    shift = inspection.gradient_shift(
        lambda parts: loss(layers.join(parts)), layers.split(params), layers.split(next_params)
    )
    return {
        "loss": landscape.loss,
        "losses": landscape.losses,
        "gradient_changes": landscape.gradient_changes,
        "smoothness": landscape.smoothness,
        "gradient_shift": shift.distance,
        "gradient_cosine": shift.cosine,
    }


def _gap(recipe, state, source, examples):
    inputs = source.preprocessing(examples.inputs)
    return {
        name: _score(recipe, state.variables, inputs, examples.labels, train)
        for name, train in (("batch_statistics", True), ("running_statistics", False))
    }


def _score(recipe, variables, inputs, labels, train):
    logits, _ = recipe.network.apply(variables, inputs, train=train)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": losses.mean(), "accuracy": (logits.argmax(-1) == labels).mean()}
