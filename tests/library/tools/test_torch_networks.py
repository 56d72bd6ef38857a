"""Whole networks compute with PyTorch's weights what it computes, strides, paddings and groups included."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

import jbn.linen
import jbn.nnx
from tests.helpers.nnx_resnet import ResNet, torchvision_names
from tests.helpers.torch_weights import LAYERS, images, layers, weights

DATA = Path(__file__).parents[2] / "data"
PYTORCH = json.loads((DATA / "torch_layers.json").read_text())
# PyTorch's ConvTranspose pads by dilation * (size - 1) - padding, and by output_padding more at the end.
UP, GROUPED = [(2, 2)], [(1, 2)]
PLANE = [(1, 2), (2, 4)]
ONE = {"conv1": "0", "norm1": "1", "conv2": "3", "norm2": "4", "up": "5", "norm3": "6", "up2": "8"}
ONE |= {"norm4": "10", "out": "11"}
TWO = {"up": "0", "depthwise": "1"}


@pytest.fixture(autouse=True)
def _standard_promotion(standard_promotion):
    yield


def expected(name):
    return np.array(PYTORCH[name]["y"]).reshape(PYTORCH[name]["shape"])


class One(nn.Module):
    reverse: bool = False  # how the transposed layer is spelt

    @nn.compact
    def __call__(self, x):
        norm = lambda name, **options: nn.BatchNorm(use_running_average=True, name=name, **options)
        x = nn.Conv(8, (4,), strides=2, padding=1, name="conv1")(x)
        x = nn.relu(norm("norm1", epsilon=1e-3)(x))
        x = nn.Conv(8, (3,), padding=1, feature_group_count=4, use_bias=False, name="conv2")(x)
        x = nn.GroupNorm(2, epsilon=1e-5, name="norm2")(x)
        x = nn.ConvTranspose(8, (4,), strides=(2,), padding=UP, transpose_kernel=self.reverse, name="up")(x)
        x = nn.relu(norm("norm3", use_scale=False, use_bias=False)(x))
        x = nn.Conv(6, (3,), input_dilation=2, padding=GROUPED, feature_group_count=2, name="up2")(x)
        x = x.transpose(0, 2, 1).reshape(len(x), -1)
        return nn.Dense(3, name="out")(nn.LayerNorm(epsilon=1e-5, name="norm4")(x))


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(4, (3, 2), (2, 3), padding=PLANE, kernel_dilation=(1, 2), name="up")(x)
        return nn.Conv(
            4,
            (3, 3),
            padding=[(2, 2), (0, 0)],
            kernel_dilation=(1, 2),
            feature_group_count=4,
            name="depthwise",
        )(x)


@pytest.mark.parametrize(
    "network, name, names, transposed",
    [
        (One(), "one", ONE, ("up", "up2")),
        (One(reverse=True), "one", ONE, "up2"),
        (Two(), "two", TWO, ("up",)),
    ],
)
def test_linen_networks(network, name, names, transposed):
    x = images(*LAYERS[name][0])
    like = jax.eval_shape(network.init, jax.random.key(0), x)
    loaded = jbn.linen.load_torch(like, layers(name), names, transposed=transposed)
    assert_allclose(jax.jit(network.apply)(loaded, x), expected(name), rtol=0, atol=1e-5)


class NNXOne(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(4, 8, (4,), strides=2, padding=1, rngs=rngs)
        self.norm1 = jbn.nnx.BatchNorm(8, epsilon=1e-3, update=jbn.ema(0.9, debias=True), rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3,), padding=1, feature_group_count=4, use_bias=False, rngs=rngs)
        self.norm2 = nnx.GroupNorm(8, 2, epsilon=1e-5, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 8, (4,), strides=2, padding=UP, rngs=rngs)
        self.norm3 = nnx.BatchNorm(8, use_scale=False, use_bias=False, rngs=rngs)
        self.up2 = nnx.Conv(8, 6, (3,), input_dilation=2, padding=GROUPED, feature_group_count=2, rngs=rngs)
        self.norm4 = nnx.LayerNorm(120, epsilon=1e-5, rngs=rngs)
        self.out = nnx.Linear(120, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        x = self.up2(nnx.relu(self.norm3(self.up(x))))
        return self.out(self.norm4(x.transpose(0, 2, 1).reshape(len(x), -1)))


def test_nnx_networks_know_their_transposed_layers_and_may_be_of_shapes_alone():
    model = nnx.eval_shape(lambda: NNXOne(nnx.Rngs(0)))
    with pytest.raises(TypeError, match="model: expected an nnx.Module, got a State"):
        jbn.nnx.load_torch(nnx.state(model), layers("one"), ONE)
    assert jbn.nnx.load_torch(model, layers("one"), ONE) is None
    dropped = nnx.Sequential(
        nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    )
    jbn.nnx.load_torch(dropped, {"fc.weight": np.ones((2, 2))}, {"layers/0": "fc"})
    turned = nnx.ConvTranspose(3, 3, (2,), transpose_kernel=True, use_bias=False, rngs=nnx.Rngs(0))
    jbn.nnx.load_torch(turned, {"up.weight": np.arange(18.0).reshape(3, 3, 2)}, {"": "up"})
    assert_array_equal(turned.kernel[...], np.arange(18.0).reshape(3, 3, 2).T)
    model.eval()
    x = images(*LAYERS["one"][0])
    assert_allclose(nnx.jit(lambda model, x: model(x))(model, x), expected("one"), rtol=0, atol=1e-5)
    assert_array_equal(model.norm1.count[...], np.ones(8))
    # Nothing is changed if anything does not fit.
    broken = layers("one") | {"11.bias": np.zeros(2)}
    before = jax.tree.leaves(nnx.state(model))
    with pytest.raises(ValueError, match=r"^11.bias: expected \(3,\) for out/bias \(3,\), got \(2,\)$"):
        jbn.nnx.load_torch(model, broken, ONE)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model))))


def test_a_safetensors_file_of_bfloat16_is_a_state(tmp_path):
    state = {key: jnp.asarray(value, jnp.bfloat16) for key, value in layers("two").items()}
    save_file({key: np.asarray(value) for key, value in state.items()}, tmp_path / "two.safetensors")
    like = jax.eval_shape(Two().init, jax.random.key(0), images(*LAYERS["two"][0]))
    loaded, same = (
        jbn.linen.load_torch(like, source, TWO, transposed="up")
        for source in (load_file(tmp_path / "two.safetensors"), state)
    )
    jax.tree.map(assert_array_equal, loaded, same)
    with pytest.raises(TypeError, match=r"state is a str; .*pass safetensors.numpy.load_file\('two.safe"):
        jbn.linen.load_torch(like, "two.safetensors", TWO)
    with pytest.raises(TypeError, match=r"state\['model'\] is a mapping; .*pass state\['model'\]"):
        jbn.linen.load_torch(like, {"model": state, "epoch": np.array(3)}, TWO)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_resnets_in_nnx(name):
    """In Linen, tests/train/training/trained/test_pretrained.py has them."""
    resnets = json.loads((DATA / "torch_resnet.json").read_text())
    model = nnx.eval_shape(lambda: ResNet(name, 10, nnx.Rngs(0)))
    jbn.nnx.load_torch(model, weights(name), torchvision_names(model))
    model.eval()
    logits = nnx.jit(lambda model, x: model(x))(model, images(*resnets["input"]))
    assert_allclose(logits, resnets[name], rtol=0, atol=1e-5 * np.abs(resnets[name]).max())
