"""Losses, each with the metrics that are reported next to it, in one table."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.config import LossName, Model
from train.data import Labels
from train.errors import UserError, shortened

Sums = dict[str, Any]  # the sum of every score over some examples, () or (classes,), and how many these are
Metrics = dict[str, Any]  # numbers; None where there is none; of "class_accuracy" a dict of them

UNEVEN = 2  # times as many examples of one class as of another: then accuracy alone hides the rare ones


class Loss(Protocol):
    """What a network is trained for, and how its outputs are scored and shown. Equal by value."""

    headline: ClassVar[str]  # the metric that says how good a network is, at most 1

    @property
    def ranked_by(self) -> str | None:
        """The metric that chooses the best checkpoint; None where the loss alone does."""
        ...

    @classmethod
    def of(cls, model: Model, labels: Labels) -> Self:
        """Return the loss of a job."""
        ...

    def per_example(self, logits: Any, labels: Any, label_smoothing: float = 0.0) -> jax.Array:
        """Return what is minimized in the mean, (n,)."""
        ...

    def scores(self, logits: Any, labels: Any) -> dict[str, jax.Array]:
        """Return the scores of each example, (n,) or (n, classes); "loss" is one of them."""
        ...

    def metrics(self, sums: Sums) -> Metrics:
        """Return what is logged, "loss" among it, from sums of scores."""
        ...

    def outputs(self, logits: Any) -> jax.Array:
        """Return predictions."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy of classes, of an example times the weight of its class where there are weights.

    The loss that is reported has the weights too, and no label smoothing; accuracies have neither.
    """

    weights: tuple[float, ...] = ()  # of the classes, 1 in the mean over the training examples
    names: tuple[str, ...] = ()  # of the classes, where each one's accuracy is reported

    headline: ClassVar = "accuracy"

    @property
    def ranked_by(self) -> str:
        """Balanced accuracy where the weights ask for it."""
        return "balanced_accuracy" if self.weights else "accuracy"

    @classmethod
    def of(cls, model: Model, labels: Labels) -> Self:
        """Return the loss of a job, with a report by class where classes are weighted or uneven.

        Raises:
          UserError: model.class_weights do not fit the classes.
        """
        occurring = [count for count in labels.counts if count]
        uneven = bool(occurring) and max(occurring) > UNEVEN * min(occurring)
        by_class = uneven or bool(model.class_weights)
        names = tuple(map(labels.name, range(len(labels.counts)))) if by_class else ()
        return cls(_weights(model.class_weights, labels, names), names)

    def per_example(self, logits, labels, label_smoothing=0.0):
        """Return the cross-entropy with the smoothed labels."""
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if label_smoothing:
            # The cross-entropy with the uniform distribution over all classes.
            uniform = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
            loss = (1 - label_smoothing) * loss + label_smoothing * uniform
        return loss * jnp.asarray(self.weights, loss.dtype)[labels] if self.weights else loss

    def scores(self, logits, labels):
        """Return the loss and what was correct, by class where each one's accuracy is reported."""
        correct = logits.argmax(-1) == labels
        scores = {"loss": self.per_example(logits, labels), "correct": correct}
        if self.names:
            of_class = labels[:, None] == jnp.arange(len(self.names))
            scores |= {"class_examples": of_class, "class_correct": of_class & correct[:, None]}
        return scores

    def metrics(self, sums):
        """Return loss and accuracy, and of uneven classes the balanced one and that of each class."""
        examples = int(sums["examples"])
        metrics: Metrics = {
            "loss": float(sums["loss"]) / examples,
            "accuracy": int(sums["correct"]) / examples,
        }
        if self.names:
            pairs = zip(*(np.asarray(sums[f"class_{what}"]).tolist() for what in ("correct", "examples")))
            accuracies = [correct / of_class if of_class else None for correct, of_class in pairs]
            occurring = [accuracy for accuracy in accuracies if accuracy is not None]
            metrics["balanced_accuracy"] = sum(occurring) / len(occurring)
            metrics["class_accuracy"] = dict(zip(self.names, accuracies))
        return metrics

    def outputs(self, logits):
        """Return the probabilities of the classes, (n, classes)."""
        return jax.nn.softmax(logits)


