"""Every network by value, in training and in inference, beside the same network in NumPy."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from train.config import Model
from train.models import Variables, build
from train.models.convolutional import ResNet
from train.models.network import LinenNetwork
from train.models.norms import Norm

IMAGES = np.random.RandomState(0).normal(0, 1, (4, 8, 7, 2)).astype(np.float32)
FUNCTIONS = {"relu": lambda x: np.maximum(x, 0), "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh}


def initial(network):
    """Return random variables, in which the size of what goes through a layer stays about the same."""
    random = np.random.RandomState(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return random.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)
        return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(network.init, jax.random.key(0), IMAGES))


class Layers:
    """The layers of a network in one mode, in NumPy. They remember what they got, in order."""

    def __init__(self, variables, train, activation):
        self.params, self.stats = variables
        self.train, self.function = train, FUNCTIONS[activation]
        self.inputs_of_norms, self.inputs_of_activations = {}, []

    def activation(self, x):
        self.inputs_of_activations.append(x)
        return self.function(x)

    def norm(self, x, *path):
        params, stats = of(self.params, path), of(self.stats, path)
        self.inputs_of_norms[path] = x
        mean, var, _ = reference.moments(x) if self.train else (stats["mean"], stats["var"], None)
        return reference.normalize(x, mean, var, params["scale"], params["bias"])

    def linear(self, x, *path):
        """Apply a linear map or a convolution: its kernel, and its bias where it has one."""
        params = of(self.params, path)
        return x @ np.float64(params["kernel"]) + params.get("bias", 0)

    def convolution(self, x, *path, strides=1):
        params = of(self.params, path)
        size = len(params["kernel"])
        x = windows(x, size, strides, (size // 2, size // 2), 0)
        return np.einsum("nhwcij,ijcf->nhwf", x, np.float64(params["kernel"])) + params.get("bias", 0)


close = partial(assert_allclose, rtol=2e-4, atol=2e-4)


def of(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def windows(x, size, strides, padding, fill):
    """Return (n, h, w, c, size, size): the window around each position."""
    pad = ((0, 0), padding, padding, (0, 0))
    x = np.pad(np.float64(x), pad, constant_values=fill)
    return sliding_window_view(x, (size, size), (1, 2))[:, ::strides, ::strides]


def assert_computes(network, in_numpy, activation="relu"):
    """Assert that a network computes in both modes what NumPy does, and its activations get the same."""
    variables = initial(network)
    kept = jax.tree.map(np.array, variables)
    # Without normalization outside of jit, where activation inputs are arrays too.
    compiled = jax.jit if variables.batch_stats else lambda f: f

    @compiled
    def run(variables):
        seen = network.activation_inputs(variables, IMAGES, train=True)
        return seen, network.apply(variables, IMAGES, train=False)

    seen, (logits, stats) = run(variables)
    jax.tree.map(assert_array_equal, (variables, stats), (kept, variables.batch_stats))
    close(logits, in_numpy(Layers(variables, False, activation)))
    layers = Layers(variables, True, activation)
    in_numpy(layers)
    for ours, theirs in zip(seen, layers.inputs_of_activations, strict=True):
        close(ours, theirs)


def assert_pools(network, in_numpy, activation="relu"):
    """Assert that the running statistics are those of what each layer got, and the logits NumPy's."""
    variables = initial(network)
    empty = lambda path, leaf: leaf * (path[-1].key == "var")  # the variance of no sample may be anything
    fresh = Variables(variables.params, jax.tree_util.tree_map_with_path(empty, variables.batch_stats))
    logits, stats = jax.jit(partial(network.apply, train=True))(fresh, IMAGES)
    layers = Layers(variables, True, activation)
    close(logits, in_numpy(layers))
    assert len(jax.tree.leaves(stats)) == 3 * len(layers.inputs_of_norms) > 0
    for path, x in layers.inputs_of_norms.items():
        for name, value in zip(jbn.Moments._fields, reference.moments(x)):
            close(of(stats, path)[name], value, err_msg=f"{path} {name}")


def make(name, **options):
    return build(Model(name=name, **options), IMAGES.shape[1:], classes=3, rule=jbn.pooled())


def linen_mlp(layers):
    x, norms = np.float64(IMAGES).reshape(len(IMAGES), -1), iter(range(3))
    if "BatchNorm_2" in layers.params:
        x = layers.norm(x, f"BatchNorm_{next(norms)}")
    for i in range(2):
        x = layers.linear(x, f"Dense_{i}")
        x = layers.norm(x, f"BatchNorm_{next(norms)}") if layers.stats else x
        x = layers.activation(x)
    return layers.linear(x, "Dense_2")


def nnx_mlp(layers):
    x = np.float64(IMAGES).reshape(len(IMAGES), -1)
    if "norm_of_inputs" in layers.params:
        x = layers.norm(x, "norm_of_inputs")
    for i in range(2):
        x = layers.linear(x, "hidden", i, "linear")
        x = layers.norm(x, "hidden", i, "norm") if layers.stats else x
        x = layers.activation(x)
    return layers.linear(x, "head")


