"""The training state as one pytree, and the pure functions that train and evaluate with it."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from train.data import Batch, Split

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
    params: Any
    batch_stats: Any  # running statistics; {} without batch normalization
    opt_state: optax.OptState
    sums: Sums  # of training, since they were last reported
    failed_at: jax.Array  # (), int32: the first step, from 1, whose loss was not finite; or NEVER


@partial(jax.jit, static_argnums=(0, 1))
def create(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, inputs: jax.Array
) -> TrainState:
    """Initializes everything at step 0; of `inputs` only the shape matters."""
    variables = model.init(jax.random.key(seed), inputs, train=False)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        sums=no_sums(),
        failed_at=jnp.full((), NEVER, jnp.int32),
    )


def no_sums() -> Sums:
    """Returns the sums over no examples."""
    return Sums(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    inputs: jax.Array,
    labels: jax.Array,
) -> TrainState:
    """Takes one optimization step on one batch."""

    def mean_loss(params):
        logits, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats}, inputs, train=True, mutable=["batch_stats"]
        )
        sums = _sums(logits, labels, jnp.ones(labels.shape, bool))
        return sums.loss / labels.size, (sums, updated.get("batch_stats", {}))

    (loss, (sums, batch_stats)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        sums=jax.tree.map(jnp.add, state.sums, sums),
        failed_at=jnp.where(
            jnp.isfinite(loss), state.failed_at, jnp.minimum(state.failed_at, state.step + 1)
        ),
    )


def loops_well(model: nn.Module, inputs: jax.Array) -> bool:
    """Tells whether a loop in one compiled program is the fast way to take many steps.

    It is, but for convolutions on a CPU: there XLA computes their gradients in a loop some 25 times slower
    than outside (jax issue 12868).
    """
    program = jax.make_jaxpr(partial(model.init, train=False))(jax.random.key(0), inputs)
    return jax.default_backend() != "cpu" or "conv_general_dilated" not in str(program)


def train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    data: Split,
    order: jax.Array,
    start: int,
    steps: int,
    *,
    batch_size: int,
    loop: bool,
) -> TrainState:
    """Takes `steps` steps, on the rows `order[start:]`, `batch_size` at a time; the old `state` is used up.

    With `loop` in one compiled program, else in one call each. That program takes the number of steps as an
    argument, so how many are taken at a time cannot change the result.
    """
    if loop:
        return _many_steps(model, optimizer, batch_size, state, data, order, start, steps)
    for step in range(steps):
        state = _one_step(model, optimizer, batch_size, state, data, order, start + step * batch_size)
    return state


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _one_step(model, optimizer, batch_size, state, data, order, start):
    rows = jax.lax.dynamic_slice_in_dim(order, start, batch_size)
    return train_step(model, optimizer, state, data.inputs[rows], data.labels[rows])


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _many_steps(model, optimizer, batch_size, state, data, order, start, steps):
    def body(i, state):
        return _one_step(model, optimizer, batch_size, state, data, order, start + i * batch_size)

    return jax.lax.fori_loop(0, steps, body, state)


@partial(jax.jit, static_argnums=0)
def eval_step(model: nn.Module, params: Any, batch_stats: Any, batch: Batch) -> Sums:
    """Sums loss and correct answers over the examples of a batch that are not padding."""
    logits = model.apply({"params": params, "batch_stats": batch_stats}, batch.inputs, train=False)
    return _sums(logits, batch.labels, batch.mask)


def _sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return Sums(
        loss=jnp.sum(loss, where=mask),
        correct=jnp.sum(logits.argmax(-1) == labels, where=mask, dtype=jnp.int32),
        examples=jnp.sum(mask, dtype=jnp.int32),
    )
