"""Reinforcement learning by CrossQ on gymnasium's Pendulum: critics with batch norm, no target networks.

The critics see states and actions of now and of the next step as one batch, so that their statistics are
those of both (Bhatt et al. 2024, "CrossQ: Batch Normalization in Deep Reinforcement Learning for Greater
Sample Efficiency and Simplicity"). Networks and settings are those of https://github.com/araffin/sbx, but for
one: there the norms begin to renormalize after 100,000 updates, and here, in a shorter run, after 1,000.

    python examples/training/crossq.py
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbn
import jbn.linen

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise ImportError("This example needs gymnasium; install it with: pip install gymnasium") from error

STEPS, BATCH_SIZE, RANDOM_STEPS, EPISODES = 3000, 256, 100, 10
ACTOR, CRITIC, CRITICS = (256, 256), (1024, 1024), 2
DISCOUNT, LEARNING_RATE, POLICY_DELAY, TARGET_ENTROPY = 0.99, 1e-3, 3, -1.0
RENORM = jbn.renorm_limits(plain=1_000, r_steps=0, d_steps=0)  # with plain=100_000 it is sbx's


class Network(nn.Module):
    """Norm, then dense, ReLU and norm for each width, then dense."""

    widths: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x, train):
        norm = partial(
            jbn.linen.BatchNorm, use_running_average=not train, momentum=0.99, epsilon=1e-3, renorm=RENORM
        )
        x = norm()(x)
        for width in self.widths:
            x = norm()(nn.relu(nn.Dense(width)(x)))
        return nn.Dense(self.outputs)(x)


class State(NamedTuple):
    params: dict[str, Any]  # of "actor", "critics" (each leaf with a leading axis of critics), "log_alpha"
    batch_stats: dict[str, Any]  # of "actor" and "critics"
    opt_states: dict[str, Any]


class Batch(NamedTuple):
    observation: Any  # (N, 3)
    action: Any  # (N, 1), in [-1, 1]
    reward: Any  # (N,)
    next_observation: Any  # (N, 3)


actor = Network(ACTOR, 2)
critics = nn.vmap(
    Network,
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
    in_axes=None,
    axis_size=CRITICS,
)(CRITIC, 1)
optimizer = optax.adam(LEARNING_RATE, b1=0.5)


def init(key):
    of_actor, of_critics = jax.random.split(key)
    variables = {
        "actor": jax.jit(actor.init, static_argnums=2)(of_actor, jnp.zeros((1, 3)), False),
        "critics": jax.jit(critics.init, static_argnums=2)(of_critics, jnp.zeros((1, 4)), False),
    }
    params = {name: value["params"] for name, value in variables.items()} | {"log_alpha": jnp.zeros(())}
    batch_stats = {name: value["batch_stats"] for name, value in variables.items()}
    return State(params, batch_stats, {name: optimizer.init(value) for name, value in params.items()})


def apply(network, name, params, state, x, train):
    variables = {"params": params, "batch_stats": state.batch_stats[name]}
    y, updated = network.apply(variables, x, train, mutable=["batch_stats"])
    return y, updated.get("batch_stats", state.batch_stats[name])


def act(params, state, observation, key, train=False):
    """Sample actions, and return them with their log density and the actor's statistics."""
    outputs, batch_stats = apply(actor, "actor", params, state, observation, train)
    mean, log_sd = outputs[..., 0], outputs[..., 1].clip(-20, 2)
    noise = jax.random.normal(key, mean.shape)
    before = mean + jnp.exp(log_sd) * noise
    log_density = -0.5 * noise**2 - log_sd - 0.5 * jnp.log(2 * jnp.pi)
    log_density -= 2 * (jnp.log(2) - before - nn.softplus(-2 * before))  # of the tanh that follows
    return jnp.tanh(before)[..., None], log_density, batch_stats


def descend(state, name, gradient, batch_stats=None):
    updates, opt_state = optimizer.update(gradient, state.opt_states[name])
    return State(
        state.params | {name: optax.apply_updates(state.params[name], updates)},
        state.batch_stats if batch_stats is None else state.batch_stats | {name: batch_stats},
        state.opt_states | {name: opt_state},
    )


