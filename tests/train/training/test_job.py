from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from train.errors import UserError
from train.training import prepare
from train.training.evaluation import TrainedNetwork


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


def test_start_from_another_network_or_from_no_run_is_refused(make_config, finished):
    run_dir = finished[0].run_dir
    for change, message in (
        ({"init_from": "/no/such/run"}, "init_from: expected a run directory, got '/no/such/run'"),
        ({"model": {"norm": "none", "widths": (16,)}}, "holds the parameters of another network"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(make_config(**{"init_from": run_dir} | change))


def test_augmentation_that_the_data_cannot_bear_is_refused(make_config):
    with pytest.raises(UserError, match="data.crop: expected less than 8 for images"):
        prepare(make_config(data={"crop": 8}))


def test_batch_larger_than_the_data_is_refused(make_config):
    with pytest.raises(UserError, match="batch_size: expected at most the 1293 training examples, got 5000"):
        prepare(make_config(batch_size=5000))
    assert not Path(make_config().run_dir).exists()
