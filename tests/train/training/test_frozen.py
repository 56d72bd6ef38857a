"""Jobs in which some variables do not learn."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.helpers.jobs import final_state, fit
from tests.helpers.jobs import make_config as job_config
from train.config import Data, Model, Optimizer
from train.data import Examples, Labels, Preprocessing
from train.models import Variables
from train.runs import processes
from train.training import job, load_best, mistakes, steps
from train.training.state import StepConfig, StepInputs, TrainState

RNG = np.random.RandomState(0)
DATA = Examples(RNG.rand(8, 4, 4, 1).astype(np.float32), RNG.randint(0, 3, 8).astype(np.int32))
ROWS = np.arange(8)
INPUTS = StepInputs(DATA, Preprocessing(np.float32(0), np.float32(1)), np.uint32(0))


def make(*, optimizer=None, **model):
    """Return the config of a step on 8 examples and a state with variables of all values."""
    config = StepConfig(
        model=Model(**{"widths": (6, 4), "norm_groups": 2, "virtual_batch_size": 4} | model),
        optimizer=Optimizer(**{"average": 0.9, "weight_decay": 0.1, "clip_norm": 1.0} | (optimizer or {})),
        data=Data(),
        input_shape=(4, 4, 1),
        labels=Labels(counts=(1, 1, 1)),
        batch_size=8,
        total_steps=100,
        mesh=processes.mesh_of(jax.devices()[:1]),
    )
    shapes = jax.eval_shape(lambda: job.create(config, np.uint32(0)))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    drawn = jax.tree.map(lambda leaf: RNG.uniform(0.5, 1.5, leaf.shape).astype(np.float32), state.variables)
    state = state._replace(variables=drawn, average=drawn, nonfinite_step=np.int32(99))
    return config, state


def variants():
    yield make(frozen="norms", norm_inputs=True, optimizer={"name": "lamb"})
    yield make(frozen="norms", name="nnx_mlp", norm="layer", optimizer={"name": "adamw"})
    yield make(frozen="statistics", name="nnx_mlp", norm="flax", optimizer={"accumulate": 2})
    yield make(frozen="body", norm="ghost", dtype="bfloat16", optimizer={"accumulate": 4, "name": "lars"})


@pytest.mark.slow
def test_what_is_frozen_stays_bit_for_bit_and_all_else_moves():
    for config, state in variants():
        case = str(config.model)
        step = jax.jit(lambda state, config=config: steps.train_step(config, state, INPUTS, ROWS))
        after: TrainState = step(step(step(state)))
        expected = config.learning(state.variables)
        for found in (after.variables, after.average):
            moved = jax.tree.map(lambda a, b: bool((a != b).any()), found, state.variables)
            assert moved == expected, case
        frozen = [
            leaf for leaf, learns in zip(*map(jax.tree.leaves, (state.variables, expected))) if not learns
        ]
        assert len(frozen) > 3, case


@pytest.mark.slow
def test_frozen_network_computes_in_training_what_it_does_in_inference():
    for config, state in variants():
        run = lambda train, config=config, state=state: config.network.apply(
            state.variables, DATA.inputs, train=train
        )
        (trained, stats), (inferred, _) = jax.jit(lambda run=run: (run(True), run(False)))()
        assert_array_equal(trained, inferred)
        jax.tree.map(assert_array_equal, stats, state.variables.batch_stats)


@pytest.mark.slow
def test_nothing_is_computed_for_gradients_of_a_frozen_body():
    counts = {}
    for frozen in ("none", "body"):
        config, state = make(frozen=frozen, norm="none", optimizer={"accumulate": 2})
        step = jax.jit(lambda state, config=config: steps.train_step(config, state, INPUTS, ROWS))
        counts[frozen] = len(re.findall(r" dot\(", step.lower(state).compile().as_text()))
    # Three layers forward, the weights of each, and the inputs of all but the first; weights of the head.
    assert counts == {"none": 3 + 3 + 2, "body": 3 + 1}


@pytest.mark.slow
def test_fine_tuned_head_of_another_run_is_resumed_bit_for_bit(finished, make_config, tmp_path):
    options = {"init_from": finished[0].run_dir, "steps": 8, "eval_every": 6}
    options |= {"model": {"widths": (16,), "frozen": "body"}, "optimizer": {"average": 0.9}}
    whole, parts = (job_config(tmp_path / name, **options) for name in ("whole", "parts"))
    fit(whole)
    assert [fit(parts, stop_after=n).step for n in (2, None)] == [3, 8]
    jax.tree.map(assert_array_equal, final_state(parts), final_state(whole))
    start, end = (load_best(Path(path)).trained.variables for path in (finished[0].run_dir, whole.run_dir))
    head = {"Dense_1": None}
    body = lambda variables: Variables(variables.params | head, variables.batch_stats)
    jax.tree.map(assert_array_equal, body(start), body(end))
    assert (np.asarray(start.params["Dense_1"]["kernel"]) != end.params["Dense_1"]["kernel"]).all()


def test_what_looks_like_a_mistake_with_frozen_variables_and_recalibration_is_said(make_config):
    def said(init_from=None, recalibrate=False, **model):
        return list(
            mistakes.of_statistics(make_config(model=model, init_from=init_from, recalibrate=recalibrate))
        )

    assert said() == said(frozen="norms", norm="layer") == said(recalibrate=True) == []
    assert said("run", frozen="body") == said("run", frozen="statistics") == []
    (body,), (norms,) = said(frozen="body", norm="none"), said(frozen="norms")
    assert body.startswith("model.frozen = 'body' without init_from: all but the last layer stays")
    assert norms.startswith("model.frozen = 'norms' without init_from: running statistics stay at mean 0")
    assert said(norm="group", recalibrate=True) == [
        "recalibrate = true with model.norm = 'group', which has no running statistics."
    ]
    (replaced,) = said("run", frozen="statistics", recalibrate=True)
    assert replaced.startswith("recalibrate = true with model.frozen = 'statistics'")