def update_critics(state, batch, key):
    next_action, log_density, _ = act(state.params["actor"], state, batch.next_observation, key)
    now = jnp.concatenate([batch.observation, batch.action], axis=-1)
    then = jnp.concatenate([batch.next_observation, next_action], axis=-1)

    def loss(params):
        q, batch_stats = apply(critics, "critics", params, state, jnp.concatenate([now, then]), True)
        q_now, q_then = jnp.split(q[..., 0], 2, axis=1)  # (critics, N) each
        # Pendulum never ends, it is only cut off: all steps have a next one.
        value = q_then.min(0) - jnp.exp(state.params["log_alpha"]) * log_density
        target = jax.lax.stop_gradient(batch.reward + DISCOUNT * value)
        return 0.5 * jnp.sum(jnp.mean((q_now - target) ** 2, axis=1)), batch_stats

    gradient, batch_stats = jax.grad(loss, has_aux=True)(state.params["critics"])
    return descend(state, "critics", gradient, batch_stats)


def update_actor(state, batch, key):
    alpha = jnp.exp(state.params["log_alpha"])

    def loss(params):
        action, log_density, batch_stats = act(params, state, batch.observation, key, train=True)
        x = jnp.concatenate([batch.observation, action], axis=-1)
        q, _ = apply(critics, "critics", state.params["critics"], state, x, False)
        return jnp.mean(alpha * log_density - q[..., 0].min(0)), (log_density.mean(), batch_stats)

    gradient, (log_density, batch_stats) = jax.grad(loss, has_aux=True)(state.params["actor"])
    state = descend(state, "actor", gradient, batch_stats)
    return descend(state, "log_alpha", -(log_density + TARGET_ENTROPY))


@partial(jax.jit, donate_argnums=0)
def update(state, batch, key, number):
    of_critics, of_actor = jax.random.split(key)
    state = update_critics(state, batch, of_critics)
    is_turn = number % POLICY_DELAY == 0
    return jax.lax.cond(is_turn, update_actor, lambda state, *_: state, state, batch, of_actor)


@jax.jit
def sample_action(state, observation, key):
    return act(state.params["actor"], state, observation[None], key)[0][0]


@jax.jit
def best_action(state, observation):
    return jnp.tanh(apply(actor, "actor", state.params["actor"], state, observation[None], False)[0][0, :1])


def mean_return(env, state, episodes):
    total = 0.0
    for seed in range(episodes):
        observation, _ = env.reset(seed=1000 + seed)
        over = False
        while not over:
            action = np.asarray(best_action(state, observation))
            observation, reward, _, over, _ = env.step(2 * action)
            total += float(reward)
    return total / episodes


def main(steps: int = STEPS, episodes: int = EPISODES) -> dict[str, float]:
    env, rng, key = gymnasium.make("Pendulum-v1"), np.random.default_rng(0), jax.random.key(0)
    state = init(key)
    found = {"mean return before": mean_return(env, state, episodes)}
    shapes = Batch((3,), (1,), (), (3,))
    memory = Batch(*(np.zeros((steps, *shape), np.float32) for shape in shapes))
    observation, _ = env.reset(seed=0)
    for step in range(steps):
        keys = jax.random.split(jax.random.fold_in(key, step), 2)
        explores = step < RANDOM_STEPS
        action = rng.uniform(-1, 1, 1) if explores else np.asarray(sample_action(state, observation, keys[0]))
        next_observation, reward, _, over, _ = env.step(2 * action)  # torques are in [-2, 2]
        for array, value in zip(memory, Batch(observation, action, reward, next_observation)):
            array[step] = value
        observation = env.reset()[0] if over else next_observation
        if not explores:
            rows = rng.integers(0, step + 1, BATCH_SIZE)
            state = update(state, Batch(*(array[rows] for array in memory)), keys[1], step)
    found["mean return after"] = mean_return(env, state, episodes)
    for name, value in found.items():
        print(f"{name}: {value:.0f}")
    return found


if __name__ == "__main__":
    main()
