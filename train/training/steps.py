"""The training state as one pytree, and the pure functions that train and evaluate with it."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from train.config import Data, Optimizer
from train.data.augment import augment
from train.data.dataset import Examples, Preprocessing
from train.models.network import Network, Variables
from train.runs.processes import AXIS

NEVER = jnp.iinfo(jnp.int32).max


class Sums(NamedTuple):
    """Sums over examples, from which exact means follow whatever the batches were."""

    loss: jax.Array  # (), float32
    correct: jax.Array  # (), int32
    examples: jax.Array  # (), int32

    def means(self) -> dict[str, float]:
        """Returns loss and accuracy per example, as the logs have them."""
        examples = int(self.examples)
        return {"loss": float(self.loss) / examples, "accuracy": int(self.correct) / examples}


class TrainState(NamedTuple):
    step: jax.Array  # (), int32: how many steps were taken
    variables: Variables
    average: Variables | None  # the moving average of `variables`, where the job asks for one
    opt_state: optax.OptState
    sums: Sums  # of training, since they were last reported
    failed_at: jax.Array  # (), int32: the first step, from 1, whose loss was not finite; or NEVER

    @property
    def evaluated(self) -> Variables:
        """What evaluation, prediction and export use."""
        return self.variables if self.average is None else self.average


@dataclass(frozen=True)
class Recipe:
    """What is the same in every step. Hashable: programs are compiled for it."""

    network: Network
    pooling: Network  # the same network, whose running statistics pool the samples that they see
    rule: jbn.ema  # how running statistics absorb those of a batch
    optimizer: optax.GradientTransformation
    data: Data  # of which augmentation reads its keys
    options: Optimizer  # of which the step reads accumulate, average and label_smoothing
    batch_size: int
    mesh: Mesh


class Source(NamedTuple):
    """What steps take their examples from; the same in every step if the data are on the devices."""

    examples: Examples  # all of the training data, on every device; or one batch, over the devices
    preprocessing: Preprocessing
    seed: jax.Array  # (), uint32


def create(recipe: Recipe, seed: int, input_shape: tuple[int, ...]) -> TrainState:
    """Initializes everything at step 0, on every device."""
    return _create(recipe, input_shape, np.uint32(seed))


@partial(jax.jit, static_argnums=(0, 1))
def _create(recipe, input_shape, seed):
    variables = recipe.network.init(jax.random.key(seed), jnp.zeros((1, *input_shape)))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        average=variables if recipe.options.average else None,
        opt_state=recipe.optimizer.init(variables.params),
        sums=no_sums(),
        failed_at=jnp.full((), NEVER, jnp.int32),
    )
    return jax.lax.with_sharding_constraint(state, NamedSharding(recipe.mesh, P()))


def no_sums() -> Sums:
    """Returns the sums over no examples."""
    return Sums(np.zeros((), np.float32), np.zeros((), np.int32), np.zeros((), np.int32))


def train_step(recipe: Recipe, state: TrainState, source: Source, rows: jax.Array | None) -> TrainState:
    """Takes one optimization step on these rows of the source; on all of it if `rows` is None."""
    take = (lambda leaf: leaf) if rows is None else (lambda leaf: leaf[rows])
    inputs, labels = jax.lax.with_sharding_constraint(
        Examples(*map(take, source.examples)), NamedSharding(recipe.mesh, P(AXIS))
    )
    key = jax.random.fold_in(jax.random.key(source.seed), state.step)
    inputs = source.preprocessing(augment(recipe.data, key, inputs))

    grads, loss, sums, batch_stats = _gradients(recipe, state.variables, inputs, labels)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.variables.params)
    variables = Variables(optax.apply_updates(state.variables.params, updates), batch_stats)
    average = state.average
    if average is not None:
        # Young averages forget faster, so that the initial weights do not stay in them.
        decay = jnp.minimum(recipe.options.average, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(variables, average, 1 - decay)
    return TrainState(
        step=state.step + 1,
        variables=variables,
        average=average,
        opt_state=opt_state,
        sums=jax.tree.map(jnp.add, state.sums, sums),
        failed_at=jnp.where(
            jnp.isfinite(loss), state.failed_at, jnp.minimum(state.failed_at, state.step + 1)
        ),
    )


def _gradients(recipe, variables, inputs, labels):
    """Returns the gradients of the mean loss, that loss, the sums to report, and new running statistics."""
    parts = recipe.options.accumulate

    def mean_loss(params, batch_stats, network, inputs, labels):
        logits, batch_stats = network.apply(Variables(params, batch_stats), inputs, train=True)
        sums = _sums(logits, labels)
        objective = sums.loss / labels.size
        if smoothing := recipe.options.label_smoothing:
            # Cross-entropy with all classes alike is that with the label, plus what the logits are apart.
            uniform = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
            objective = (1 - smoothing) * objective + smoothing * uniform.mean()
        return objective, (sums, batch_stats)

    gradients = jax.value_and_grad(mean_loss, has_aux=True)
    if parts == 1:
        (loss, (sums, batch_stats)), grads = gradients(*variables, recipe.network, inputs, labels)
        return grads, loss, sums, batch_stats

    def add_part(totals, part):
        *totals, batch_stats = totals
        (loss, (sums, batch_stats)), grads = gradients(variables.params, batch_stats, recipe.pooling, *part)
        return (*jax.tree.map(jnp.add, totals, [grads, loss, sums]), batch_stats), None

    # Each part has rows of every device.
    split = lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1)
    nothing = jax.tree.map(
        jnp.zeros_like, (variables.params, jnp.zeros(()), no_sums(), variables.batch_stats)
    )
    (grads, loss, sums, pooled), _ = jax.lax.scan(add_part, nothing, (split(inputs), split(labels)))
    grads, loss = jax.tree.map(lambda total: total / parts, (grads, loss))
    return grads, loss, sums, _absorb(recipe.rule, variables.batch_stats, pooled)


def _absorb(rule, running, batch):
    """Applies an update rule to the moments of every layer, each a dict of mean, var and count."""
    if "mean" not in running:
        return {name: _absorb(rule, running[name], batch[name]) for name in running}
    return rule(jbn.Moments(**running), jbn.Moments(**batch))._asdict()


def loops_well(network: Network, input_shape: tuple[int, ...]) -> bool:
    """Tells whether a loop in one compiled program is the fast way to take many steps.

    It is, but for convolutions on a CPU: there XLA computes their gradients in a loop some 25 times slower
    than outside (jax issue 12868).
    """
    program = jax.make_jaxpr(network.init)(jax.random.key(0), jnp.zeros((1, *input_shape)))
    return jax.default_backend() != "cpu" or "conv_general_dilated" not in str(program)


def train_steps(
    recipe: Recipe, state: TrainState, source: Source, order: jax.Array, start: int, steps: int, *, loop: bool
) -> TrainState:
    """Takes `steps` steps, on the rows `order[start:]`, a batch at a time; the old `state` is used up.

    With `loop` in one compiled program, else in one call each. That program takes the number of steps as an
    argument, so how many are taken at a time cannot change the result.
    """
    if loop:
        return _many_steps(recipe, state, source, order, start, steps)
    for step in range(steps):
        state = _one_step(recipe, state, source, order, start + step * recipe.batch_size)
    return state


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_on_batch(recipe: Recipe, state: TrainState, source: Source) -> TrainState:
    """Takes one step on a source that is one batch; the old `state` is used up."""
    return train_step(recipe, state, source, None)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _one_step(recipe, state, source, order, start):
    return train_step(recipe, state, source, jax.lax.dynamic_slice_in_dim(order, start, recipe.batch_size))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _many_steps(recipe, state, source, order, start, steps):
    def body(i, state):
        return _one_step(recipe, state, source, order, start + i * recipe.batch_size)

    return jax.lax.fori_loop(0, steps, body, state)


@partial(jax.jit, static_argnums=(0, 1))
def eval_step(
    network: Network, mesh: Mesh, variables: Variables, preprocessing: Preprocessing, examples: Examples
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of each example, (n,), float32, and whether it is answered correctly, (n,), bool.

    Each device runs the same program on its rows, whose result is therefore the same on any number of them.
    """

    def on_device(variables, preprocessing, examples):
        logits, _ = network.apply(variables, preprocessing(examples.inputs), train=False)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels)
        return loss, logits.argmax(-1) == examples.labels

    over_devices = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=P(AXIS))
    scores = over_devices(variables, preprocessing, examples)
    return jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, P()))


@partial(jax.jit, static_argnums=0)
def probabilities(
    network: Network, variables: Variables, preprocessing: Preprocessing, inputs: jax.Array
) -> jax.Array:
    """Returns the probabilities of the classes, (n, classes), float32, of raw inputs."""
    logits, _ = network.apply(variables, preprocessing(inputs), train=False)
    return jax.nn.softmax(logits)


def _sums(logits, labels):
    return Sums(
        loss=jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels)),
        correct=jnp.sum(logits.argmax(-1) == labels, dtype=jnp.int32),
        examples=jnp.int32(labels.size),
    )
