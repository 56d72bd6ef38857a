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
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rate_warms_up_then_follows_the_schedule_to_the_end(schedule, after, warmup):
    rate = optim.schedule(Optimizer(learning_rate=0.5, schedule=schedule, warmup_steps=warmup), steps=20)
    for step in range(21):
        wanted = 0.5 * (step / warmup if step < warmup else after((step - warmup) / (20 - warmup)))
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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_nesterovs_by_hand(momentum):
    config = Optimizer(learning_rate=0.1, momentum=momentum, weight_decay=0.01, schedule="constant")
    optimizer = optim.build(config, steps=10)
    params, state = {"kernel": jnp.array([2.0])}, None
    state = optimizer.init(params)
    weight, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0, 0.5):
        updates, state = optimizer.update({"kernel": jnp.array([gradient])}, state, params)
        params = optax.apply_updates(params, updates)
        total = gradient + 0.01 * weight
        velocity = momentum * velocity + total
        weight -= 0.1 * (momentum * velocity + total)
    assert_allclose(params["kernel"], [weight], rtol=1e-5)
