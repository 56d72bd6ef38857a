"""Convolutional and residual networks: their size as published, and their values beside NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import quick_jit
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_allclose

import jbn
from train.config import Model
from train.models import network as models
from train.models.norms import Norm
from train.models.residual import Convolution, ResNet

IMAGES = np.random.RandomState(0).normal(0, 1, (4, 8, 7, 2)).astype(np.float32)
ACTIVATIONS = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}


def initial(network):
    """Returns random variables, in which the size of what goes through a layer stays about the same."""
    random = np.random.RandomState(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return random.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)
        return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(network.init, jax.random.key(0), IMAGES))


def windows(x, size, strides, padding, fill):
    """Returns (n, h, w, c, size, size): the window around each position."""
    pad = ((0, 0), padding, padding, (0, 0))
    x = np.pad(np.float64(x), pad, constant_values=fill)
    return sliding_window_view(x, (size, size), (1, 2))[:, ::strides, ::strides]


def convolution(x, kernel, strides=1):
    size = len(kernel)
    x = windows(x, size, strides, (size // 2, size // 2), 0)
    return np.einsum("nhwcij,ijcf->nhwf", x, np.float64(kernel))


def normalized(x, params, strides=1):
    norm = params["BatchNorm_0"]
    return reference.batch_norm(
        convolution(x, params["Conv_0"]["kernel"], strides), norm["scale"], norm["bias"]
    )


def normalized_inputs(x, norm):
    return reference.batch_norm(x, norm["scale"], norm["bias"])


def watched(activation):
    """Returns an activation, and a list of what it will have been called with."""
    seen = []

    def watch(x):
        seen.append(x)
        return ACTIVATIONS[activation](x)

    return watch, seen


def run(network, variables):
    """Returns logits and the inputs of the activations, both in training."""
    both = lambda variables: (
        network.apply(variables, IMAGES, train=True)[0],
        network.activation_inputs(variables, IMAGES, train=True),
    )
    return quick_jit(both)(variables)


def assert_all_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def logits_of(x, head):
    return x.mean((1, 2)) @ np.float64(head["kernel"]) + head["bias"]


def resnet(x, params, *, large, blocks, activation):
    """Computes a residual network as the paper writes it down."""
    if "BatchNorm_0" in params:
        x = normalized_inputs(x, params["BatchNorm_0"])
    x = activation(normalized(x, params["stem"], 2 if large else 1))
    if large:
        x = windows(x, 3, 2, (1, 1), -np.inf).max((-2, -1))
    for stage, block in blocks:
        layers = params[f"stage{stage}_block{block}"]
        strides = 2 if stage > 0 and block == 0 else 1
        strided = 1 if "Convolution_2" in layers else 0
        y = x
        for i in range(len(layers) - ("shortcut" in layers)):
            y = normalized(
                activation(y) if i else y, layers[f"Convolution_{i}"], strides if i == strided else 1
            )
        if "shortcut" in layers:
            x = normalized(x, layers["shortcut"], strides)
        elif x.shape != y.shape:
            padded = np.zeros(y.shape)
            channels = min(x.shape[-1], y.shape[-1])
            padded[..., :channels] = x[:, ::strides, ::strides, :channels]
            x = padded
        x = activation(x + y)
    return logits_of(x, params["Dense_0"])


@pytest.mark.parametrize(
    "name, image, classes, parameters",
    [
        ("resnet20", (32, 32, 3), 10, 269_722),  # 0.27 M in table 6 of the paper
        ("resnet56", (32, 32, 3), 10, 853_018),  # 0.85 M
        ("resnet18", (224, 224, 3), 1000, 11_689_512),  # torchvision's
        ("resnet50", (224, 224, 3), 1000, 25_557_032),
    ],
)
def test_residual_networks_have_the_parameters_that_were_published(name, image, classes, parameters):
    network = models.build(Model(name=name), image, classes)
    params, _ = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *image)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize(
    "large, bottleneck, activation, widths, norm_inputs",
    [
        (False, False, "relu", (3, 5), False),
        (False, False, "tanh", (5, 3), True),  # fewer channels, of which the shortcut drops some
        (True, False, "relu", (3, 5), True),
        (True, True, "relu", (3, 5), False),
    ],
)
def test_residual_network_and_what_its_activations_get_are_what_the_paper_writes_down(
    large, bottleneck, activation, widths, norm_inputs
):
    module = ResNet(
        stages=(1, 2),
        bottleneck=bottleneck,
        large=large,
        widths=widths,
        classes=3,
        norm=Norm(Model(norm_inputs=norm_inputs), jbn.ema(0.9)),
        activation=getattr(jax.nn, activation),
        kernel_std=0.0,
        dtype="float32",
    )
    network = models.LinenNetwork(module)
    variables = initial(network)
    assert ("shortcut" in variables.params["stage1_block0"]) == large
    assert ("BatchNorm_0" in variables.params) == norm_inputs
    logits, inputs = run(network, variables)
    blocks, (function, seen) = [(0, 0), (1, 0), (1, 1)], watched(activation)
    expected = resnet(IMAGES, variables.params, large=large, blocks=blocks, activation=function)
    assert_all_close([logits, *inputs], [expected, *seen])


def test_kernels_of_residual_networks_start_with_the_variance_of_he():
    options = {"norm": Norm(Model(), jbn.ema(0.9)), "train": False, "kernel_std": 0.0, "dtype": "float32"}
    layer = Convolution(64, 3, 1, **options)
    variables = quick_jit(layer.init)(jax.random.key(0), np.zeros((1, 4, 4, 32), np.float32))
    assert_allclose(np.var(variables["params"]["Conv_0"]["kernel"]), 2 / (9 * 64), rtol=0.05)


@pytest.mark.parametrize("activation, norm_inputs", [("relu", False), ("tanh", True)])
def test_cnn_and_what_its_activations_get_are_convolutions_normalization_and_pools(activation, norm_inputs):
    config = Model(name="cnn", widths=(3, 4), activation=activation, norm_inputs=norm_inputs)
    network = models.build(config, IMAGES.shape[1:], 3)
    variables = initial(network)
    logits, inputs = run(network, variables)
    params, (function, seen) = variables.params, watched(activation)
    x = normalized_inputs(IMAGES, params["BatchNorm_0"]) if norm_inputs else IMAGES
    for i in range(4):
        norm = params[f"BatchNorm_{i + norm_inputs}"]
        x = function(normalized(x, {"Conv_0": params[f"Conv_{i}"], "BatchNorm_0": norm}))
        if i % 2:
            odd = [(0, size % 2) for size in x.shape[1:3]]
            x = np.pad(x, ((0, 0), *odd, (0, 0)), constant_values=-np.inf)
            x = windows(x, 2, 2, (0, 0), 0).max((-2, -1))
    assert_all_close([logits, *inputs], [logits_of(x, params["Dense_0"]), *seen])
