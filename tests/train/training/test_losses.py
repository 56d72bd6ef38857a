"""Losses and metrics, beside the same in NumPy float64, and what they make of a job."""

import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.helpers.jobs import fit
from train import data
from train.config import OF_NUMBERS, LossName, Model, flatten
from train.data import Dataset, Labels, Preprocessing, Split
from train.runs.log import read_inspections
from train.runs.summary import read_metrics
from train.training import inspection, losses, steps
from train.training.losses import LOSSES, CrossEntropy, SquaredError
from train.training.trained import serving
from train.training.trained.evaluation import load_best

RNG = np.random.RandomState(0)
LOGITS, CLASSES = RNG.randn(9, 3), np.array([0, 1, 1, 0, 1, 1, 1, 0, 1], np.int32)
UNEVEN = Labels(counts=(6, 2, 0, 1), names=("cat", "dog", "newt", "owl"))
PREPROCESSING = Preprocessing(np.asarray(0, np.float32), np.asarray(1, np.float32))


def measured(loss, logits, labels):
    """Return the metrics of sums on the devices, which those of float64 on the host must agree with."""
    scores = jax.jit(loss.scores)(jnp.float32(logits), labels)
    on_host = {name: np.asarray(values).sum(0, dtype=np.float64) for name, values in scores.items()}
    found, expected = (
        loss.metrics(sums) for sums in (losses.add_up(scores), on_host | {"examples": len(labels)})
    )
    flat, expected = (
        {key: -1 if value is None else value for key, value in flatten(metrics).items()}
        for metrics in (found, expected)
    )
    assert flat == pytest.approx(expected, rel=1e-5)
    return found


def test_the_schema_and_the_table_of_losses_have_the_same_names():
    assert set(LOSSES) == set(get_args(LossName)) > set(OF_NUMBERS)


def test_every_loss_reports_what_it_minimizes_and_the_metrics_that_it_is_known_by():
    for name in LOSSES:
        numbers = name in OF_NUMBERS
        described = Labels(mean=2.0, std=3.0) if numbers else Labels(counts=(3, 6, 9), names=tuple("abc"))
        loss = losses.of(Model(loss=name, class_weights=() if numbers else "balanced"), described)
        logits = np.float32(LOGITS[:, :1] if numbers else LOGITS)
        labels = np.float32(5 * RNG.randn(9)) if numbers else CLASSES
        metrics = measured(loss, logits, labels)
        minimized = np.asarray(jax.jit(loss.per_example)(logits, labels))
        assert minimized.shape == (9,)
        assert metrics["loss"] == pytest.approx(minimized.mean(), rel=1e-5), name
        assert metrics[loss.headline] <= 1 and set(losses.ranking(loss, metrics)) <= set(metrics)


def test_class_weights_have_mean_1_over_the_training_examples():
    for given, expected in (
        ("balanced", [9 / (3 * 6), 9 / (3 * 2), 0, 9 / 3]),  # of the three that occur
        ((1, 1, 1, 1), [1, 1, 1, 1]),
        ((3, 0, 5, 9), np.array([3, 0, 5, 9]) / ((6 * 3 + 9) / 9)),
    ):
        weights = losses.of(Model(class_weights=given), UNEVEN).weights
        assert_allclose(weights, expected)
        assert np.dot(weights, UNEVEN.counts) == pytest.approx(9)


def test_class_weights_that_do_not_fit_are_refused_with_the_names_of_the_classes(refusal):
    of = lambda *weights, labels=UNEVEN: refusal(losses.of, Model(class_weights=weights), labels)
    assert of(1.0, 2.0) == (
        "model.class_weights: expected 4, for the classes cat, dog, newt, owl, or 'balanced', got [1.0, 2.0]."
    )
    many = of(1.0, labels=Labels(counts=(1,) * 1000))
    assert (
        "expected 1000, for the classes 0, 1, 2, " in many
        and ", 19, and 980 more, or 'balanced', got" in many
    )
    assert "expected one > 0 for a class that has training examples, got [0" in of(0.0, 0.0, 1.0, 0.0)


