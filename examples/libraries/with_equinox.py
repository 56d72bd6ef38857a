"""An Equinox layer over jbn: running statistics in a `StateIndex`, the batch an axis of `jax.vmap`.

It trains on digits beside `equinox.nn.BatchNorm` in both of its modes, all with a momentum of 0.99, and
evaluates after a few steps, which shows whether running statistics are debiased, and rightly.

    python examples/libraries/with_equinox.py
"""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jbn

STEPS, BATCH_SIZE, WIDTH, LEARNING_RATE = 20, 64, 64, 3e-3


class BatchNorm(eqx.Module):
    """Batch normalization of one example, channels first, for use inside `jax.vmap(axis_name=...)`."""

    params: jbn.Params
    running: eqx.nn.StateIndex
    axis_name: str = eqx.field(static=True)
    update: Callable = eqx.field(static=True)
    inference: bool

    def __init__(self, features, axis_name, update=jbn.ema(0.99, debias=True), inference=False):
        self.params, running = jbn.init(features)
        self.running = eqx.nn.StateIndex(running)
        self.axis_name, self.update, self.inference = axis_name, update, inference

    def __call__(self, x, state):
        y, running = jbn.batch_norm(
            x,
            self.params,
            state.get(self.running),
            train=not self.inference,
            axis=0,
            axis_name=self.axis_name,
            update=self.update,
        )
        return y, state.set(self.running, running)


class Model(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.Module
    out: eqx.nn.Linear

    def __init__(self, norm, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, WIDTH, use_bias=False, key=keys[0])
        self.norm = norm(WIDTH, "batch")
        self.out = eqx.nn.Linear(WIDTH, 10, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.hidden(x), state)
        return self.out(jax.nn.relu(x)), state


def over_batch(model):
    return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))


def accuracy(norm, x, y, x_test, y_test):
    model, state = eqx.nn.make_with_state(Model)(norm, jax.random.key(0))
    optimizer = optax.adam(LEARNING_RATE)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def loss(model, state, x, y):
        logits, state = over_batch(model)(x, state)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

    @eqx.filter_jit
    def step(model, state, opt_state, x, y):
        grads, state = eqx.filter_grad(loss, has_aux=True)(model, state, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state

    for i in range(STEPS):
        rows = slice(i * BATCH_SIZE, (i + 1) * BATCH_SIZE)
        model, state, opt_state = step(model, state, opt_state, x[rows], y[rows])
    evaluate = eqx.filter_jit(lambda model, state: over_batch(model)(x_test, state)[0])
    logits = evaluate(eqx.nn.inference_mode(model), state)
    return float(jnp.mean(logits.argmax(-1) == y_test))


def main() -> dict[str, float]:
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    norms = {
        "jbn": BatchNorm,
        "equinox, ema": partial(eqx.nn.BatchNorm, mode="ema"),
        "equinox, batch": partial(eqx.nn.BatchNorm, mode="batch"),
    }
    split = x[:-400], y[:-400], x[-400:], y[-400:]
    found = {name: accuracy(norm, *split) for name, norm in norms.items()}
    for name, value in found.items():
        print(f"test accuracy, {name}: {value:.3f}")
    return found


if __name__ == "__main__":
    main()
