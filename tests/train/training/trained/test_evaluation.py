"""Evaluation, and the losses and metrics that it reports."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.helpers.jobs import fit, results
from train.config import Model
from train.data import Labels, Preprocessing, Split
from train.errors import UserError
from train.models import Variables
from train.runs import directory, processes
from train.runs.log import read_inspections
from train.training import inspection, losses, prepare
from train.training.losses import LOSSES, CrossEntropy
from train.training.trained import evaluation, serving
from train.training.trained.evaluation import TrainedNetwork, load_best

RNG = np.random.RandomState(0)
INPUTS = RNG.randint(0, 256, (100, 5)).astype(np.uint8)
LABELS = RNG.randint(0, 3, 100).astype(np.int32)
ROWS = np.sort(RNG.permutation(100)[:61])
WEIGHTS = RNG.randn(5, 3).astype(np.float32)
LOGITS, CLASSES = RNG.randn(6, 4), np.array([0, 3, 1, 1, 2, 0])


@dataclass(frozen=True)
class Linear:
    """A network that is one linear map."""

    def apply(self, variables, inputs, *, train, domain):
        assert not train
        return inputs @ variables.params, variables.batch_stats


def linear(devices=1):
    mesh = processes.mesh_of(jax.devices()[:devices])
    preprocessing = Preprocessing(np.float32(128), np.float32(64))
    arrays = processes.replicate(mesh, (Variables(WEIGHTS, {}), preprocessing))
    return TrainedNetwork(Linear(), CrossEntropy(), mesh, *arrays)


def test_each_example_counts_once_for_any_batch_size_and_number_of_devices(monkeypatch):
    logits = (np.float64(INPUTS) - 128) / 64 @ np.float64(WEIGHTS)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = {
        "loss": -log_probabilities[np.arange(100), LABELS][ROWS].mean(),
        "accuracy": (logits.argmax(-1) == LABELS)[ROWS].mean(),
    }
    for batch, devices in ((7, 1), (61, 1), (7, 4), (512, 1)):
        monkeypatch.setattr(evaluation, "EVAL_BATCH", batch)
        found = linear(devices).evaluate(Split(INPUTS, LABELS, ROWS))
        assert found == pytest.approx(expected, rel=1e-6), (batch, devices)
        assert found["accuracy"] == expected["accuracy"]


def test_number_of_devices_does_not_change_the_last_bit():
    # More examples than a device takes at a time.
    split = Split(np.tile(INPUTS, (20, 1)), np.tile(LABELS, 20), np.arange(1999))
    results = [linear(devices).evaluate(split) for devices in (1, 2, 8)]
    assert results[1:] == results[:1] * 2


@dataclass(frozen=True)
class Domains(Linear):
    """A network that adds a number of its own to an output of each domain."""

    def apply(self, variables, inputs, *, train, domain):
        logits, stats = super().apply(variables, inputs.reshape(len(inputs), -1), train=train, domain=domain)
        return logits.at[:, 0].add(domain.astype(jnp.float32)), stats


@pytest.mark.slow
def test_each_example_counts_once_in_every_rendering_on_any_number_of_devices(monkeypatch):
    monkeypatch.setattr(evaluation, "EVAL_BATCH", 7)
    split = Split(INPUTS[:, None, :, None], LABELS, ROWS)
    names = ("original", "inverted", "noise")
    found = [linear(n)._replace(network=Domains()).evaluate(split, names) for n in (1, 4)]
    assert found[0] == found[1]
    expected = []
    for domain, inputs in enumerate((INPUTS, 255 - INPUTS)):
        logits = (np.float64(inputs) - 128) / 64 @ np.float64(WEIGHTS) + domain * np.eye(3)[0]
        expected.append((logits.argmax(-1) == LABELS)[ROWS].mean())
    of_each = found[0]["rendering_accuracy"]
    assert tuple(of_each) == names and list(of_each.values())[:2] == expected
    assert found[0]["accuracy"] == pytest.approx(np.mean(list(of_each.values())))
    one = linear()._replace(network=Domains()).evaluate(split, names[:1])
    assert one.keys() == {"loss", "accuracy"} and one["accuracy"] == expected[0]


def test_best_checkpoint_evaluates_to_what_the_live_network_did(finished):
    config, summary, _ = finished
    assert serving.evaluate(Path(config.run_dir)) == {
        "split": "test",
        "step": summary.best_step,
        "loss": summary.test_loss,
        "accuracy": summary.test_accuracy,
        "examples": 360,
    }


def test_run_without_a_checkpoint_cannot_be_evaluated(make_config):
    config = make_config()
    path = Path(config.run_dir)
    with directory.created_and_locked(path):
        directory.begin(config, prepare(config).data)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_best(path)


def test_cross_entropy_is_that_of_the_softmax_with_smoothed_labels():
    loss = losses.of(Model(), Labels())
    assert loss == CrossEntropy() and hash(loss) == hash(CrossEntropy())
    log_probabilities = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    logits = jnp.float32(LOGITS)
    for smoothing in (0.0, 0.3):
        targets = (1 - smoothing) * np.eye(4)[CLASSES] + smoothing / 4
        found = jax.jit(loss.per_example, static_argnums=2)(logits, CLASSES, smoothing)
        assert_allclose(found, -(targets * log_probabilities).sum(-1), rtol=1e-5)
    assert_allclose(jax.jit(loss.outputs)(logits), np.exp(log_probabilities), rtol=1e-5)
    sums = jax.jit(lambda *given: losses.add_up(loss.scores(*given)))(logits, CLASSES)
    assert sums["correct"].dtype == sums["examples"].dtype == np.int32
    assert loss.metrics(sums) == {
        "loss": pytest.approx(-log_probabilities[np.arange(6), CLASSES].mean(), rel=1e-5),
        "accuracy": (LOGITS.argmax(-1) == CLASSES).mean(),
    }


@pytest.mark.slow
def test_further_loss_in_the_table_needs_no_other_change(make_config, monkeypatch, capsys):
    """The distance of a number from the label, for a network whose first output is that number."""

    @dataclass(frozen=True)
    class Distance(CrossEntropy):
        ranked_by = None

        def per_example(self, logits, labels, label_smoothing=0.0):
            return jnp.abs(logits[:, 0] - labels)

        def scores(self, logits, labels):
            distance = self.per_example(logits, labels)
            return {"loss": distance, "near": distance < 0.5}

        def metrics(self, sums):
            return {name: float(sums[name]) / int(sums["examples"]) for name in ("loss", "near")}

    monkeypatch.setitem(LOSSES, "cross_entropy", Distance)

    def measure(*given):  # no more of it than depends on the loss
        return {}, jax.jit(inspection._gap, static_argnums=0)(*given[:4])

    monkeypatch.setattr(inspection, "_measure", measure)
    # Of a size that no other test has compiled for another loss.
    config = make_config(model={"widths": (3,)}, inspect=True)
    summary = fit(config)
    lines = results(config.run_dir)
    assert len(lines) == 9 and all(
        set(line) == {"step", "split", "loss", "near", "seconds"} for line in lines
    )
    validation = {line["step"]: line["loss"] for line in lines if line["split"] == "validation"}
    assert summary.best_step == min(validation, key=validation.get)
    assert summary.test_accuracy is summary.best_test_accuracy is None and summary.test_loss is not None
    assert lines[-1]["loss"] < lines[2]["loss"]
    assert capsys.readouterr().out.splitlines()[4].split() == [
        "step",
        "epoch",
        *["loss", "near"] * 3,
        "seconds",
    ]
    evaluated = serving.evaluate(Path(config.run_dir))
    assert evaluated["loss"] == summary.test_loss and 0 <= evaluated["near"] <= 1
    (first, *_) = read_inspections(Path(config.run_dir))
    assert set(first["running_statistics"]) == {"loss", "near"}
