"""A residual network in the way in which Flax's ImageNet example builds one, with its layer and with ours."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn.linen
from tests.helpers.resnet import ResNet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
IMAGES = jnp.asarray(np.random.RandomState(0).normal(0.5, 1, (16, 8, 8, 3)), jnp.float32)

LABELS = jnp.arange(16) % 4
OPTIMIZER = optax.sgd(0.1, momentum=0.9, nesterov=True)


def train_step(model, state, images, labels):
    params, batch_stats, opt_state = state

    def loss_fn(params):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
        return loss + 1e-4 / 2 * decay, (loss, updated["batch_stats"])

    grads, (loss, stats_new) = jax.grad(loss_fn, has_aux=True)(params)
    if model.axis_name is not None:
        grads, loss = jax.lax.pmean((grads, loss), model.axis_name)
    updates, opt_new = OPTIMIZER.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), stats_new, opt_new), loss, grads


@cache
def on_two_devices():
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    step = partial(train_step, ResNet(jbn.linen.BatchNorm, axis_name="batch"))
    specs = dict(in_specs=(P(), P("batch"), P("batch")), out_specs=P())
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs, check_vma=False))


@cache
def start():
    init = partial(ResNet(jbn.linen.BatchNorm).init, train=False)
    variables = jax.jit(init)(jax.random.key(0), IMAGES)
    return variables["params"], variables["batch_stats"], OPTIMIZER.init(variables["params"])


def close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.max(np.abs(b))))


def test_step_on_two_devices_with_an_axis_name_is_that_of_flax_on_one():
    of_flax = jax.jit(partial(train_step, ResNet(nn.BatchNorm)))
    close(*(step(start(), IMAGES, LABELS) for step in (on_two_devices(), of_flax)), 2e-5)


def test_network_learns():
    state, losses = start(), []
    for _ in range(30):
        state, loss, _ = on_two_devices()(state, IMAGES, LABELS)
        losses.append(loss)
    assert losses[0] > 1.2 and losses[-1] < 0.3
