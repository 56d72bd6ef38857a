"""Renderings of images, beside the same in NumPy, for bytes and for numbers from 0 to 1."""

from functools import partial

import jax
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from train.config import Data
from train.data import Dataset, Labels, Preprocessing, Split, check_renderings, render, render_mixed
from train.data.renderings import RENDERINGS

RNG = np.random.RandomState(0)
KEY = jax.random.key(0)
BYTES = RNG.randint(0, 256, (6, 10, 8, 1)).astype(np.uint8)
NUMBERS = RNG.uniform(size=(6, 8, 8, 1)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def every(names, images):
    return {name: render(name, KEY, images) for name in names}


def blurred(images):
    side, (_, height, width, _) = min(images.shape[1:3]), images.shape

    def weights(n):
        away = np.subtract.outer(np.arange(n), np.arange(n))
        found = np.exp(-0.5 * (away / (0.1 * side)) ** 2)
        return found / found.sum(1, keepdims=True)

    return np.einsum("ij,kl,njlc->nikc", weights(height), weights(width), images)


def test_each_rendering_is_what_it_says_in_the_images_own_range():
    for images, high in ((BYTES, 255), (NUMBERS, 1)):
        found = every(tuple(RENDERINGS), images)
        x = np.float64(images) / high
        expected = {"original": x, "inverted": 1 - x, "brightness": np.minimum(x + 0.3, 1)}
        for name, value in (expected | {"blur": blurred(x)}).items():
            assert found[name].dtype == images.dtype
            assert_allclose(np.float64(found[name]) / high, value, atol=0.51 / 255 if high > 1 else 1e-6)
        assert_array_equal(found["original"], images)


def test_noise_has_the_deviation_it_says_and_follows_from_key_and_place():
    middle = np.full((40, 8, 8, 1), 0.5, np.float32)
    noisy = np.asarray(render("noise", KEY, middle))
    inside = (noisy > 0) & (noisy < 1)  # of a Gaussian of deviation 0.3: 0.904 within 0.5
    assert abs(inside.mean() - 0.904) < 0.02 and abs(noisy.mean() - 0.5) < 0.02
    assert_array_equal(render("noise", KEY, middle[:3], np.array([7, 0, 39])), noisy[[7, 0, 39]])
    assert (noisy[0] != noisy[1]).any() and (render("noise", jax.random.key(1), middle) != noisy).any()


def test_batch_is_shown_in_equal_shares_and_its_domains_say_which():
    names = ("original", "inverted")
    images, domain = jax.jit(partial(render_mixed, names))(KEY, BYTES)
    assert sorted(np.asarray(domain)) == [0, 0, 0, 1, 1, 1]
    others = {tuple(np.asarray(render_mixed(names, jax.random.key(i), BYTES)[1])) for i in range(4)}
    assert len(others) > 1
    for image, given, which in zip(images, BYTES, domain):
        assert_array_equal(image, 255 - given if which else given)
    assert render_mixed((), KEY, BYTES) == (BYTES, None)


def test_what_cannot_be_rendered_is_refused(refusal):
    def dataset(inputs):
        split = Split(inputs, np.zeros(len(inputs), np.int32), np.arange(len(inputs)))
        preprocessing = Preprocessing(np.float32(0), np.float32(1))
        return Dataset(split, split, split, Labels((6,)), preprocessing, "made")

    names = Data(renderings=("blur",)).renderings
    check_renderings(names, dataset(BYTES)), check_renderings(names, dataset(NUMBERS))
    check_renderings((), dataset(NUMBERS[:, 0, 0]))
    assert refusal(check_renderings, names, dataset(NUMBERS[:, 0, :, 0])) == (
        "data.renderings = ['blur']: expected images, got vectors of length 8; leave them out."
    )
    assert "from 0 to 1, got numbers from" in refusal(check_renderings, names, dataset(3 * NUMBERS))
