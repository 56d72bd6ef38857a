import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from train import optim
from train.config import Optimizer

PARAMS = {
    "Dense_0": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)},
    "BatchNorm_0": {"scale": jnp.full(2, 2.0), "bias": jnp.full(2, 2.0)},
}


@pytest.mark.parametrize(
    "schedule, after",
    [("constant", lambda t: 1.0), ("cosine", lambda t: (1 + np.cos(np.pi * t)) / 2)],
)
@pytest.mark.parametrize("warmup", [0, 4, 30])
def test_learning_rate_warms_up_then_follows_the_schedule_to_the_end(schedule, after, warmup):
    rate = optim.schedule(Optimizer(learning_rate=0.5, schedule=schedule, warmup_steps=warmup), steps=20)
    for step in range(21):
        wanted = 0.5 * (step / warmup if step < warmup else after((step - warmup) / max(20 - warmup, 1)))
        assert_allclose(rate(step), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_spares_scale_and_bias(name):
    optimizer = optim.build(
        Optimizer(name=name, learning_rate=0.1, weight_decay=0.5, schedule="constant"), steps=10
    )
    zeros = {
        layer: {key: jnp.zeros_like(value) for key, value in leaves.items()}
        for layer, leaves in PARAMS.items()
    }
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    assert (new["Dense_0"]["kernel"] < PARAMS["Dense_0"]["kernel"]).all()
    for layer, key in (("Dense_0", "bias"), ("BatchNorm_0", "scale"), ("BatchNorm_0", "bias")):
        assert_array_equal(new[layer][key], PARAMS[layer][key])


def follow(config, gradients, weight=2.0, steps=10):
    """Returns the weight after each step."""
    optimizer = optim.build(config, steps)
    params = {"kernel": jnp.array([weight])}
    state = optimizer.init(params)
    weights = []
    for gradient in gradients:
        updates, state = optimizer.update({"kernel": jnp.array([gradient])}, state, params)
        params = optax.apply_updates(params, updates)
        weights.append(params["kernel"][0])
    return weights


GRADIENTS = (1.0, -3.0, 0.5, 2.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_nesterovs_by_hand_at_the_rate_of_its_step(momentum):
    config = Optimizer(learning_rate=0.1, momentum=momentum, weight_decay=0.01, warmup_steps=2)
    rate = optim.schedule(config, 10)
    weight, velocity, expected = 2.0, 0.0, []
    for step, gradient in enumerate(GRADIENTS):
        total = gradient + 0.01 * weight
        velocity = momentum * velocity + total
        weight -= float(rate(step)) * (momentum * velocity + total)
        expected.append(weight)
    assert_allclose(follow(config, GRADIENTS), expected, rtol=1e-5)


def test_adamw_is_adam_with_decoupled_decay_by_hand_at_the_rate_of_its_step():
    config = Optimizer(name="adamw", learning_rate=0.1, weight_decay=0.01, warmup_steps=2)
    rate = optim.schedule(config, 10)
    weight, mean, square, expected = 2.0, 0.0, 0.0, []
    for step, gradient in enumerate(GRADIENTS):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        direction = (mean / (1 - 0.9 ** (step + 1))) / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
        weight -= float(rate(step)) * (direction + 0.01 * weight)
        expected.append(weight)
    assert_allclose(follow(config, GRADIENTS), expected, rtol=1e-5)
