"""A residual network in the way in which Flax's ImageNet example builds one, with its layer and with ours."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import quick_jit
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn.linen

pytestmark = pytest.mark.usefixtures("standard_promotion")
IMAGES = jnp.asarray(np.random.RandomState(0).normal(0.5, 1, (16, 16, 16, 3)), jnp.float32)
LABELS = jnp.arange(16) % 4


class Bottleneck(nn.Module):
    filters: int
    strides: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    layer: Callable
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            self.layer,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        x = nn.relu(norm(name="bn_init")(conv(8, (3, 3), name="conv_init")(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for strides in (2, 1):
            x = Bottleneck(8, strides, conv, norm)(x)
        x = nn.Dense(4, dtype=self.dtype)(jnp.mean(x, (1, 2)))
        return jnp.asarray(x, jnp.float32)


def train_step(model, optimizer, state, images, labels):
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
    updates, opt_new = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), stats_new, opt_new), loss, grads


def start(layer, **options):
    model, optimizer = ResNet(layer, **options), optax.sgd(0.1, momentum=0.9, nesterov=True)
    variables = quick_jit(partial(model.init, train=False))(jax.random.key(0), IMAGES)
    state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    return partial(train_step, model, optimizer), state


def close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.max(np.abs(b))))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
def test_one_step_is_that_of_flax(dtype, tolerance):
    (ours, state), (theirs, expected_state) = (
        start(layer, dtype=dtype) for layer in (jbn.linen.BatchNorm, nn.BatchNorm)
    )
    jax.tree.map(assert_array_equal, state, expected_state)
    close(*(quick_jit(step)(state, IMAGES, LABELS) for step in (ours, theirs)), tolerance)


def test_network_learns():
    step, state = start(jbn.linen.BatchNorm)
    step, losses = quick_jit(step), []
    for _ in range(40):
        state, loss, _ = step(state, IMAGES, LABELS)
        losses.append(loss)
    assert losses[0] > 1.2 and losses[-1] < 0.3


def test_step_on_two_devices_with_an_axis_name_is_that_on_one():
    step, state = start(jbn.linen.BatchNorm)
    expected = quick_jit(step)(state, IMAGES, LABELS)
    step, _ = start(jbn.linen.BatchNorm, axis_name="batch")
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    on_devices = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("batch"), P("batch")), out_specs=P(), check_vma=False
    )
    close(quick_jit(on_devices)(state, IMAGES, LABELS), expected, 2e-5)
