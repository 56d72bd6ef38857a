"""A Haiku module over jbn: scale and offset by `hk.get_parameter`, running moments by `hk.get_state`.

It trains on pressures in pascals, about 100,000 and never far from it, beside `hk.BatchNorm`, whose variance
E[x^2] - E[x]^2 has nothing left of them in float32.

    python examples/libraries/with_haiku.py
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbn

STEPS, BATCH_SIZE, LEARNING_RATE = 100, 128, 0.1


class BatchNorm(hk.Module):
    def __init__(self, update=jbn.ema(0.9, debias=True), name=None):
        super().__init__(name=name)
        self.update = update

    def __call__(self, x, is_training):
        params, initial = jbn.init(x.shape[-1])
        params = jbn.Params(
            scale=hk.get_parameter("scale", params.scale.shape, init=jnp.ones),
            bias=hk.get_parameter("offset", params.bias.shape, init=jnp.zeros),
        )
        running = hk.get_state("running", (), init=lambda *_: initial)
        y, running = jbn.batch_norm(x, params, running, train=is_training, update=self.update)
        if is_training:
            hk.set_state("running", running)
        return y


def main() -> dict[str, float]:
    rng = np.random.default_rng(0)
    pressure = rng.normal(100_000, 10, (STEPS + 10, BATCH_SIZE, 4))
    rain = np.tanh((pressure[..., 0] - pressure[..., 1]) / 10)  # float64; what is trained on is float32
    x, y = jnp.asarray(pressure, jnp.float32), jnp.asarray(rain, jnp.float32)

    def error(norm):
        def forward(x, is_training):
            return hk.nets.MLP([32, 1])(norm()(x, is_training))[:, 0]

        model = hk.transform_with_state(forward)
        params, state = model.init(jax.random.key(0), x[0], True)
        optimizer = optax.sgd(LEARNING_RATE)

        def step(carry, batch):
            params, state, opt_state = carry
            x, y = batch

            def loss(params):
                predicted, new_state = model.apply(params, state, None, x, True)
                return jnp.mean((predicted - y) ** 2), new_state

            grads, state = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), state, opt_state), None

        carry, batches = (params, state, optimizer.init(params)), (x[:STEPS], y[:STEPS])
        (params, state, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))(carry)
        predicted, _ = model.apply(params, state, None, x[STEPS:].reshape(-1, 4), False)
        return float(jnp.sqrt(jnp.mean((predicted - y[STEPS:].ravel()) ** 2)))

    found = {
        "jbn": error(BatchNorm),
        "haiku": error(lambda: hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)),
        "always the mean": float(rain[STEPS:].std()),
    }
    for name, value in found.items():
        print(f"test error, {name}: {value:.3f}")
    return found


if __name__ == "__main__":
    main()
