"""What a network gets of raw inputs."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.helpers.arrays import keras_arrays as arrays
from train.data import preprocessing

SHAPES = [(4, 5), (4, 5, 3), (3,)]  # grey images, images, vectors


def test_bytes_become_numbers_in_0_to_1_and_floating_point_is_left_as_it_is(given):
    for dtype, scale in (np.uint8, 255), (np.float32, 1):
        values = arrays(dtype=dtype)
        loaded = given(values)(validation=0)
        found = loaded.preprocessing(loaded.train.take(slice(None)).inputs)
        assert_array_equal(found[..., 0], np.float32(values["x_train"]) / np.float32(scale), strict=True)
        assert {(leaf.shape, leaf.dtype.name) for leaf in loaded.preprocessing} == {((), "float32")}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalizing_is_by_mean_and_standard_deviation_of_the_training_split_alone(given, monkeypatch, shape):
    values = arrays(n_train=200, shape=shape, dtype=np.float32 if shape == (3,) else np.uint8)
    if shape[-1] == 3:  # in two chunks
        monkeypatch.setattr(preprocessing, "CHUNK", 75 * 4 * int(np.prod(shape)))
    first = given(values)(validation=0.25, normalize=True)
    raw = first.train.take(slice(None)).inputs
    examples = raw.astype(np.float64)
    over = tuple(range(examples.ndim - 1))  # all but the channels of images, the features of vectors
    assert_allclose(first.preprocessing.mean, examples.mean(over), rtol=1e-6)
    assert_allclose(first.preprocessing.std, examples.std(over), rtol=1e-6)
    assert {leaf.dtype.name for leaf in first.preprocessing} == {"float32"}
    expected = (examples - examples.mean(over)) / examples.std(over)
    assert_allclose(first.preprocessing(raw), expected, atol=1e-5)
    values["x_test"][:] = values["x_train"][first.validation.rows] = 99
    for one, other in zip(first.preprocessing, given(values)(validation=0.25, normalize=True).preprocessing):
        assert_array_equal(one, other, strict=True)


def test_constant_feature_becomes_0(given, monkeypatch):
    monkeypatch.setattr("train.data.preprocessing.CHUNK", 75 * 4 * 3)
    for constants in (0, 0.1), (-1e6, 1 / 3):
        for n in (150, 75 * 20 + 30):
            values = arrays(n_train=n, shape=(3,), dtype=np.float32)
            values["x_train"][:, :2] = constants
            preprocessing = given(values)(normalize=True, validation=0).preprocessing
            assert preprocessing.std[:2].tolist() == [1, 1] and preprocessing.std[2] > 50, constants
            found = preprocessing(values["x_train"])[:, :2]
            assert (np.abs(found) <= 1e-6 * np.abs(constants)).all(), constants


def test_inputs_too_large_to_normalize_are_named(given, refusal):
    values = arrays(shape=(3,), dtype=np.float32)
    values["x_train"] *= np.float32(1e30)
    sentence = refusal(given(values), normalize=True)
    assert sentence.startswith("data.normalize: expected inputs whose standard deviation float32 can hold, ")


def test_each_feature_is_multiplied_with_a_number_of_its_own(given):
    # NumPy's generator gives these wherever it runs.
    assert_allclose(np.random.RandomState(0).uniform(size=3), [0.5488135, 0.71518937, 0.60276338], rtol=1e-7)
    for shape, dtype, normalize in [
        *(((4, 5), np.uint8, True), ((4, 5, 3), np.float32, False), ((4, 5, 3), np.uint8, False)),
        *(((3,), np.float32, True), ((3,), np.float32, False)),
    ]:
        load = given(arrays(n_train=150, shape=shape, dtype=dtype))
        plain = load(normalize=normalize, validation=0)
        scaled = load(normalize=normalize, validation=0, feature_scales=(0.01, 100.0))
        inputs = plain.train.take(slice(None)).inputs
        scales = 0.01 * 10_000 ** np.random.RandomState(0).uniform(size=inputs.shape[1:])
        found = scaled.preprocessing(inputs)
        assert_allclose(found, plain.preprocessing(inputs) * scales, rtol=1e-5, err_msg=str(shape))
        assert {leaf.dtype.name for leaf in (found, *scaled.preprocessing)} == {"float32"}


def test_feature_scales_are_log_uniform_in_their_limits_and_the_same_for_every_job(given):
    load = given(arrays(shape=(4096,), dtype=np.float32))
    scales = lambda **options: 1 / load(**options).preprocessing.std
    usual = scales(feature_scales=(0.5, 8.0))
    shares = np.sort(np.log2(usual) + 1) / 4
    assert -1e-6 <= shares[0] < 0.002 and 0.998 < shares[-1] <= 1 + 1e-6
    assert_allclose(shares, np.linspace(0, 1, 4096), atol=0.03)
    assert_array_equal(scales(feature_scales=(0.5, 8.0), validation=0.5), usual)
    assert_allclose(scales(feature_scales=(5.0, 80.0)), 10 * usual, rtol=1e-5)
    assert_allclose(scales(feature_scales=(2.0, 2.0)), np.full(4096, 2), rtol=1e-6)


def test_preprocessing_is_the_same_inside_jit(given):
    jitted = jax.jit(lambda preprocessing, inputs: preprocessing(inputs))
    load = given(arrays(shape=(4, 4, 3)))
    for options in ({}, {"normalize": True}, {"feature_scales": (0.1, 10.0)}):
        loaded = load(**options)
        inputs, _ = loaded.test.take(slice(None))
        inside = jitted(loaded.preprocessing, inputs)
        assert_allclose(inside, loaded.preprocessing(inputs), rtol=1e-5, atol=1e-5, err_msg=str(options))
        assert inside.dtype == np.float32
