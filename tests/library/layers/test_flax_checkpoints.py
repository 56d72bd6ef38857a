"""Checkpoints move between Flax's modules and ours, in both directions, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from numpy.testing import assert_array_equal

import jbn
from tests.helpers.flax_layers import NNX, Linen
from tests.helpers.layers import random

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
X = np.asarray(random((8, 4, 3), mean=1))


def tree(layer):
    return layer.variables if isinstance(layer, Linen) else nnx.state(layer.layer)


def load(layer, restored):
    if isinstance(layer, Linen):
        layer.variables = restored
    else:
        nnx.update(layer.layer, restored)


def through_orbax(saved, target, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", target)


def through_bytes(saved, target, path):
    return serialization.from_bytes(target, serialization.to_bytes(saved))


OPTIONS = {
    "defaults": {},
    "axis and dtype": {"axis": 1, "param_dtype": jnp.bfloat16},
    "no scale": {"use_scale": False},
}


def fill(layer, rng):
    """Puts random values in place of those that a new layer has."""
    draw = lambda leaf: jnp.asarray(rng.gamma(1.0, size=leaf.shape), leaf.dtype)
    load(layer, jax.tree.map(draw, tree(layer)))


@pytest.mark.parametrize(
    "flavour, through", [(Linen, through_orbax), (Linen, through_bytes), (NNX, through_orbax)]
)
def test_checkpoint_of_one_is_a_checkpoint_of_the_other(tmp_path, flavour, through):
    rng = np.random.RandomState(0)
    for case, options in OPTIONS.items():
        theirs, ours = (flavour(kind, X, jit=jax.jit, **options) for kind in (flavour.flax, flavour.ours))
        for writer, reader, direction in (theirs, ours, "to ours"), (ours, theirs, "to Flax"):
            fill(writer, rng)
            expected = jax.tree.map(np.array, tree(writer))
            load(reader, through(tree(writer), tree(reader), tmp_path / case / direction))
            assert jax.tree.structure(tree(reader)) == jax.tree.structure(expected)
            for a, b in zip(jax.tree.leaves(tree(reader)), jax.tree.leaves(expected)):
                assert a.dtype == b.dtype
                assert_array_equal(a, b, err_msg=f"{case}, {direction}")


@pytest.mark.parametrize("flavour", [Linen, NNX])
def test_count_of_an_update_rule_travels_too(tmp_path, flavour):
    options = {"update": jbn.ema(0.9, debias=True)}
    saved, layer = (flavour(flavour.ours, X, jit=jax.jit, **options) for _ in range(2))
    for _ in range(3):
        saved.train(X)
    load(layer, through_orbax(tree(saved), tree(layer), tmp_path))
    for each in (saved, layer):
        each.train(2 * X)
    jax.tree.map(assert_array_equal, layer.stats, saved.stats)
    assert np.all(layer.stats["count"] > 0.3)


def test_bfloat16_statistics_come_back_from_a_visit_bit_for_bit(tmp_path):
    options = {"force_float32_reductions": False, "param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
    x = X.astype("bfloat16")
    theirs, ours = (Linen(kind, x, jit=jax.jit, **options) for kind in (Linen.flax, Linen.ours))
    theirs.train(x)
    visiting = through_orbax(tree(theirs), tree(ours), tmp_path / "there")
    assert visiting["batch_stats"]["var"].dtype == jnp.float32
    returned = through_orbax(visiting, tree(theirs), tmp_path / "back")
    jax.tree.map(assert_array_equal, returned, theirs.variables)
