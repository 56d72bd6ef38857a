"""An ensemble by `jax.vmap`: members of other seeds and learning rates train in one program.

Each has its own parameters and running statistics. Of the layer nothing changes: what it reduces over is the
batch of one member. Members are what they would be if each was trained alone.

    python examples/training/ensemble.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jbn
import jbn.linen

MEMBERS, STEPS, BATCH_SIZE, WIDTH = 8, 60, 64, 32
LEARNING_RATES = jnp.geomspace(0.03, 1, MEMBERS)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(WIDTH, use_bias=False)(x)
        x = jbn.linen.BatchNorm(use_running_average=not train, update=jbn.ema(0.9, debias=True))(x)
        return nn.Dense(10)(nn.relu(x))


def main() -> dict[str, float]:
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    x, x_test, y, y_test = x[:-400], x[-400:], y[:-400], y[-400:]
    model = Model()

    def train(key, learning_rate):
        key, init_key = jax.random.split(key)
        variables = model.init(init_key, x, train=False)
        optimizer = optax.sgd(learning_rate, momentum=0.9)

        def step(carry, key):
            variables, opt_state = carry
            rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(x))

            def loss(params):
                logits, updated = model.apply(
                    {**variables, "params": params}, x[rows], train=True, mutable=["batch_stats"]
                )
                return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean(), updated

            grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
            updates, opt_state = optimizer.update(grads, opt_state)
            return ({"params": optax.apply_updates(variables["params"], updates), **updated}, opt_state), None

        carry = variables, optimizer.init(variables["params"])
        (variables, _), _ = jax.lax.scan(step, carry, jax.random.split(key, STEPS))
        return variables, nn.softmax(model.apply(variables, x_test, train=False))

    keys = jax.random.split(jax.random.key(0), MEMBERS)
    together = jax.jit(jax.vmap(train))
    members, probabilities = jax.device_get(together(keys, LEARNING_RATES))  # each leaf: (members, ...)

    alone = jax.jit(train)
    differences = []
    for i in range(MEMBERS):
        member, _ = jax.device_get(alone(keys[i], LEARNING_RATES[i]))
        pairs = zip(jax.tree.leaves(members["batch_stats"]), jax.tree.leaves(member["batch_stats"]))
        differences += [np.abs(a[i] - b).max() for a, b in pairs]

    variances = members["batch_stats"]["BatchNorm_0"]["var"].mean(1)
    found = {
        "test accuracy of a member, mean": np.mean(probabilities.argmax(-1) == y_test),
        "test accuracy of the ensemble": np.mean(probabilities.mean(0).argmax(-1) == y_test),
        "running statistics, difference to members trained alone": max(differences),
        "running statistics, difference between members": np.ptp(variances),
    }
    found = {name: float(value) for name, value in found.items()}
    for name, value in found.items():
        print(f"{name}: {value:.2g}" if "difference" in name else f"{name}: {value:.3f}")
    return found


if __name__ == "__main__":
    main()
