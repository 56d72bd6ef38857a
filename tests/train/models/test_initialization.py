"""Initial weights of every network: those of Flax and of He, or Gaussian ones of a given size."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import quick_jit
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from train.config import Model
from train.models import network as models

IMAGES = np.zeros((1, 8, 8, 2), np.float32)
WIDTHS = {
    "mlp": (96, 64),
    "nnx_mlp": (96, 64),
    "cnn": (16, 24),
    "resnet20": (8, 12, 16),
    "resnet50": (4, 6, 8, 10),
}
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@cache
def initial(name, kernel_std):
    config = Model(name=name, widths=WIDTHS[name], kernel_std=kernel_std)
    network = models.build(config, IMAGES.shape[1:], classes=10)
    params, _ = quick_jit(network.init)(jax.random.key(3), IMAGES)
    return params


def kernels(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.float64(x) for path, x in leaves if path[-1].key == "kernel"}


@pytest.mark.parametrize("name", WIDTHS)
def test_kernel_std_is_the_standard_deviation_of_every_kernel_and_of_nothing_else(name):
    # Far from what any layer has by itself.
    found = kernels(initial(name, 3.0))
    for path, kernel in found.items():
        # The standard deviation of a sample is off by 1 / sqrt(2 n) of itself, and seldom by 4 times that.
        assert_allclose(kernel.std(), 3, rtol=4 / np.sqrt(2 * kernel.size), err_msg=path)
        assert_allclose(kernel.mean(), 0, atol=4 * 3 / np.sqrt(kernel.size), err_msg=path)
    # Gaussian, and not cut off at two standard deviations as the usual ones are.
    every = np.concatenate([kernel.ravel() for kernel in found.values()])
    assert_allclose((np.abs(every) > 6).mean(), 0.0455, rtol=0.2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(initial(name, 3.0)):
        if path[-1].key != "kernel":
            assert_array_equal(leaf, 1 if path[-1].key == "scale" else 0)


class PlainMLP(nn.Module):
    """The layers as Flax initializes them; the normalization between them draws nothing."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for width in WIDTHS["mlp"]:
            x = nn.Dense(width)(x)
        return nn.Dense(10)(x)


class PlainCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 16, 24, 24):
            x = nn.Conv(width, (3, 3))(x)
        return nn.Dense(10)(x.mean((1, 2)))


class PlainConvolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3, 3), kernel_init=HE)(x)


class PlainEnds(nn.Module):
    """The first and the last layer of a residual network."""

    @nn.compact
    def __call__(self, x):
        PlainConvolution(name="stem")(x)
        return nn.Dense(10)(jnp.zeros((1, 16)))


PLAIN = {"mlp": PlainMLP(), "cnn": PlainCNN(), "resnet20": PlainEnds()}


@pytest.mark.parametrize("name", PLAIN)
def test_without_kernel_std_weights_are_those_that_flax_and_he_draw_by_the_same_key(name):
    expected = kernels(quick_jit(PLAIN[name].init)(jax.random.key(3), IMAGES)["params"])
    found = kernels(initial(name, 0.0))
    assert expected.keys() <= found.keys()
    assert name.startswith("resnet") or expected.keys() == found.keys()
    for path, kernel in expected.items():
        assert_array_equal(found[path], kernel, err_msg=path)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_without_kernel_std_weights_in_nnx_are_those_that_flax_draws_from_the_same_stream(norm):
    config = Model(name="nnx_mlp", widths=WIDTHS["nnx_mlp"], norm=norm)
    network = models.build(config, IMAGES.shape[1:], classes=10)
    params, _ = network.init(jax.random.key(3), IMAGES)
    rngs = nnx.Rngs(jax.random.key(3))
    for i, sizes in enumerate([(128, 96), (96, 64)]):
        layer = nnx.Linear(*sizes, use_bias=norm == "none", rngs=rngs)
        assert_array_equal(params["hidden"][i]["linear"]["kernel"], layer.kernel[...])
        if norm == "batch":
            nnx.BatchNorm(sizes[1], rngs=rngs)  # takes keys of the stream too
    assert_array_equal(params["head"]["kernel"], nnx.Linear(64, 10, rngs=rngs).kernel[...])


def test_without_kernel_std_residual_networks_have_the_variance_of_he_in_every_convolution():
    for path, kernel in kernels(initial("resnet20", 0.0)).items():
        fan = kernel.shape[0] if kernel.ndim == 2 else np.prod(kernel.shape[:2]) * kernel.shape[3] / 2
        assert_allclose(kernel.std(), fan**-0.5, rtol=4 / np.sqrt(2 * kernel.size), err_msg=path)
