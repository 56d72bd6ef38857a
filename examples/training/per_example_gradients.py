"""Gradients of single examples, clipped, as differentially private training (DP-SGD) needs them.

With batch statistics an example changes the gradients of all others, so that clipping each does not bound
what one example does to their sum. `frozen` norms use running statistics, measured here on public data:
replacing one example changes one gradient, and their sum by at most twice the clipping norm.

    python examples/training/per_example_gradients.py
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import jbn.linen

PUBLIC, BATCH_SIZE, WIDTH, STEPS = 400, 64, 32, 150
CLIP, NOISE, LEARNING_RATE = 1.0, 0.5, 0.5  # NOISE: the sd of a step's, in units of CLIP


class Model(nn.Module):
    frozen: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, use_bias=False)(x)
        x = jbn.linen.BatchNorm(use_running_average=False, frozen=self.frozen)(x)
        return nn.Dense(10)(nn.relu(x))


def losses(model, variables, params, x, y):
    logits, _ = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def frozen_gradients(variables, x, y):
    """Return the gradients of each example's loss, (N, ...), as if each was alone, which it is."""
    one = lambda params, x, y: losses(Model(frozen=True), variables, params, x[None], y[None])[0]
    return jax.vmap(jax.grad(one), in_axes=(None, 0, 0))(variables["params"], x, y)


def batch_gradients(variables, x, y):
    """The same with the statistics of the batch: there is no loss of an example without the others."""
    return jax.jacrev(partial(losses, Model(frozen=False), variables))(variables["params"], x, y)


def clipped(gradients):
    """Return each example's gradient as a vector, (N, parameters), scaled to a norm of CLIP at most."""
    flat = jax.vmap(lambda gradient: ravel_pytree(gradient)[0])(gradients)
    return flat * jnp.minimum(1, CLIP / jnp.linalg.norm(flat, axis=1, keepdims=True))


def main(steps: int = STEPS) -> dict[str, float]:
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    public, x, x_test = jnp.split(x, (PUBLIC, len(x) - 400))
    _, y, y_test = jnp.split(y, (PUBLIC, len(y) - 400))
    model = Model(frozen=True)
    variables = jax.jit(model.init)(jax.random.key(0), public)
    variables = jbn.linen.recalibrate(model.apply, variables, [public])

    # One example of a batch is replaced by an outlier.
    batch, labels = x[:BATCH_SIZE], y[:BATCH_SIZE]
    replaced = batch.at[0].multiply(100)
    found = {}
    for name, gradients in {"frozen": frozen_gradients, "of the batch": batch_gradients}.items():
        f = jax.jit(lambda x, gradients=gradients: clipped(gradients(variables, x, labels)))
        before, after = np.asarray(f(batch)), np.asarray(f(replaced))
        others = np.linalg.norm(after[1:] - before[1:], axis=1).max()
        total = np.linalg.norm(after.sum(0) - before.sum(0))
        found[f"change of another example's gradient / CLIP, {name}"] = float(others / CLIP)
        found[f"change of the sum of gradients / CLIP, {name}"] = float(total / CLIP)

    flat, unravel = ravel_pytree(variables["params"])

    def step(flat, key):
        of_rows, of_noise = jax.random.split(key)
        rows = jax.random.randint(of_rows, (BATCH_SIZE,), 0, len(x))
        gradients = clipped(frozen_gradients({**variables, "params": unravel(flat)}, x[rows], y[rows]))
        noise = NOISE * CLIP * jax.random.normal(of_noise, flat.shape)
        return flat - LEARNING_RATE * (gradients.sum(0) + noise) / BATCH_SIZE, None

    flat, _ = jax.jit(lambda flat, keys: jax.lax.scan(step, flat, keys))(
        flat, jax.random.split(jax.random.key(1), steps)
    )
    logits = jax.jit(model.apply)({**variables, "params": unravel(flat)}, x_test)
    found["test accuracy, frozen"] = float(np.mean(np.asarray(logits).argmax(-1) == np.asarray(y_test)))
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    return found


if __name__ == "__main__":
    main()
