"""Running statistics pooled anew over the training data, beside the same in NumPy float64."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.helpers.jobs import final_state, fit, results
from train import data, models
from train.__main__ import main
from train.config import Model
from train.data import Labels, Preprocessing, Split
from train.models import Variables
from train.runs import directory, processes
from train.runs.checkpoints import open_recalibrated
from train.training import load_best, loop, losses
from train.training.trained import recalibration, serving
from train.training.trained.evaluation import TrainedNetwork
from train.training.trained.recalibration import pool, recalibrate, recalibrate_best

RNG = np.random.RandomState(0)
INPUTS = RNG.randint(0, 256, (60, 4, 4, 1)).astype(np.uint8)
SPLIT = Split(INPUTS, np.zeros(60, np.int32), np.sort(RNG.permutation(60)[:43]))
ORDER = RNG.permutation(43).astype(np.int32)
X = (INPUTS[SPLIT.rows].reshape(43, 16) - 100.0) / 64


def trained(model, devices=1):
    """Return a network with variables of all values, and the same one in NumPy: (W, scale, bias) a layer."""
    network = models.build(model, (4, 4, 1), classes=3)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 4, 4, 1), np.float32))
    draw = np.random.RandomState(1)
    variables = jax.tree.map(lambda leaf: draw.uniform(-1, 1, leaf.shape).astype(np.float32), shapes)
    mesh = processes.mesh_of(jax.devices()[:devices])
    placed = processes.replicate(mesh, (variables, Preprocessing(np.float32(100), np.float32(64))))
    loss = losses.of(model, Labels(counts=(1, 1, 1)))
    return TrainedNetwork(network, loss, mesh, *placed), layers_of(model, variables.params)


def layers_of(model, params):
    if model.name == "mlp":
        pairs = [(params[f"Dense_{i}"], params[f"BatchNorm_{i}"]) for i in range(len(model.widths))]
    else:
        pairs = [(layer["linear"], layer["norm"]) for layer in params["hidden"].values()]
    return [(np.float64(linear["kernel"]), norm["scale"], norm["bias"]) for linear, norm in pairs]


def stats_of(model, variables):
    stats = variables.batch_stats
    if model.name == "mlp":
        return [stats[f"BatchNorm_{i}"] for i in range(len(model.widths))]
    return [layer["norm"] for layer in stats["hidden"].values()]


def inputs_of_norms(layers, batches, part):
    """Return what the norm of each layer gets in all batches, each normalized in parts by itself."""
    seen = [[] for _ in layers]
    for x in batches:
        for i, (kernel, scale, bias) in enumerate(layers):
            x = x @ kernel
            seen[i].append(x)
            parts = [x[at : at + part] for at in range(0, len(x), part)]
            x = np.concatenate([(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-5) for p in parts])
            x = np.maximum(x * scale + bias, 0)
    return [np.concatenate(each) for each in seen]


def pooled(model, network, *, batch_size=8):
    pooling = models.build_pooling(model, (4, 4, 1), 3)
    return pool(pooling, network, SPLIT, ORDER, batch_size)


@pytest.mark.slow
def test_statistics_are_the_moments_of_all_examples_each_in_a_batch_once():
    # The last batch has the 3 examples more that are left over, which 8 devices cannot share.
    ends = [8, 16, 24, 32, 43]
    batches = [X[ORDER[a:b]] for a, b in zip([0, *ends], ends)]
    for model, devices, part in (
        (Model(widths=(6,)), 1, 43),
        (Model(widths=(6, 5), frozen="statistics"), 8, 43),
        (Model(name="nnx_mlp", widths=(6, 5), norm="ghost", virtual_batch_size=4), 1, 4),
    ):
        network, layers = trained(model, devices)
        found = pooled(model, network)
        assert found.params is network.variables.params
        for stats, x in zip(stats_of(model, found), inputs_of_norms(layers, batches, part), strict=True):
            assert len(x) == 43
            assert_allclose(stats["mean"], x.mean(0), rtol=1e-4, atol=1e-5, err_msg=str(model))
            assert_allclose(stats["var"], x.var(0), rtol=1e-4, atol=1e-5, err_msg=str(model))
            # Complete: a debiased rule that goes on from them gives them their full weight.
            assert_array_equal(stats["count"], np.ones(x.shape[1]))
    # What the first layer gets depends on no batch.
    assert_allclose(inputs_of_norms(layers, batches, part)[0].mean(0), (X @ layers[0][0]).mean(0))


def test_feature_that_varies_beyond_float32_keeps_its_statistics():
    model = Model(widths=(6,))
    network, _ = trained(model)
    params, stats = network.variables
    kernel = np.asarray(params["Dense_0"]["kernel"]) * np.where(np.arange(6) == 2, np.float32(1e30), 1)
    variables = Variables(params | {"Dense_0": {"kernel": kernel}}, stats)
    found = pooled(model, network._replace(variables=variables)).batch_stats["BatchNorm_0"]
    expected = pooled(model, network).batch_stats["BatchNorm_0"]
    for name, value in found.items():
        assert value[2] == stats["BatchNorm_0"][name][2]
        assert_allclose(np.delete(value, 2), np.delete(expected[name], 2), rtol=1e-4, atol=1e-6)


def killed(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def unfinished(copied):
    """Return the config of a job that is to be recalibrated, as a kill after its last checkpoint left it."""
    config = dataclasses.replace(copied[0], recalibrate=True)
    path = Path(config.run_dir)
    (path / "summary.json").unlink()
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return config


@pytest.mark.slow
def test_job_that_was_killed_before_recalibration_does_it_when_started_again(
    unfinished, finished, monkeypatch, capsys
):
    config, path = unfinished, Path(unfinished.run_dir)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "recalibrate_best", killed)
        fit(config)
    assert fit(config, stop_after=1).status == "stopped" and not (path / "recalibrated").exists()
    summary = fit(config)
    assert summary.status == "finished" and summary.recalibrated is not None
    assert "recalibrating over 1,293 training examples" in capsys.readouterr().out
    # What training does, keeps and reports has not changed.
    jax.tree.map(assert_array_equal, final_state(config), final_state(finished[0]))
    assert results(path) == results(finished[0].run_dir)
    assert summary.test_loss == finished[1].test_loss

    best, before = load_best(path), load_best(path, recalibrated=False)
    assert best.step == before.step == summary.best_step
    jax.tree.map(assert_array_equal, best.trained.variables.params, before.trained.variables.params)
    dataset = data.load(config.data)
    x = dataset.train.take(slice(None)).inputs.reshape(1293, -1)
    x = x @ np.float64(best.trained.variables.params["Dense_0"]["kernel"])
    stats, running = (run.trained.variables.batch_stats["BatchNorm_0"] for run in (best, before))
    assert_allclose(stats["mean"], x.mean(0), rtol=1e-4, atol=1e-5)
    assert_allclose(stats["var"], x.var(0), rtol=1e-4)
    assert np.abs(running["mean"] - x.mean(0)).max() > 1e-3
    # What was reported is what every other command uses.
    assert serving.evaluate(path) == {
        "split": "test",
        "step": summary.best_step,
        **summary.recalibrated,
        "examples": 360,
    }
    assert summary.recalibrated["loss"] != summary.test_loss
    monkeypatch.setattr(loop, "recalibrate_best", killed)
    assert fit(config) == summary


@pytest.mark.slow
def test_longer_job_is_recalibrated_anew_and_until_then_has_what_belongs_to_its_best_step(unfinished):
    config, path = unfinished, Path(unfinished.run_dir)
    assert fit(config).best_step == 30
    longer = dataclasses.replace(config, steps=48, eval_every=12)
    stopped = fit(longer, stop_after=6)
    assert stopped.status == "stopped" and stopped.best_step > 30 and stopped.recalibrated is None
    with open_recalibrated(path, stopped.best_step) as none, open_recalibrated(path, 30) as some:
        assert none is None and some is not None
    assert load_best(path).step == stopped.best_step
    summary = fit(longer)
    assert summary.status == "finished"
    evaluated = serving.evaluate(path)
    assert (evaluated["loss"], evaluated["step"]) == (summary.recalibrated["loss"], summary.best_step)
    assert not [entry for entry in path.iterdir() if entry.name.startswith(".recalibrated")]


@pytest.mark.slow
def test_run_that_is_there_is_recalibrated_by_the_command_also_again(copied, monkeypatch, capsys, tmp_path):
    config, summary = copied
    path = Path(config.run_dir)
    orders, sizes = [], []

    def spy(network, trained, split, order, batch_size, *given):
        orders.append(order)
        sizes.append(batch_size)
        return pool(network, trained, split, order, batch_size, *given)

    monkeypatch.setattr(recalibration, "pool", spy)
    found = recalibrate(path)
    assert (found["split"], found["step"], found["examples"]) == ("test", summary.best_step, 360)
    assert found["before"] == {"loss": summary.test_loss, "accuracy": summary.test_accuracy}
    assert serving.evaluate(path)["loss"] == found["after"]["loss"] != found["before"]["loss"]
    assert fit(config) == dataclasses.replace(summary, recalibrated=found["after"])
    capsys.readouterr()
    assert main(["recalibrate", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == found
    job = tmp_path / "job.toml"
    job.write_text(f"run_dir = '{path}'\nsteps = 30\neval_every = 12\ndevices = 1\n[model]\nwidths = [16]\n")
    assert main([str(job), "--num-processes", "1"]) == 0
    accuracy = (
        f"the best by validation; after recalibration accuracy {found['after']['accuracy']:.4f}. Files: "
    )
    assert accuracy in capsys.readouterr().out
    # In parts where training normalizes parts of a batch.
    best = load_best(path, recalibrated=False)
    parts = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulate=4))
    assert recalibrate_best(path, best._replace(config=parts), data.load(config.data), lambda: True) is None
    assert sizes == [128, 128, 32] and all((order == data.order(0, 0, 1293)).all() for order in orders)
    assert serving.evaluate(path)["loss"] == found["after"]["loss"]


def test_what_cannot_be_recalibrated_is_refused_in_a_sentence(copied, refusal, tmp_path):
    config, _ = copied
    path = Path(config.run_dir)
    images, labels = np.zeros((200, 8, 8, 1), np.uint8), np.arange(200) % 10
    np.savez(tmp_path / "other.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    message = refusal(recalibrate, path, str(tmp_path / "other.npz"))
    assert message.startswith(f"run_dir = '{path}' was trained on other data (fingerprint")
    with directory.created_and_locked(path):
        assert "is in use by another process" in refusal(recalibrate, path)
    norm = dataclasses.replace(config, model=dataclasses.replace(config.model, norm="flax"))
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(norm)))
    assert refusal(recalibrate, path) == (
        f"'{path}': expected a run with model.norm = 'batch' or 'renorm' or 'ghost', whose running "
        "statistics can be pooled, got 'flax'."
    )
    assert "does not exist; expected a run directory" in refusal(recalibrate, tmp_path / "none")
    assert not (tmp_path / "none").exists() and not (path / "recalibrated").exists()