IN_NUMPY = {"mlp": linen_mlp, "nnx_mlp": nnx_mlp}


@pytest.mark.parametrize("name", IN_NUMPY)
def test_mlp_is_linear_maps_normalization_and_the_activation(name):
    for options in {"norm": "none", "activation": "sigmoid"}, {"norm_inputs": True, "activation": "tanh"}:
        assert_computes(make(name, widths=(6, 4), **options), IN_NUMPY[name], options["activation"])


@pytest.mark.parametrize("name", IN_NUMPY)
def test_running_statistics_in_a_network_are_those_of_what_each_layer_gets(name):
    assert_pools(make(name, widths=(6, 4)), IN_NUMPY[name])


@pytest.mark.parametrize("name", IN_NUMPY)
def test_gradients_of_the_mlp_are_the_change_of_its_loss(name):
    network = make(name, widths=(6, 4), norm="none", activation="tanh")
    params, _ = initial(network)
    loss = lambda params: network.apply(Variables(params, {}), IMAGES, train=True)[0].sum()
    gradients = jax.jit(jax.grad(loss))(params)
    changes = jax.tree.map(lambda leaf: 1e-3 * np.random.RandomState(1).normal(size=leaf.shape), params)

    def changed(by):
        moved = jax.tree.map(lambda leaf, change: np.float64(leaf) + by * change, params, changes)
        return IN_NUMPY[name](Layers((moved, {}), True, "tanh")).sum()

    expected = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), gradients, changes)))
    assert_allclose((changed(1) - changed(-1)) / 2, expected, rtol=1e-3)


def cnn(layers):
    x, norms = IMAGES, iter(range(5))
    if "BatchNorm_4" in layers.params:
        x = layers.norm(x, f"BatchNorm_{next(norms)}")
    for i in range(4):
        x = layers.convolution(x, f"Conv_{i}")
        x = layers.activation(layers.norm(x, f"BatchNorm_{next(norms)}"))
        if i % 2:
            odd = [(0, size % 2) for size in x.shape[1:3]]
            x = np.pad(x, ((0, 0), *odd, (0, 0)), constant_values=-np.inf)
            x = windows(x, 2, 2, (0, 0), 0).max((-2, -1))
    return layers.linear(x.mean((1, 2)), "Dense_0")


def test_cnn_is_convolutions_normalization_and_pools():
    network = make("cnn", widths=(3, 4), norm_inputs=True, activation="tanh")
    assert_computes(network, cnn, "tanh")


def resnet(layers, *, blocks, large):
    """Compute a residual network as the paper writes it down."""

    def convolution(x, *path, strides=1):
        return layers.norm(layers.convolution(x, *path, "Conv_0", strides=strides), *path, "BatchNorm_0")

    x = layers.norm(IMAGES, "BatchNorm_0") if "BatchNorm_0" in layers.params else IMAGES
    x = layers.activation(convolution(x, "stem", strides=2 if large else 1))
    if large:
        x = windows(x, 3, 2, (1, 1), -np.inf).max((-2, -1))
    for stage, count in enumerate(blocks):
        for i in range(count):
            block = f"stage{stage}_block{i}"
            names = sorted(name for name in layers.params[block] if name != "shortcut")
            halves = stage > 0 and i == 0
            strided = len(names) - 2  # the 3x3 convolution: the first of two, the second of three
            y = x
            for j, name in enumerate(names):
                y = layers.activation(y) if j else y
                y = convolution(y, block, name, strides=2 if halves and j == strided else 1)
            if "shortcut" in layers.params[block]:
                x = convolution(x, block, "shortcut", strides=2 if halves else 1)
            elif x.shape != y.shape:
                x = x[:, ::2, ::2, : y.shape[-1]]
                x = np.pad(x, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1])))
            x = layers.activation(x + y)
    return layers.linear(x.mean((1, 2)), "Dense_0")


@pytest.mark.slow
def test_resnet20_is_what_the_paper_writes_down_where_shortcuts_pad_or_drop_channels():
    network = make("resnet20", widths=(3, 5, 4), activation="tanh", norm_inputs=True)
    assert_computes(network, partial(resnet, blocks=(3, 3, 3), large=False), "tanh")


@pytest.mark.slow
def test_resnet_for_large_images_is_what_the_paper_writes_down_where_shortcuts_project():
    module = ResNet(
        blocks=(1, 1),
        bottleneck=True,
        large=True,
        widths=(3, 5),
        classes=3,
        norm=Norm(Model(), jbn.pooled()),
        activation=jax.nn.relu,
        kernel_std=0.0,
        dtype="float32",
    )
    assert_computes(LinenNetwork(module), partial(resnet, blocks=(1, 1), large=True))
