"""Checkpoints move between Flax's modules and ours, in both directions, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax_layers import NNX, Linen
from numpy.testing import assert_array_equal

import jbn

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = jnp.asarray(np.random.RandomState(0).normal(1, 2, (8, 4, 3)), jnp.float32)
OPTIONS = {
    "defaults": {},
    "bfloat16 parameters": {"param_dtype": jnp.bfloat16},
    "no scale": {"use_scale": False},
    "channels first": {"axis": 1},
}


def trained(flavour, kind, options):
    layer = flavour(kind, X, scale_init=jax.nn.initializers.normal(1.0), **options)
    for _ in range(3):
        layer.train(X)
    return layer


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


CASES = [
    *((Linen, through_orbax, options) for options in OPTIONS),
    *((Linen, through_bytes, options) for options in OPTIONS),
    *((NNX, through_orbax, options) for options in OPTIONS),
]


@pytest.mark.parametrize("direction", ["Flax to ours", "ours to Flax"])
@pytest.mark.parametrize("flavour, through, options", CASES)
def test_checkpoint_of_one_is_a_checkpoint_of_the_other(tmp_path, flavour, through, options, direction):
    writer, reader = flavour.flax, flavour.ours
    if direction == "ours to Flax":
        writer, reader = reader, writer
    saved = trained(flavour, writer, OPTIONS[options])
    layer = flavour(reader, X, **OPTIONS[options])
    expected = jax.tree.map(np.array, tree(saved))
    load(layer, through(tree(saved), tree(layer), tmp_path))
    assert jax.tree.structure(tree(layer)) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(tree(layer)), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        assert_array_equal(a, b)
    np.testing.assert_allclose(layer.infer(X), saved.infer(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flavour", [Linen, NNX])
def test_count_of_an_update_rule_travels_too(tmp_path, flavour):
    options = {"update": jbn.ema(0.9, debias=True)}
    saved = trained(flavour, flavour.ours, options)
    layer = flavour(flavour.ours, X, **options)
    load(layer, through_orbax(tree(saved), tree(layer), tmp_path))
    for each in (saved, layer):
        each.train(2 * X)
    jax.tree.map(assert_array_equal, layer.stats, saved.stats)
    assert np.all(layer.stats["count"] > 0.3)


def test_bfloat16_statistics_come_back_from_a_visit_bit_for_bit(tmp_path):
    options = {"force_float32_reductions": False, "param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
    x = X.astype(jnp.bfloat16)
    theirs, ours = (Linen(kind, x, **options) for kind in (Linen.flax, Linen.ours))
    theirs.train(x)
    visiting = through_orbax(tree(theirs), tree(ours), tmp_path / "there")
    assert visiting["batch_stats"]["var"].dtype == jnp.float32
    returned = through_orbax(visiting, tree(theirs), tmp_path / "back")
    jax.tree.map(assert_array_equal, returned, theirs.variables)
