"""Losses, each with the metrics that are reported next to it, in one table."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.config import Model
from train.data import Labels

Sums = dict[str, Any]  # () each: the sum of every score over some examples, and how many examples these are


class Loss(NamedTuple):
    """What a network is trained for, and how its outputs are scored and shown."""

    per_example: Callable[..., jax.Array]  # (logits, labels, label_smoothing) -> (n,), minimized in the mean
    scores: Callable[..., dict[str, jax.Array]]  # (logits, labels) -> (n,) each; "loss" is one of them
    metrics: Callable[[Sums], dict[str, float]]  # sums of scores -> what is logged, "loss" among it
    outputs: Callable[[jax.Array], jax.Array]  # logits -> predictions


def _cross_entropy(logits, labels, label_smoothing=0.0):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not label_smoothing:
        return loss
    # The cross-entropy with the uniform distribution over all classes.
    uniform = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
    return (1 - label_smoothing) * loss + label_smoothing * uniform


LOSSES = {
    "cross_entropy": Loss(
        per_example=_cross_entropy,
        scores=lambda logits, labels: {
            "loss": _cross_entropy(logits, labels),
            "correct": logits.argmax(-1) == labels,
        },
        metrics=lambda sums: {
            "loss": float(sums["loss"]) / int(sums["examples"]),
            "accuracy": int(sums["correct"]) / int(sums["examples"]),
        },
        outputs=jax.nn.softmax,
    )
}


def of(model: Model, labels: Labels) -> Loss:
    """Return the loss that a network is trained for; there is one so far, whatever the network."""
    return LOSSES["cross_entropy"]


def add_up(scores: dict[str, jax.Array]) -> Sums:
    """Add up the scores of a batch, Booleans as int32."""
    sums = {
        name: jnp.sum(values, dtype=jnp.int32 if values.dtype == bool else values.dtype)
        for name, values in scores.items()
    }
    return sums | {"examples": jnp.int32(scores["loss"].size)}
