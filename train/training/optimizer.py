"""Optimizers and learning-rate schedules, from optax."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import optax

from train.config import Optimizer


def schedule(config: Optimizer, *, steps: int, batch_size: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: a linear warm-up from 0, then the schedule.

    Where the job gives the batch size that its peak is meant for, the peak is in proportion to the batch
    size: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.1.

    Cosine and line end with the job, at 0. Milestones are fractions of the whole job, warm-up included.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    peak *= batch_size / config.base_batch_size if config.base_batch_size else 1
    rest = max(steps - warmup, 1)
    # Counted, since in a short job two milestones may round to one step.
    milestones = Counter(round(fraction * steps) - warmup for fraction in config.milestones)
    factors = {step: config.milestone_factor**times for step, times in milestones.items()}
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "step": optax.piecewise_constant_schedule(peak, factors),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def build(
    config: Optimizer, *, steps: int, batch_size: int, learning: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
    """Build the optimizer that a job names. Weight decay spares scales and biases.

    Decay is added to the gradient in SGD and in LARS (You et al., 2017), and to Adam's direction in AdamW
    (Loshchilov & Hutter, 2019) and in LAMB (You et al., 2020). LARS gives scales and biases plain momentum,
    and LAMB plain Adam. `clip_norm` bounds the gradient without decay.

    Args:
      learning: marks, in a tree of parameters, those that learn; if not given, all do. Others stay as they
        are, have no state, and count for nothing in the norm that `clip_norm` bounds.
    """
    rate = schedule(config, steps=steps, batch_size=batch_size)
    decay, momentum = config.weight_decay, config.momentum
    optimizer = {
        "sgd": optax.chain(
            optax.add_decayed_weights(decay, mask=_weights),
            optax.sgd(rate, momentum=momentum or None, nesterov=momentum > 0),
        ),
        "adamw": optax.adamw(rate, weight_decay=decay, mask=_weights),
        "lars": optax.lars(rate, decay, _weights, trust_ratio_mask=_weights, momentum=momentum),
        # optax.lamb has a trust ratio for scales and biases too: a bias that starts at 0 would stay near it.
        "lamb": optax.chain(
            optax.scale_by_adam(eps=1e-6),
            optax.add_decayed_weights(decay, mask=_weights),
            optax.masked(optax.scale_by_trust_ratio(), _weights),
            optax.scale_by_learning_rate(rate),
        ),
    }[config.name]
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if learning is None:
        return optimizer
    return optax.partition(
        {"learning": optimizer, "frozen": optax.set_to_zero()},
        lambda params: jax.tree.map(lambda learns: "learning" if learns else "frozen", learning(params)),
    )


def _weights(params):
    """Mark the parameters that decay: all but scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)
