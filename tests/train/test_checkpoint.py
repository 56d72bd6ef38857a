import shutil

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_array_equal

from train import models, optim
from train import state as states
from train.checkpoint import Checkpoints
from train.config import Model, Optimizer, UserError

NAN = float("nan")


def state_at(step, **options):
    model = models.build(Model(widths=(4,), **options), (5,), classes=3)
    optimizer = optim.build(Optimizer(), steps=100)
    state = states.create(model, optimizer, step, jnp.zeros((1, 5)))
    return state._replace(step=jnp.asarray(step, jnp.int32))


def metrics(accuracy, loss=1.0):
    return {"accuracy": accuracy, "loss": loss}


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_restore_gives_back_every_bit(tmp_path, norm):
    # No leaf as it starts.
    state = jax.tree.map(lambda leaf: leaf + 1, state_at(6, norm=norm))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, metrics(0.5))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 7
        restored = checkpoints.restore(7, state_at(0, norm=norm))
        model = checkpoints.restore_model(7, state_at(0, norm=norm))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(assert_array_equal, restored, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [
        leaf.dtype for leaf in jax.tree.leaves(state)
    ]
    jax.tree.map(assert_array_equal, (model.params, model.batch_stats), (state.params, state.batch_stats))
    assert int(model.step) == 0


@pytest.mark.parametrize(
    "ranked, best, kept",
    [
        ([metrics(a) for a in (0.1, 0.9, 0.2, 0.3, 0.4)], 2, {2, 4, 5}),
        ([metrics(a) for a in (0.1, 0.2, 0.3, 0.4, 0.5)], 5, {4, 5}),
        ([metrics(0.9, NAN), metrics(0.5), metrics(0.9, NAN), metrics(NAN, NAN), metrics(0.1)], 2, {2, 4, 5}),
        ([metrics(0.5, 0.3), metrics(0.5, 0.2), metrics(0.5, 0.3), None, None], 2, {2, 4, 5}),
        ([None] * 5, 5, {4, 5}),
    ],
)
def test_newest_two_and_the_best_are_kept_whatever_the_metrics_do(tmp_path, ranked, best, kept):
    with Checkpoints(tmp_path) as checkpoints:
        for step, values in enumerate(ranked, start=1):
            checkpoints.save(state_at(step), values)
        assert (checkpoints.latest_step, checkpoints.best_step) == (5, best)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == kept


def test_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), metrics(0.5))
        checkpoints.save(state_at(3), None)
        assert checkpoints.best_step == 3
        with pytest.raises(RuntimeError, match="declined to save step 2 after step 3"):
            checkpoints.save(state_at(2), None)


@pytest.mark.parametrize("broken", ["model", "optimizer", "meta"])
def test_checkpoint_with_a_part_missing_is_named_and_the_one_before_still_there(tmp_path, broken):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 4):
            checkpoints.save(state_at(step), metrics(0.5))
    shutil.rmtree(tmp_path / "checkpoints" / "4" / broken)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="checkpoints/4' is no whole"):
        checkpoints.restore(4, state_at(0))
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(checkpoints.latest_step, state_at(0)).step) == 3


def test_empty_directory_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
