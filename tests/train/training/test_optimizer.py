import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from train.config import Optimizer
from train.training import optimizer


def rates(*cases):
    """Return the rates of the steps, and of the one after them, for cases of (options, number of steps)."""
    schedules = [
        optimizer.schedule(Optimizer(learning_rate=0.5, **options), steps=steps, batch_size=128)
        for options, steps in cases
    ]
    found = jax.jit(lambda at: [schedule(at) for schedule in schedules])(jnp.arange(400))
    return [np.broadcast_to(each, 400)[: steps + 1] for each, (_, steps) in zip(found, cases)]


def test_learning_rate_warms_up_then_follows_the_schedule_to_the_end():
    schedules = {
        "constant": lambda t: 1.0,
        "cosine": lambda t: (1 + np.cos(np.pi * t)) / 2,
        "linear": lambda t: 1 - t,
    }
    cases = [
        ({"schedule": name, "warmup_steps": warmup}, steps)
        for name in schedules
        for warmup, steps in ((0, 20), (4, 1), (4, 20), (30, 20), (30, 333))
    ]
    for (options, steps), found in zip(cases, rates(*cases)):
        warmup, after = options["warmup_steps"], schedules[options["schedule"]]
        expected = [
            0.5 * (step / warmup if step < warmup else after((step - warmup) / max(steps - warmup, 1)))
            for step in range(steps + 1)
        ]
        assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=f"{options}, {steps} steps")


def test_each_milestone_reduces_the_learning_rate_once_after_warm_up():
    reached_of = {
        (20, (0.5, 0.75)): (10, 15),
        (200, (0.3, 0.6, 0.8)): (60, 120, 160),
        (7, (0.5,)): (4,),
        (3, (0.5, 0.6)): (2, 2),
        (5, ()): (),
    }
    cases = [
        ({"schedule": "step", "milestones": m, "milestone_factor": 0.2, "warmup_steps": warmup}, steps)
        for steps, m in reached_of
        for warmup in (0, 4, 12)
    ]
    for (options, steps), found in zip(cases, rates(*cases)):
        warmup, reached = options["warmup_steps"], reached_of[steps, options["milestones"]]
        after = [0.2 ** sum(step >= milestone for milestone in reached) for step in range(steps + 1)]
        expected = [0.5 * (step / warmup if step < warmup else after[step]) for step in range(steps + 1)]
        assert_allclose(found, expected, rtol=1e-5, err_msg=f"{options}, {steps} steps")


def test_learning_rate_is_in_proportion_to_the_batch_size_warm_up_included():
    factors = {0: 1, 128: 1, 32: 4, 512: 0.25, 96: 4 / 3}  # by the batch size that the rate is meant for
    cases = [
        ({"schedule": schedule, "warmup_steps": 3, "base_batch_size": base}, 12)
        for schedule in ("constant", "cosine", "linear", "step")
        for base in factors
    ]
    found = rates(*cases)
    for i, ((options, _), each) in enumerate(zip(cases, found)):
        usual, factor = found[i - i % len(factors)], factors[options["base_batch_size"]]
        assert usual.max() == 0.5
        assert_allclose(each, factor * usual, rtol=1e-5, atol=1e-7, err_msg=str(options))


RNG = np.random.RandomState(0)
PARAMS = {
    "Dense_0": {"kernel": RNG.randn(3, 2), "bias": RNG.randn(2)},
    "BatchNorm_0": {"scale": np.ones(2), "bias": np.zeros(2)},
    "Dense_1": {"kernel": 5 * RNG.randn(3, 2), "bias": np.zeros(2)},
}
GRADIENTS = [jax.tree.map(lambda leaf: RNG.randn(*leaf.shape), PARAMS) for _ in range(5)]
RATES = [0.0, 0.05, 0.1, 0.1, 0.1]


def float32(tree):
    return jax.tree.map(jnp.float32, tree)


def first_update(gradients, **options):
    """Return what the first step adds to the parameters, at a learning rate of 0.1."""
    config = Optimizer(learning_rate=0.1, schedule="constant", **options)
    transformation = optimizer.build(config, steps=10, batch_size=128)
    update = jax.jit(lambda grads, params: transformation.update(grads, transformation.init(params), params))
    return update(float32(gradients), float32(PARAMS))[0]


def test_first_step_of_sgd_is_as_large_as_the_batch_asks_for():
    updates = first_update(GRADIENTS[0], momentum=0.0, base_batch_size=32)  # of batches of 128
    jax.tree.map(lambda a, b: assert_allclose(a, -0.1 * 4 * b, rtol=1e-5), updates, GRADIENTS[0])


def sgd(weight, gradient, velocity, step, momentum, decay):
    total = gradient + decay * weight
    velocity = momentum * velocity + total
    return weight - RATES[step] * (momentum * velocity + total), velocity


