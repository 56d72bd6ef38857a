"""Measurements inside the network at one step of a job: a line of inspection.jsonl."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from jbn import inspection
from train import data
from train.data import Dataset, Examples, render_mixed
from train.runs import processes
from train.training import optimizer
from train.training.losses import add_up
from train.training.state import StepConfig, StepInputs, TrainState
from train.training.steps import train_step

EXAMPLES = 512  # of the training data, the same ones at every step
UNITS = 3  # of the last hidden layer, the first ones: their percentiles are kept
EDGES = np.linspace(-8, 8, 65)  # of the histograms; what lies beyond counts in the outermost bins
STEP_SIZES = (0.5, 1.0, 2.0, 4.0)  # along the gradient, in learning rates (Santurkar et al. 2018, figure 4)
OF_THE_STEP = ("movement", "losses", "gradient_changes", "smoothness", "gradient_shift", "gradient_cosine")


def inspect(config: StepConfig, dataset: Dataset, inputs: StepInputs, state: TrainState) -> dict[str, Any]:
    """Measure a job at a step that it has reached, and at the step that it is about to take.

    Layers are measured by the inputs of their activations, on fixed examples, with those examples' own
    statistics, or with the running ones where they are frozen. Losses are those of the next batch as it is in
    the data, without augmentation or smoothing. All of it follows from the state, and the training does not
    change. Where the learning rate is 0, as at the end of a cosine, there is no step, and the measurements of
    one are NaN.

    Returns:
      units: percentiles 15, 50 and 85 of the inputs of the first units of the last hidden layer (Ioffe &
        Szegedy 2015, figure 1), a list each.
      movement: for each layer, how far the inputs of a typical unit move in the next step, in their standard
        deviations.
      histograms: for each layer, the share of all units' inputs in each bin between `EDGES`.
      slope: for each layer, the mean derivative of the activation.
      loss, losses, gradient_changes, smoothness: of the next batch, here and along its gradient, and how
        smooth the loss therefore is (Santurkar et al. 2018, section 3.1).
      gradient_shift, gradient_cosine: for each layer, how its gradient changes by the next step of the layers
        before it (the same, definition 2.1).
      batch_statistics, running_statistics: the loss's metrics on the fixed examples, with either.
      identity_error: how far batch norm with scale = sqrt(var + epsilon) and bias = mean is from giving the
        inputs of the last hidden layer back, over the largest of them.
    """
    step, size, split = int(state.step), config.batch_size, dataset.train
    epoch, at = divmod(step, data.steps_per_epoch(len(split), size))
    rows = data.order(int(inputs.seed), epoch, len(split))[at * size :][:size]
    batch = inputs._replace(examples=processes.shard(config.mesh, split.take(rows)))
    examples = processes.replicate(config.mesh, split.take(slice(EXAMPLES)))
    schedule = optimizer.schedule(config.optimizer, steps=config.total_steps, batch_size=size)
    rate = processes.replicate(config.mesh, np.asarray(schedule(step), np.float32))
    measured, sums = jax.device_get(_measure(config, state, batch, examples, rate))
    gap = {name: config.loss.metrics(of_examples) for name, of_examples in sums.items()}
    return jax.tree.map(_rounded, measured | jax.tree.map(np.asarray, gap))


def _rounded(values: np.ndarray) -> Any:
    """Return lists of numbers with the digits that float32 has."""
    return [_rounded(value) for value in values] if values.ndim else float(f"{values:.7g}")


@partial(jax.jit, static_argnums=0)
def _measure(config: StepConfig, state: TrainState, batch: StepInputs, examples: Examples, rate: jax.Array):
    following = train_step(config, state, batch, None)
    fixed, of_batch = (_as_trained(config, batch, given) for given in (examples, batch.examples))
    measured = _of_layers(config.network, state, following, fixed)
    measured |= _of_gradients(config, state, following, of_batch, rate)
    for name in OF_THE_STEP:
        measured[name] = jax.tree.map(lambda value: jnp.where(rate > 0, value, jnp.nan), measured[name])
    return measured, _gap(config, state, batch, examples)


class _Inputs(NamedTuple):
    """What a network gets."""

    x: jax.Array  # (n, ...), float32
    labels: jax.Array  # (n,)
    domain: jax.Array | None  # (n,), int32, if there are renderings


def _as_trained(config: StepConfig, inputs: StepInputs, examples: Any) -> _Inputs:
    """Return examples as a network gets them in training, without augmentation: each in some rendering."""
    x, domain = render_mixed(config.data.renderings, jax.random.key(0), examples.inputs)
    return _Inputs(inputs.preprocessing(x), examples.labels, domain)


def _of_layers(network, state, following, given):
    activation_inputs = partial(network.activation_inputs, train=True, domain=given.domain)
    before, after = (
        [x.astype(jnp.float32) for x in activation_inputs(variables, given.x)]
        for variables in (state.variables, following.variables)
    )
    last = before[-1]
    moments = jbn.moments(last)
    restored = jbn.normalize(last, moments, inspection.identity_params(moments))
    return {
        "units": inspection.percentiles(last[..., :UNITS]).T,
        "movement": [jnp.median(inspection.movement(*pair)) for pair in zip(before, after)],
        "histograms": [_histogram(x) for x in before],
        "slope": [inspection.mean_slope(network.activation, x).mean() for x in before],
        "identity_error": jnp.max(jnp.abs(restored - last)) / jnp.max(jnp.abs(last)),
    }


def _histogram(x):
    counts, _ = jnp.histogram(jnp.clip(x, EDGES[0], EDGES[-1]), EDGES)
    return counts / x.size


def _of_gradients(config, state, following, given, rate):
    learning = config.learning(state.variables).params

    def loss(params):
        # Along the gradient, what is frozen stays where it is.
        params = jax.tree.map(lambda p, learns: p if learns else jax.lax.stop_gradient(p), params, learning)
        return _scores(config, state.variables._replace(params=params), given, train=True)["loss"].mean()

    params, next_params = state.variables.params, following.variables.params
    landscape = inspection.along_gradient(loss, params, rate * np.asarray(STEP_SIZES, np.float32))
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


def _gap(config, state, batch, examples):
    """Return the sums of the scores of some examples, with their own statistics and with the running ones."""
    given = _as_trained(config, batch, examples)
    return {
        name: add_up(_scores(config, state.variables, given, train=train))
        for name, train in (("batch_statistics", True), ("running_statistics", False))
    }


def _scores(config, variables, given, *, train):
    logits, _ = config.network.apply(variables, given.x, train=train, domain=given.domain)
    return config.loss.scores(logits, given.labels)
