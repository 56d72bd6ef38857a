"""The pure functions that train, evaluate and predict; `train_step` is one step of training."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from train.data import Examples, Preprocessing, augment, render_mixed
from train.models import Network, Variables
from train.models.norms import Rule
from train.runs.processes import AXIS
from train.training.losses import Loss, add_up
from train.training.state import StepConfig, StepInputs, TrainState, no_sums


def train_step(
    config: StepConfig, state: TrainState, inputs: StepInputs, rows: jax.Array | None
) -> TrainState:
    """Take one optimization step on these rows of the examples, or on all of them if `rows` is None."""
    examples = jax.tree.map(lambda leaf: leaf if rows is None else leaf[rows], inputs.examples)
    x, labels = jax.lax.with_sharding_constraint(examples, NamedSharding(config.mesh, P(AXIS)))
    key = jax.random.fold_in(jax.random.key(inputs.seed), state.step)
    x, domain = render_mixed(config.data.renderings, key, augment(config.data, key, x))

    grads, loss, sums, batch_stats = _gradients(
        config, state.variables, inputs.preprocessing(x), labels, domain
    )
    updates, opt_state = config.transformation.update(grads, state.opt_state, state.variables.params)
    variables = Variables(optax.apply_updates(state.variables.params, updates), batch_stats)

    step = state.step + 1
    nonfinite_step = jnp.where(
        jnp.isfinite(loss), state.nonfinite_step, jnp.minimum(state.nonfinite_step, step)
    )
    return TrainState(
        step=step,
        variables=variables,
        average=_moving_average(config, state, variables),
        opt_state=opt_state,
        sums=jax.tree.map(jnp.add, state.sums, sums),
        nonfinite_step=nonfinite_step,
    )


def _gradients(config, variables, x, labels, domain):
    """Return the gradients of the mean loss, that loss, sums of the scores, and new running statistics."""

    def mean_loss(params, batch_stats, network, x, labels, domain):
        if config.optimizer.adversarial:
            given = Variables(jax.lax.stop_gradient(params), batch_stats)
            x, labels, domain = _with_adversaries(config, given, network, x, labels)
        logits, batch_stats = network.apply(Variables(params, batch_stats), x, train=True, domain=domain)
        losses = config.loss.per_example(logits, labels, config.optimizer.label_smoothing)
        return losses.mean(), (add_up(config.loss.scores(logits, labels)), batch_stats)

    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
    parts = config.optimizer.accumulate
    if parts == 1:
        (loss, (sums, batch_stats)), grads = value_and_grad(*variables, config.network, x, labels, domain)
        return grads, loss, sums, batch_stats

    frozen = config.model.frozen != "none"
    network = config.network if frozen else config.pooling_network

    def add_part(totals, part):
        *totals, pooled = totals
        given = variables.batch_stats if frozen else without_counts(variables.batch_stats)
        (loss, (sums, batch_stats)), grads = value_and_grad(variables.params, given, network, *part)
        pooled = batch_stats if frozen else update_statistics(jbn.pooled(), pooled, batch_stats)
        return (*jax.tree.map(jnp.add, totals, [grads, loss, sums]), pooled), None

    # Each part has rows of every device.
    split = lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1)
    zeros = jax.tree.map(
        jnp.zeros_like, (variables.params, jnp.zeros(()), no_sums(config), variables.batch_stats)
    )
    totals, _ = jax.lax.scan(add_part, zeros, jax.tree.map(split, (x, labels, domain)))
    grads, loss, sums, batch_stats = totals
    grads, loss = jax.tree.map(lambda total: total / parts, (grads, loss))
    if not frozen:
        batch_stats = update_statistics(config.rule, variables.batch_stats, batch_stats)
    return grads, loss, sums, batch_stats


def _with_adversaries(config, variables, network, x, labels):
    """Add to a batch, whose domain is 0, adversarial examples, whose domain is 1 (Xie et al. 2020, AdvProp).

    Each is a step along the sign of the gradient away, which is taken with the statistics of its kind.
    """

    def loss(x):
        logits, _ = network.apply(variables, x, train=True, domain=1)
        return config.loss.per_example(logits, labels, config.optimizer.label_smoothing).sum()

    adversaries = x + config.optimizer.adversarial * jnp.sign(jax.grad(loss)(x))
    domain = jnp.repeat(jnp.arange(2), len(x), total_repeat_length=2 * len(x))
    return jnp.concatenate([x, adversaries]), jnp.concatenate([labels, labels]), domain


def update_statistics(rule: Rule, running: Any, batch: Any) -> Any:
    """Apply an update rule to the moments of every layer, each a dict of mean, var and count.

    A feature keeps its running moments where the new ones are not finite. What else a layer counts is as in
    `batch`.
    """
    if "mean" not in running:
        return {name: update_statistics(rule, running[name], batch[name]) for name in running}
    old, of_batch = (jbn.Moments(*map(stats.get, jbn.Moments._fields)) for stats in (running, batch))
    new = rule(old, of_batch)
    finite = jnp.isfinite(new.mean) & jnp.isfinite(new.var)
    return batch | jax.tree.map(partial(jnp.where, finite), new, old)._asdict()


def without_counts(batch_stats: Any) -> Any:
    """Set the count of every layer's moments to 0: what it returns in their place then counts for nothing."""
    clear = lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "count" else leaf
    return jax.tree_util.tree_map_with_path(clear, batch_stats)