def lars(weight, gradient, velocity, step, momentum, decay):
    total, trust = gradient, 1
    if decay:
        total = gradient + decay * weight
        trust = 0.001 * np.linalg.norm(weight) / np.linalg.norm(total)
    velocity = momentum * velocity + RATES[step] * trust * total
    return weight - velocity, velocity


def adam_direction(gradient, moments, step, eps):
    first, second = np.broadcast_to(moments, (2, *gradient.shape))
    first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
    unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
    return unbiased[0] / (np.sqrt(unbiased[1]) + eps), (first, second)


def adamw(weight, gradient, moments, step, momentum, decay):
    direction, moments = adam_direction(gradient, moments, step, 1e-8)
    return weight - RATES[step] * (direction + decay * weight), moments


def lamb(weight, gradient, moments, step, momentum, decay):
    direction, moments = adam_direction(gradient, moments, step, 1e-6)
    direction = direction + decay * weight
    trust = np.linalg.norm(weight) / np.linalg.norm(direction) if decay else 1
    return weight - RATES[step] * trust * direction, moments


@pytest.mark.parametrize(
    "rule, momentum", [(sgd, 0.0), (sgd, 0.9), (lars, 0.0), (lars, 0.9), (adamw, 0.9), (lamb, 0.9)]
)
def test_steps_are_the_papers_by_hand_at_the_rate_of_each_step(rule, momentum):
    options = {"learning_rate": 0.1, "schedule": "constant", "warmup_steps": 2}
    config = Optimizer(name=rule.__name__, momentum=momentum, weight_decay=0.01, **options)
    transformation = optimizer.build(config, steps=5, batch_size=128)

    @jax.jit
    def update(gradients, state, params):
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state, history = float32(PARAMS), transformation.init(float32(PARAMS)), []
    for gradients in GRADIENTS:
        params, state = update(float32(gradients), state, params)
        history.append(params)
    for layer, leaves in PARAMS.items():
        for key, weight in leaves.items():
            memory, decay = 0.0, 0.01 if key == "kernel" else 0
            for step, gradients in enumerate(GRADIENTS):
                weight, memory = rule(weight, gradients[layer][key], memory, step, momentum, decay)
                assert_allclose(history[step][layer][key], weight, rtol=2e-5, atol=1e-6)


def norm(tree):
    return np.sqrt(sum((np.float64(leaf) ** 2).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_clipping_bounds_the_norm_of_all_gradients_together_before_decay(clip):
    updates = first_update(GRADIENTS[0], momentum=0.0, clip_norm=clip)
    assert 3 < norm(GRADIENTS[0]) < 100
    assert_allclose(norm(updates), 0.1 * min(norm(GRADIENTS[0]), clip), rtol=1e-5)
    decayed = first_update(GRADIENTS[0], momentum=0.0, clip_norm=clip, weight_decay=0.5)
    for layer, leaves in GRADIENTS[0].items():
        for key, gradient in leaves.items():
            clipped = gradient * min(1, clip / norm(GRADIENTS[0]))
            decay = 0.5 * PARAMS[layer][key] if key == "kernel" else 0
            assert_allclose(updates[layer][key], -0.1 * clipped, rtol=1e-5)
            assert_allclose(decayed[layer][key], -0.1 * (clipped + decay), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_what_is_frozen_stays_without_state_and_the_rest_is_trained_as_if_it_were_all():
    part = {"Dense_1": PARAMS["Dense_1"]}
    learning = lambda params: {name: dict.fromkeys(leaves, name in part) for name, leaves in params.items()}
    of_part = lambda tree: {name: tree[name] for name in part}
    for name in ("sgd", "adamw", "lars", "lamb"):
        config = Optimizer(name=name, weight_decay=0.3, clip_norm=0.5, schedule="constant")
        options = {"steps": 10, "batch_size": 128}
        alone, whole = (
            optimizer.build(config, **options),
            optimizer.build(config, **options, learning=learning),
        )
        expected_state, state = alone.init(float32(part)), whole.init(float32(PARAMS))
        assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(expected_state))
        for gradients in GRADIENTS[:2]:
            expected, expected_state = alone.update(
                float32(of_part(gradients)), expected_state, float32(part)
            )
            updates, state = whole.update(float32(gradients), state, float32(PARAMS))
            jax.tree.map(np.testing.assert_array_equal, of_part(updates), expected)
            frozen = [updates[name] for name in PARAMS if name not in part]
            assert not any(map(np.any, jax.tree.leaves(frozen))), name


def test_a_clip_norm_of_0_leaves_gradients_as_they_are():
    large = jax.tree.map(lambda leaf: 1e6 * leaf, GRADIENTS[0])
    updates = first_update(large, momentum=0.0)
    jax.tree.map(lambda a, b: assert_allclose(a, -0.1 * b, rtol=1e-5), updates, large)
