"""Initial weights of every network: those of Flax and of He, or Gaussian ones of a given size."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from train.config import Model
from train.models import build
from train.models.initialization import HE, LECUN

IMAGES = np.zeros((1, 8, 8, 2), np.float32)
KEY = jax.random.key(3)
# The initializers of the convolutions and of the linear maps of each network, as they usually are.
USUAL = {
    "mlp": (set(), {LECUN}),
    "cnn": ({LECUN}, {LECUN}),
    "resnet20": ({HE}, {LECUN}),
    "resnet18": ({HE}, {LECUN}),
}


def draw(f, *arguments):
    return jax.jit(f)(KEY, *arguments)


def initializers(name, **options):
    """Return those of the convolutions and of the linear maps that a network has."""
    found = {nn.Conv: set(), nn.Dense: set()}

    def remember(call, args, kwargs, context):
        if type(context.module) in found:
            found[type(context.module)].add(context.module.kernel_init)
        return call(*args, **kwargs)

    with nn.intercept_methods(remember):
        jax.eval_shape(build(Model(name=name, **options), IMAGES.shape[1:], classes=10).init, KEY, IMAGES)
    return tuple(found.values())


def assert_gaussian(kernel, std, name):
    # The standard deviation of a sample is off by 1 / sqrt(2 n) of itself, and seldom by 4 times that.
    assert_allclose(np.std(kernel), std, rtol=4 / np.sqrt(2 * kernel.size), err_msg=name)
    assert_allclose(np.mean(kernel), 0, atol=4 * std / np.sqrt(kernel.size), err_msg=name)
    # Not cut off at two standard deviations, as the usual ones are.
    assert_allclose((np.abs(kernel) > 2 * std).mean(), 0.0455, rtol=0.2, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", USUAL)
def test_every_layer_starts_with_the_usual_weights_or_with_those_that_kernel_std_asks_for(name):
    assert initializers(name) == USUAL[name]
    for every, usual in zip(initializers(name, kernel_std=3.0), USUAL[name]):
        assert bool(every) == bool(usual) and not every & usual
        for initializer in every:
            assert_gaussian(initializer(KEY, (96, 64)), 3, name)


def test_usual_weights_are_those_that_flax_draws_or_have_the_variance_of_he():
    ours, theirs = draw(lambda key: [LECUN(key, (64, 48)), nn.linear.default_kernel_init(key, (64, 48))])
    assert_array_equal(ours, theirs)
    he = draw(partial(HE, shape=(3, 3, 32, 64)))
    assert_allclose(np.var(he), 2 / (9 * 64), rtol=0.05)


def test_weights_in_nnx_are_those_that_flax_draws_from_the_same_stream_or_that_kernel_std_asks_for():
    def drawn(key):
        given = [
            build(Model("nnx_mlp", widths=(64,), kernel_std=std), IMAGES.shape[1:], classes=10).init(
                key, IMAGES
            )
            for std in (0.0, 3.0)
        ]
        rngs = nnx.Rngs(key)
        hidden = nnx.Linear(128, 64, use_bias=False, rngs=rngs)
        nnx.BatchNorm(64, rngs=rngs)  # takes keys of the stream too
        head = nnx.Linear(64, 10, rngs=rngs)
        return [params for params, _ in given], (hidden.kernel[...], head.kernel[...])

    kernels = lambda params: (params["hidden"][0]["linear"]["kernel"], params["head"]["kernel"])
    (usual, gaussian), expected = draw(drawn)
    jax.tree.map(assert_array_equal, kernels(usual), expected)
    assert_gaussian(np.concatenate([np.ravel(kernel) for kernel in kernels(gaussian)]), 3, "nnx_mlp")
    for params in usual, gaussian:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if path[-1].key != "kernel":
                assert_array_equal(leaf, 1 if path[-1].key == "scale" else 0)