def _moving_average(config, state, variables) -> Variables | None:
    if state.average is None:
        return None
    # Young averages forget faster, so that the initial weights do not stay in them.
    decay = jnp.minimum(config.optimizer.average, (1 + state.step) / (10 + state.step))
    average: Any = optax.incremental_update(variables, state.average, 1 - decay)
    # The average of equal numbers is rounded, and of numbers of updates it is none.
    keep = lambda learns, average, value: average if learns and average.dtype == value.dtype else value
    return jax.tree.map(keep, config.learning(variables), average, variables)


def train_steps(
    config: StepConfig,
    state: TrainState,
    inputs: StepInputs,
    order: jax.Array,
    start: int,
    steps: int,
    *,
    loop: bool,
) -> TrainState:
    """Take `steps` steps, on the rows `order[start:]`, a batch at a time; the old `state` is used up.

    With `loop` in one compiled program, else in one call each. That program takes the number of steps as an
    argument, so how many are taken at a time cannot change the result.
    """
    if loop:
        return _many_steps(config, state, inputs, order, start, steps)
    for step in range(steps):
        state = _one_step(config, state, inputs, order, start + step * config.batch_size)
    return state


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_on_batch(config: StepConfig, state: TrainState, inputs: StepInputs) -> TrainState:
    """Take one step on one batch; the old `state` is used up."""
    return train_step(config, state, inputs, None)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _one_step(config, state, inputs, order, start):
    return train_step(config, state, inputs, jax.lax.dynamic_slice_in_dim(order, start, config.batch_size))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _many_steps(config, state, inputs, order, start, steps):
    def body(i, state):
        return _one_step(config, state, inputs, order, start + i * config.batch_size)

    return jax.lax.fori_loop(0, steps, body, state)


def prefers_device_loop(config: StepConfig) -> bool:
    """Return whether many steps are faster as a loop in one compiled program than as one call each.

    They are, but for convolutions on a CPU: there XLA computes their gradients in a loop some 25 times slower
    than outside (jax issue 12868).
    """
    x = jnp.zeros((1, *config.input_shape))
    program = jax.make_jaxpr(config.network.init)(jax.random.key(0), x)
    return jax.default_backend() != "cpu" or "conv_general_dilated" not in str(program)


@partial(jax.jit, static_argnums=(0, 1, 2))
def eval_step(
    network: Network,
    loss: Loss,
    mesh: Mesh,
    variables: Variables,
    preprocessing: Preprocessing,
    examples: Examples,
    domain: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Return the scores of each example, (n,) or (n, classes) each; all are of one domain.

    Every device runs the same program on its rows, so the result is the same on any number of devices.
    """

    def on_device(variables, preprocessing, examples, domain):
        x = preprocessing(examples.inputs)
        logits, _ = network.apply(variables, x, train=False, domain=domain)
        return loss.scores(logits, examples.labels)

    over_devices = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P(), P(AXIS), P()), out_specs=P(AXIS))
    scores = over_devices(variables, preprocessing, examples, domain)
    return jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, P()))


@partial(jax.jit, static_argnums=(0, 1))
def predict(
    network: Network, loss: Loss, variables: Variables, preprocessing: Preprocessing, inputs: jax.Array
) -> jax.Array:
    """Return the predictions for raw inputs, float32: probabilities (n, classes), or numbers (n,)."""
    logits, _ = network.apply(variables, preprocessing(inputs), train=False)
    return loss.outputs(logits)
