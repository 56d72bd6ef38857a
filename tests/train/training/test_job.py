import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.helpers.jobs import fit
from train.data.formats.arrays import digits
from train.errors import UserError
from train.training import prepare
from train.training.trained.evaluation import TrainedNetwork


def test_job_has_its_data_its_steps_and_its_devices(make_config):
    job = prepare(make_config(steps=None, epochs=2.5))
    assert job.steps_per_epoch == 1293 // 128 and job.step_config.total_steps == 25
    assert job.step_config.mesh.size == 1 and int(job.initial.step) == 0
    assert job.on_device and job.loop
    assert_array_equal(job.inputs.examples.labels, job.data.train.take(slice(None)).labels)
    streamed = prepare(make_config(data={"device_gib": 0.0}))
    assert not streamed.on_device and not streamed.loop and streamed.inputs.examples is None


def test_initial_weights_follow_from_the_seed(make_config):
    kernels = [
        np.asarray(prepare(make_config(seed=seed)).initial.variables.params["Dense_0"]["kernel"])
        for seed in (3, 3, 4)
    ]
    assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).all()


@pytest.mark.slow
def test_job_starts_from_the_best_parameters_and_statistics_of_another(make_config, finished):
    first, best, _ = finished
    job = prepare(make_config(init_from=first.run_dir, seed=7))
    config = job.step_config
    assert int(job.initial.step) == 0 and job.initial.average is None
    preprocessing = job.inputs.preprocessing
    network = TrainedNetwork(config.network, config.loss, config.mesh, job.initial.variables, preprocessing)
    values = network.evaluate(job.data.test)
    assert (values["accuracy"], values["loss"]) == (best.test_accuracy, best.test_loss)
    averaged = prepare(make_config(init_from=first.run_dir, optimizer={"average": 0.9}))
    jax.tree.map(assert_array_equal, averaged.initial.average, job.initial.variables)


@pytest.mark.slow
def test_start_from_another_network_or_from_no_run_is_refused(make_config, finished):
    run_dir = finished[0].run_dir
    for change, message in (
        ({"init_from": "/no/such/run"}, "expected a run directory, or a .safetensors .* got '/no/such/run'"),
        (
            {"model": {"norm": "none", "widths": (16,)}},
            "holds the parameters of another network: BatchNorm_0/bias is .16,. there and missing here; .*"
            "Dense_0/bias is missing there and .16,. here",
        ),
        ({"model": {"widths": (8,)}}, "Dense_0/kernel is .64, 16. there and .64, 8. here"),
        ({"model": {"widths": (16, 16)}}, "Dense_1/kernel is .16, 10. there and .16, 16. here"),
    ):
        with pytest.raises(UserError, match=f"^init_from: .*{message}"):
            prepare(make_config(**{"init_from": run_dir} | change))


@pytest.mark.slow
def test_head_for_other_classes_starts_anew_and_is_said_once(make_config, finished, tmp_path, capsys):
    arrays = {
        key: value if key.startswith("x") else value % 3 for key, value in digits(Path()).arrays.items()
    }
    np.savez(tmp_path / "three.npz", **arrays)
    source = tmp_path / "source"
    shutil.copytree(finished[0].run_dir, source)
    there = prepare(make_config(init_from=str(source))).initial.variables.params
    config = make_config(
        data={"name": "npz", "path": str(tmp_path / "three.npz")}, init_from=str(source), seed=7
    )
    anew, job = prepare(dataclasses.replace(config, init_from=None)).initial.variables.params, prepare(config)
    params = job.initial.variables.params
    assert_array_equal(params["Dense_0"]["kernel"], there["Dense_0"]["kernel"])
    assert_array_equal(params["Dense_1"]["kernel"], anew["Dense_1"]["kernel"])
    assert params["Dense_1"]["kernel"].shape == (16, 3)

    note = "the head starts anew: 10 classes there, 3 here"
    assert fit(config, stop_after=1).status == "stopped"
    assert note in capsys.readouterr().out.splitlines()
    # What the job started from is in its checkpoint, and may be gone.
    shutil.rmtree(source)
    assert fit(config).status == "finished"
    assert note not in capsys.readouterr().out
    with pytest.raises(UserError, match="which does not exist"):
        fit(dataclasses.replace(config, run_dir=f"{config.run_dir}2"))
    assert not Path(f"{config.run_dir}2").exists()


def test_head_of_as_many_classes_with_other_names_is_kept_and_said(make_config, finished, tmp_path):
    source, names = Path(finished[0].run_dir), [*"01234567", "nine", "eight"]
    there = prepare(make_config(init_from=str(source)))
    assert there.notes == ()
    named = tmp_path / "named"
    shutil.copytree(source, named)
    described = json.loads((named / "data.json").read_text())
    described["labels"]["names"] = names
    (named / "data.json").write_text(json.dumps(described))
    job = prepare(make_config(init_from=str(named)))
    assert job.notes == (
        "warning: the head is of other classes: nine there is 8 here; eight there is 9 here",
    )
    jax.tree.map(assert_array_equal, job.initial.variables, there.initial.variables)


def test_augmentation_that_the_data_cannot_bear_is_refused(make_config):
    with pytest.raises(UserError, match="data.crop: expected less than 8 for images"):
        prepare(make_config(data={"crop": 8}))


def test_batch_larger_than_the_data_is_refused(make_config):
    with pytest.raises(UserError, match="batch_size: expected at most the 1293 training examples, got 5000"):
        prepare(make_config(batch_size=5000))
    assert not Path(make_config().run_dir).exists()
