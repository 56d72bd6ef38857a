import shutil

import jax
import pytest
from numpy.testing import assert_array_equal

from train.training import job
from train.runs.checkpoints import Checkpoints
from train.errors import RunFailed, UserError

NAN = float("nan")


@pytest.fixture
def state_at(make_config):
    """Makes a state at a step, no leaf of which is as it starts."""

    def make(step, **options):
        initial = job.Job(make_config(**options)).initial
        return jax.tree.map(lambda leaf: leaf + 1, initial)._replace(step=initial.step + step)

    return make


def metrics(accuracy, loss=1.0):
    return {"accuracy": accuracy, "loss": loss}


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"widths": (4,)}},
        {"model": {"widths": (4,), "norm": "none"}, "optimizer": {"name": "adamw"}},
        {"model": {"widths": (4,)}, "optimizer": {"average": 0.9}},
    ],
    ids=["batch norm", "none", "average"],
)
def test_restore_gives_back_every_bit(tmp_path, state_at, options):
    state = state_at(7, **options)
    if state.average is not None:
        state = state._replace(average=jax.tree.map(lambda leaf: leaf * 2, state.average))
    like = jax.tree.map(lambda leaf: leaf * 0, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, metrics(0.5))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 7
        restored = checkpoints.restore(7, like)
        evaluated = checkpoints.restore_model(7, like.evaluated)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(assert_array_equal, restored, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [
        leaf.dtype for leaf in jax.tree.leaves(state)
    ]
    jax.tree.map(assert_array_equal, evaluated, state.evaluated)


@pytest.mark.parametrize("save_on, restore_on", [(1, 4), (4, 1), (4, 2)])
def test_checkpoint_moves_between_numbers_of_devices(tmp_path, state_at, save_on, restore_on):
    state, like = (state_at(7, devices=devices, batch_size=64) for devices in (save_on, restore_on))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, metrics(0.5))
        restored = checkpoints.restore(7, jax.tree.map(lambda leaf: leaf * 0, like))
    jax.tree.map(assert_array_equal, restored, state)
    for leaf in jax.tree.leaves(restored.variables):
        assert len(leaf.sharding.device_set) == restore_on


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
def test_newest_two_and_the_best_are_kept_whatever_the_metrics_do(tmp_path, state_at, ranked, best, kept):
    state = state_at(0)
    with Checkpoints(tmp_path) as checkpoints:
        for step, values in enumerate(ranked, start=1):
            checkpoints.save(state._replace(step=state.step + step), values)
        assert (checkpoints.latest_step, checkpoints.best_step) == (5, best)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == kept


def test_step_is_saved_once(tmp_path, state_at):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), metrics(0.5))
        checkpoints.save(state_at(3), None)
        assert checkpoints.best_step == 3
        with pytest.raises(RuntimeError, match="declined to save step 2 after step 3"):
            checkpoints.save(state_at(2), None)


def test_step_that_cannot_be_saved_is_named_with_the_reason(tmp_path, state_at, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(
            RunFailed, match="step 3 could not be saved to .*No space left.* saved before is kept"
        ):
            checkpoints.save(state_at(3), None)


@pytest.mark.parametrize("broken", ["model", "optimizer", "meta"])
def test_checkpoint_with_a_part_missing_is_named_and_the_one_before_still_there(tmp_path, state_at, broken):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 4):
            checkpoints.save(state_at(step), metrics(0.5))
    shutil.rmtree(tmp_path / "checkpoints" / "4" / broken)
    like = state_at(0)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="checkpoints/4' is no whole"):
        checkpoints.restore(4, like)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(checkpoints.latest_step, like).step) == 3


def test_empty_directory_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
