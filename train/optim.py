"""Optimizers and learning-rate schedules, from optax."""

import jax
import optax

from train.config import Optimizer


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: a linear warm-up, then the schedule."""
    peak, warmup = config.learning_rate, config.warmup_steps
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, max(steps - warmup, 1)),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def build(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """Builds the optimizer that a job names. Weight decay spares scales and biases."""
    rate = schedule(config, steps)
    if config.name == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=_decayed)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
        optax.sgd(rate, momentum=config.momentum or None, nesterov=config.momentum > 0),
    )


def _decayed(params):
    """Marks what decays: a scale or bias shrunk by decay would only change what the network can represent."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)
