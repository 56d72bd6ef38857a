import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers.jobs import fit, results
from train import models
from train.config import Data, Model, Optimizer
from train.data import Labels
from train.models import Variables
from train.models.norms import of_batch
from train.runs import processes
from train.training import job
from train.training.state import ALL_FINITE, StepConfig, from_items, no_sums, to_items


def make(**changes):
    """Make a config from parts that no other one shares."""
    parts = {
        "model": Model(widths=(6,)),
        "optimizer": Optimizer(base_batch_size=32, momentum=0.0, warmup_steps=0),
        "data": Data(),
        "input_shape": (4, 4, 1),
        "labels": Labels((1, 1, 1)),
        "batch_size": 128,
        "total_steps": 100,
        "mesh": processes.mesh_of(jax.devices()[:1]),
    }
    return StepConfig(**parts | changes)


def test_configs_of_equal_jobs_are_equal_and_compile_nothing_twice():
    assert make() == make() and hash(make()) == hash(make())
    assert make().network == make().network and make().pooling_network != make().network
    for name, other in {
        "model": Model(widths=(7,)),
        "optimizer": Optimizer(),
        "data": Data(flip=True),
        "input_shape": (16,),
        "labels": Labels((1, 1, 1, 1)),
        "batch_size": 64,
        "total_steps": 99,
        "mesh": processes.mesh_of(jax.devices()[:2]),
    }.items():
        assert dataclasses.replace(make(), **{name: other}) != make(), name
    job.create(make(), np.uint32(0))
    compiled = job.create._cache_size()
    job.create(make(), np.uint32(1))
    assert job.create._cache_size() == compiled


def test_config_says_which_network_optimizer_and_rule_are_trained():
    config = make()
    options = config.model, (4, 4, 1), 3
    assert config.network == models.build(*options)
    assert config.pooling_network == models.build(*options, rule=of_batch)
    assert config.rule == jbn.ema(0.9, debias=True)
    assert make(model=Model(norm_momentum=0.5, norm_debias=False)).rule == jbn.ema(0.5)
    # Four times the batch that the rate is meant for; at the start, the middle and the end of the cosine.
    for step, rate in ((0, 0.4), (50, 0.2), (100, 0.0)):
        params = {"kernel": jnp.zeros(2)}
        state = config.transformation.init(params)
        state = jax.tree.map(lambda leaf, at=step: jnp.full_like(leaf, at) if leaf.ndim == 0 else leaf, state)
        updates, _ = config.transformation.update({"kernel": jnp.ones(2)}, state, params)
        assert_allclose(updates["kernel"], np.full(2, -rate), rtol=1e-5, atol=1e-7)


def test_create_starts_at_step_0_and_follows_from_the_seed():
    state, again, other = (job.create(make(), np.uint32(seed)) for seed in (0, 0, 1))
    assert int(state.step) == 0 and int(state.nonfinite_step) == ALL_FINITE
    assert state.average is None and state.evaluated is state.variables
    assert sorted(state.sums) == ["correct", "examples", "loss"] and not any(state.sums.values())
    jax.tree.map(assert_array_equal, state.sums, no_sums(make()))
    jax.tree.map(assert_array_equal, state, again)
    kernels = [s.variables.params["Dense_0"]["kernel"] for s in (state, other)]
    assert (kernels[0] != kernels[1]).all()


def test_checkpoint_items_hold_all_of_a_state_under_the_names_on_disk():
    plain = job.create(make(), np.uint32(0))
    averaged = plain._replace(average=jax.tree.map(lambda leaf: leaf + 1, plain.variables))
    for state in (plain, averaged):
        items = to_items(state)
        names = {item: sorted(values) for item, values in items.items()}
        optimizer = ["opt_state"] if state.average is None else ["opt_state", "variables"]
        assert names == {
            "model": ["batch_stats", "params"],
            "optimizer": optimizer,
            "meta": ["failed_at", "step", "sums"],
        }
        assert Variables(**items["model"]) == state.evaluated
        like = jax.tree.map(lambda leaf: leaf * 0, state)
        restored = from_items(items, like)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(assert_array_equal, restored, state)


@pytest.mark.slow
def test_run_of_the_program_before_it_was_regrouped_resumes(make_config):
    """Ten steps of a job, written at commit 0fcf294."""
    config = make_config(steps=20, eval_every=5, model={"widths": (4,)}, optimizer={"average": 0.9})
    archive = Path(__file__).parents[2] / "data" / "run_0fcf294.zip"
    shutil.unpack_archive(archive, config.run_dir)
    before = results(config.run_dir)
    summary = fit(config)
    assert (summary.status, summary.step) == ("finished", 20)
    lines = results(config.run_dir)
    assert lines[: len(before)] == before and lines[-1]["step"] == 20
    # The same as in one go with this program.
    whole = make_config(
        run_dir=Path(config.run_dir).parent / "whole",
        **{"steps": 20, "eval_every": 5, "model": {"widths": (4,)}, "optimizer": {"average": 0.9}},
    )
    fit(whole)
    for ours, theirs in zip(results(whole.run_dir), lines, strict=True):
        assert_allclose(ours["loss"], theirs["loss"], rtol=1e-3)
