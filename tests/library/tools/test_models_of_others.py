"""Whole models that know nothing of jbn: recalibrated, and trained with their norms frozen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose

import jbn.linen
from tests.helpers.flax_resnet import ResNet

pytestmark = pytest.mark.usefixtures("standard_promotion")


def check(apply, train, variables, batches):
    """Checks recalibration against the batch's own statistics in training, and frozen norms."""
    one = jbn.linen.recalibrate(apply, variables, batches[:1])
    with jbn.linen.override(momentum=0.0):
        _, trained = jax.jit(train)(variables, batches[0])
    for path, value in flatten_dict(trained["batch_stats"]).items():
        assert_allclose(flatten_dict(one["batch_stats"])[path], value, rtol=1e-4, atol=1e-4)
    new = jbn.linen.recalibrate(apply, variables, batches)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    same = jax.tree.map(np.array_equal, new["batch_stats"], one["batch_stats"])
    assert not any(jax.tree.leaves(same))

    def loss(params):
        y, updated = train({**variables, "params": params}, batches[0])
        return jnp.sum(y**2), updated["batch_stats"]

    # Every scale 1, which some models start at 0: what is then before it has no gradient either.
    ones = jax.tree.map_with_path(
        lambda path, p: np.asarray(p) + (path[-1].key == "scale"), variables["params"]
    )
    with jbn.linen.override(frozen=True):
        grads, stats = jax.jit(jax.grad(loss, has_aux=True))(ones)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, stats, variables["batch_stats"])))
    norms = {path[:-1] for path in flatten_dict(stats)}
    for path, grad in flatten_dict(grads).items():
        assert np.any(grad) != (path[:-1] in norms), path


@pytest.mark.slow
def test_network_of_flax_s_imagenet_example():
    model, rng = ResNet((1, 1)), np.random.RandomState(0)
    batches = [rng.normal(1, 2, (n, 8, 8, 3)).astype("float32") for n in (8, 8)]
    variables = jax.jit(model.init)(jax.random.key(0), batches[0])
    train = partial(model.apply, mutable=["batch_stats"])
    check(partial(model.apply, train=False), train, variables, batches)


@pytest.mark.slow
def test_network_of_jax_resnet():
    jax_resnet = pytest.importorskip(
        "jax_resnet", reason="pip install jax-resnet, a package that nobody here wrote"
    )
    model, rng = jax_resnet.ResNet18(n_classes=3), np.random.RandomState(0)
    batches = [rng.normal(1, 2, (n, 32, 32, 3)).astype("float32") for n in (4, 4)]
    variables = jax.jit(model.init)(jax.random.key(0), batches[0])
    check(model.apply, partial(model.apply, mutable=["batch_stats"]), variables, batches)
