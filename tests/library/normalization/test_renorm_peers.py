"""Batch renormalization gives the numbers of Keras and sbx where theirs are those of the paper."""

from functools import partial

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jbn
from tests.helpers import reference
from tests.helpers.layers import random

X = np.asarray(random((8, 3)))
MEAN, VAR = np.float32([2.5, 6, -4]), np.float32([4.5, 0.1, 900])
ONES, ZEROS = np.ones(3, np.float32), np.zeros(3, np.float32)


@partial(jax.jit, static_argnames="epsilon")
def ours(x, mean, var, epsilon=1e-3):
    running = jbn.Moments(mean, var)
    return jbn.batch_renorm(x, jbn.Params(ONES, ZEROS), running, train=True, epsilon=epsilon)


def as_sbx(x, mean, var, epsilon=1e-3):
    """Normalizes with moments that are corrected, where sd_B is sqrt(var_B) for d."""
    of_batch, of_batch_var, _ = reference.moments(x)
    r, d = reference.corrections(x, mean, var, 3, 5, epsilon=epsilon)
    used = of_batch - d * np.sqrt(of_batch_var) / r, of_batch_var / r**2
    return reference.normalize(x, *used, epsilon=epsilon)


def test_those_of_sbx_where_variances_are_far_from_epsilon():
    for epsilon, near, close in (1e-10, 1, True), (1e-3, 1, False), (1e-3, 0.02, False):
        x, mean, var = X * np.float32(near), MEAN * np.float32(near), VAR * np.float32(near**2)
        y, _ = ours(x, mean, var, epsilon=epsilon)
        wanted = reference.batch_renorm(x, mean, var, 3, 5, ONES, ZEROS, epsilon=epsilon)
        assert_allclose(y, wanted, atol=1e-5)
        assert (np.abs(as_sbx(x, mean, var, epsilon) - y).max() < 1e-5) == close


@pytest.mark.slow
def test_those_of_keras(standard_promotion, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # where it writes its configuration when imported
    keras = pytest.importorskip("keras", minversion="3.15", reason="Keras 3.15 has renorm; pip install keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    limits = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}
    layer = keras.layers.BatchNormalization(renorm=True, renorm_clipping=limits)
    layer.build(X.shape)
    for mean, sd in ((layer.renorm_mean, layer.renorm_stddev), (layer.moving_mean, layer.moving_stddev)):
        mean.assign(MEAN)
        sd.assign(np.sqrt(VAR + 1e-3))
    state = [
        [variable.value for variable in part]
        for part in (layer.trainable_variables, layer.non_trainable_variables)
    ]

    def output(f):
        value = lambda x: (f(x).sum(0) @ np.float32([1, 2, 3]) + (f(x) ** 3).sum(), f(x))
        return jax.jit(jax.grad(value, has_aux=True))(X)

    of_keras = output(lambda x: layer.stateless_call(*state, x, training=True)[0])
    for actual, wanted in zip(output(lambda x: ours(x, MEAN, VAR)[0]), of_keras):
        assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)
    names = [variable.name for variable in layer.non_trainable_variables]
    new = dict(zip(names, layer.stateless_call(*state, X, training=True)[1]))
    assert_allclose(new["moving_mean"], ours(X, MEAN, VAR)[1].mean, rtol=1e-6)
    # It averages standard deviations, and so variances are smaller.
    assert np.all(new["moving_variance"] < ours(X, MEAN, VAR)[1].var)