@pytest.mark.slow
def test_weighted_loss_is_reported_without_smoothing_and_accuracies_without_weights():
    weights, names = (0.5, 2.0, 0.0), ("a", "b", "c")
    loss = CrossEntropy(weights, names)
    log_probabilities = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    of_example = np.array(weights)[CLASSES]
    for smoothing in (0.0, 0.3):
        targets = (1 - smoothing) * np.eye(3)[CLASSES] + smoothing / 3
        found = loss.per_example(jnp.float32(LOGITS), CLASSES, smoothing)
        assert_allclose(found, -of_example * (targets * log_probabilities).sum(-1), rtol=1e-5)
    correct = LOGITS.argmax(-1) == CLASSES
    a, b = correct[CLASSES == 0].mean(), correct[CLASSES == 1].mean()
    assert a != b
    metrics = measured(loss, LOGITS, CLASSES)
    assert metrics.pop("class_accuracy") == {"a": a, "b": b, "c": None}
    assert metrics == pytest.approx(
        {
            "loss": -(of_example * log_probabilities[np.arange(9), CLASSES]).mean(),
            "accuracy": correct.mean(),
            "balanced_accuracy": (a + b) / 2,
        }
    )


@pytest.mark.slow
def test_classes_are_reported_where_one_has_more_than_twice_the_examples_of_another():
    for counts, weights, by_class in (
        ((5, 10, 0), (), False),
        ((5, 11, 0), (), True),
        ((5, 5, 5), "balanced", True),
        ((), (), False),
    ):
        loss = losses.of(Model(class_weights=weights), Labels(counts))
        assert loss.names == tuple(map(str, range(3))) * by_class, counts
        scores = loss.scores(jnp.float32(LOGITS), CLASSES)
        assert ("class_accuracy" in measured(loss, LOGITS, CLASSES)) == by_class == (len(scores) == 4)


def test_squared_error_is_in_standard_deviations_and_its_metrics_are_in_the_unit_of_the_labels():
    mean, std = 1e6, 250.0
    labels = np.float32(mean + std * (RNG.randn(1000) + 3))  # a split that is not like the training labels
    z = (np.float64(labels) - mean) / std
    outputs = z + 0.3 * RNG.randn(1000)
    loss = losses.of(Model(loss="squared_error"), Labels(mean=mean, std=std))
    error = outputs - z
    assert_allclose(loss.per_example(jnp.float32(outputs)[:, None], labels), error**2, atol=1e-5)
    assert measured(loss, outputs[:, None], labels) == pytest.approx(
        {
            "loss": (error**2).mean(),
            "mean_absolute_error": np.abs(std * error).mean(),
            "r2": 1 - (error**2).sum() / ((z - z.mean()) ** 2).sum(),
        },
        rel=1e-4,
    )
    predictions = loss.outputs(jnp.float32(outputs)[:, None])
    assert_allclose(predictions, mean + std * outputs, rtol=1e-6)
    # What the training mean would get.
    training = np.float32(mean + std * (labels - labels.mean()) / labels.std())
    at_mean = measured(loss, np.zeros((1000, 1)), training)
    assert at_mean["loss"] == pytest.approx(1, rel=1e-3) and at_mean["r2"] == pytest.approx(0, abs=1e-3)


def test_labels_that_are_all_the_same_have_no_r2_and_a_deviation_of_0_counts_as_1():
    for mean, value in ((5.0, 5.0), (0.1, 0.3), (-7.0, 1e4)):
        loss = losses.of(Model(loss="squared_error"), Labels(mean=mean, std=0.0))
        metrics = measured(loss, np.ones((1000, 1)), np.full(1000, value, np.float32))
        assert metrics["r2"] is None
        assert metrics["mean_absolute_error"] == pytest.approx(abs(1 - (value - mean)), rel=1e-4)


def test_checkpoints_are_ranked_by_what_is_balanced_where_weights_ask_for_it_and_numbers_by_the_loss():
    metrics = {"loss": 0.5, "accuracy": 0.9, "balanced_accuracy": 0.6, "r2": 0.1}
    for loss, expected in (
        (CrossEntropy(), {"loss": 0.5, "accuracy": 0.9}),
        (CrossEntropy(names=("a",)), {"loss": 0.5, "accuracy": 0.9}),
        (CrossEntropy((1.0,), ("a",)), {"loss": 0.5, "balanced_accuracy": 0.6}),
        (SquaredError(0.0, 1.0), {"loss": 0.5}),
    ):
        assert losses.ranking(loss, metrics) == expected


# Jobs on data that are made here