@dataclass(frozen=True)
class SquaredError:
    """The squared error of numbers in standard deviations of the training labels, whatever their unit."""

    mean: float  # of the training labels
    std: float

    headline: ClassVar = "r2"

    @property
    def ranked_by(self) -> None:
        """Nothing but the loss, of which R^2 is a function."""

    @classmethod
    def of(cls, model: Model, labels: Labels) -> Self:
        """Return the loss of a job."""
        return cls(labels.mean, labels.std or 1.0)

    def per_example(self, logits, labels, label_smoothing=0.0):
        """Return the squared error in squared standard deviations."""
        return (logits[..., 0] - self._standardized(labels)) ** 2

    def scores(self, logits, labels):
        """Return the loss, the absolute error, and what the variance of the labels follows from."""
        labels = self._standardized(labels)
        error = logits[..., 0] - labels
        return {"loss": error**2, "error": jnp.abs(error), "label": labels, "label_squared": labels**2}

    def metrics(self, sums):
        """Return the loss, the mean absolute error in the unit of the labels, and R^2."""
        examples, loss, label = int(sums["examples"]), float(sums["loss"]), float(sums["label"])
        squares = float(sums["label_squared"])
        about_mean = squares - label**2 / examples
        # What is below is the rounding of float32, as of labels that are all the same.
        varies = about_mean > 8 * float(np.finfo(np.float32).eps) * squares
        return {
            "loss": loss / examples,
            "mean_absolute_error": self.std * float(sums["error"]) / examples,
            "r2": 1 - loss / about_mean if varies else None,
        }

    def outputs(self, logits):
        """Return the predictions in the unit of the labels, (n,)."""
        return self.mean + self.std * logits[..., 0]

    def _standardized(self, labels):
        return (labels - self.mean) / self.std


LOSSES: dict[LossName, type[Loss]] = {"cross_entropy": CrossEntropy, "squared_error": SquaredError}


def of(model: Model, labels: Labels) -> Loss:
    """Return the loss that a network is trained for.

    Raises:
      UserError: model.class_weights do not fit the classes.
    """
    return LOSSES[model.loss].of(model, labels)


def ranking(loss: Loss, metrics: Metrics) -> dict[str, float]:
    """Return those of the metrics that rank a checkpoint: the loss, and what goes before it."""
    return {name: metrics[name] for name in ("loss", loss.ranked_by) if name is not None}


def add_up(scores: dict[str, jax.Array]) -> Sums:
    """Add up the scores of a batch, Booleans as int32."""
    sums = {
        name: jnp.sum(values, 0, dtype=jnp.int32 if values.dtype == bool else values.dtype)
        for name, values in scores.items()
    }
    return sums | {"examples": jnp.int32(scores["loss"].size)}


def _weights(given: str | tuple[float, ...], labels: Labels, names: tuple[str, ...]) -> tuple[float, ...]:
    """Return the weights of classes, scaled to a mean of 1 over the training examples.

    With any other mean they would scale the gradient, and the learning rate with it.
    """
    counts = labels.counts
    if not given:
        return ()
    if isinstance(given, str):  # "balanced"
        given = tuple(1 / count if count else 0.0 for count in counts)
    classes = shortened(names, most=20)
    if len(given) != len(counts):
        raise UserError(
            f"model.class_weights: expected {len(counts)}, for the classes {classes}, or 'balanced', got "
            f"{list(given)}."
        )
    total = math.fsum(weight * count for weight, count in zip(given, counts))
    if not total:
        raise UserError(
            "model.class_weights: expected one > 0 for a class that has training examples, got "
            f"{list(given)} for the classes {classes}."
        )
    return tuple(weight * sum(counts) / total for weight in given)