@pytest.fixture
def trained(monkeypatch, make_config):
    """Returns a function that trains a job on 600 vectors with such labels; that returns what is left of it.

    Each split is a third of them. Of what is measured inside it has no more than depends on the loss.
    """

    def trained(labels, description, **model):
        splits = [Split(INPUTS, labels, np.arange(start, start + 200)) for start in (0, 200, 400)]
        made = Dataset(*splits, description, PREPROCESSING, "made")
        monkeypatch.setattr(data, "load", lambda *_, **__: made)
        monkeypatch.setattr(data, "load_test", lambda *_, **__: ("test", splits[2], "made"))
        gap = jax.jit(inspection._gap, static_argnums=0)
        monkeypatch.setattr(inspection, "_measure", lambda *given: ({}, gap(*given[:4])))
        config = make_config(
            data=GIVEN, model={"widths": (3,), **model}, steps=40, eval_every=10, batch_size=50, inspect=True
        )
        summary = fit(config)
        return Path(config.run_dir), read_metrics(Path(config.run_dir)), summary

    return trained


INPUTS = np.float32(RNG.randn(600, 4))
GIVEN = {"name": "npz", "path": "given.npz"}


@pytest.mark.slow
def test_job_of_numbers_learns_them_in_any_unit_and_its_best_step_is_that_of_the_lowest_loss(trained, capsys):
    labels = np.float32(1e4 + 1e3 * (INPUTS @ [1, -1, 0.5, 0]))
    description = Labels(mean=float(labels[:200].mean()), std=float(labels[:200].std()))
    run_dir, lines, summary = trained(labels, description, loss="squared_error")
    assert {tuple(line)[2:-1] for line in lines} == {("loss", "mean_absolute_error", "r2")}
    of = lambda split: {line["step"]: line for line in lines if line["split"] == split}
    validation, test = of("validation"), of("test")
    assert summary.best_step == min(validation, key=lambda step: validation[step]["loss"])
    best = test[summary.best_step]
    assert summary.test == {key: best[key] for key in ("loss", "mean_absolute_error", "r2")}
    assert summary.best_test_r2 == max(line["r2"] for line in test.values()) > 0.5
    assert summary.test_accuracy is summary.best_test_accuracy is None and summary.test_loss == best["loss"]

    evaluated = serving.evaluate(run_dir)
    assert evaluated == {"split": "test", "step": summary.best_step, **summary.test, "examples": 200}
    json.dumps(evaluated, allow_nan=False)
    network, loss, _, variables, preprocessing = load_best(run_dir).trained
    predictions = steps.predict(network, loss, variables, preprocessing, INPUTS[400:])
    assert predictions.shape == (200,)
    error = np.float64(predictions) - labels[400:]
    assert np.abs(error).mean() == pytest.approx(best["mean_absolute_error"], rel=1e-4)
    assert 1 - (error**2).mean() / labels[400:].var() == pytest.approx(best["r2"], abs=1e-4)

    assert capsys.readouterr().out.splitlines()[5].split() == ["absolute"] * 3
    gap = read_inspections(run_dir)[-1]
    assert set(gap["running_statistics"]) == {"loss", "mean_absolute_error", "r2"}
    assert summary.reached == (
        f"test R^2 {best['r2']:.4f}, mean absolute error {best['mean_absolute_error']:.4g} at step "
        f"{summary.best_step}, the best by validation"
    )


@pytest.mark.slow
def test_job_of_weighted_classes_reports_each_and_its_best_step_is_that_of_the_balanced_accuracy(trained):
    labels = (INPUTS[:, 0] > 1.2).astype(np.int32) + 2 * (INPUTS[:, 1] > 1.5)
    counts = tuple(np.bincount(labels[:200], minlength=5).tolist())
    description = Labels(counts, ("a", "b", "c", "d", "none"))
    run_dir, lines, summary = trained(labels, description, class_weights="balanced")
    expected = ("loss", "accuracy", "balanced_accuracy", "class_accuracy")
    assert {tuple(line)[2:-1] for line in lines} == {expected}
    key = lambda line: (line["balanced_accuracy"], -line["loss"])
    validation = {line["step"]: key(line) for line in lines if line["split"] == "validation"}
    assert summary.best_step == max(validation, key=validation.get)
    assert set(summary.test) == set(expected) and summary.test["class_accuracy"]["none"] is None
    assert summary.test_accuracy == summary.test["accuracy"] != summary.test["balanced_accuracy"]
    evaluated = serving.evaluate(run_dir)
    assert evaluated == {"split": "test", "step": summary.best_step, **summary.test, "examples": 200}
    gap = read_inspections(run_dir)[-1]["running_statistics"]
    assert set(gap) == set(expected) and set(gap["class_accuracy"]) == set("abcd") | {"none"}
    assert "balanced accuracy 0." in summary.reached and ", none -) at step" in summary.reached
