"""Epsilon down to the smallest normal number: gradients are finite wherever the true ones are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import quick_jit
from flax_layers import NNX, Linen
from layers import layer
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn import inspection

TINY = float(np.finfo(np.float32).tiny)
EPSILONS = [TINY, 1e-37, 1e-30, 1e-20, 1e-13, 1e-12, 1e-11, 1e-5]
NOISE = np.random.RandomState(0).normal(0, 1, (8, 1))
TARGET = np.random.RandomState(1).normal(0, 1, (8, 1))


def exact(x, epsilon):
    """Output and gradient of sum(y * target), in float64."""
    c, var = x - x.mean(0), x.var(0)
    sd = np.sqrt(var + epsilon)
    xhat = c / sd
    return xhat, (TARGET - TARGET.mean(0) - xhat * (xhat * TARGET).mean(0)) / sd


def pure(x, epsilon):
    return jbn.batch_norm(x, *layer_of_one(), train=True, epsilon=epsilon)[0]


def layer_of_one():
    return jbn.Params(jnp.ones(1), jnp.zeros(1)), jbn.init(1)[1]


def composed(x, epsilon):
    return jbn.normalize(x, jbn.moments(x), epsilon=epsilon)


def module(flavour):
    def f(x, epsilon):
        driver = flavour(flavour.ours, jnp.zeros((2, 1)), epsilon=epsilon)
        return driver.call(driver.params, driver.stats, x, True)[0]

    return f


@pytest.mark.parametrize("sds", [0.0, 0.5, 1.0, 1e3])
@pytest.mark.parametrize("mask", [None, np.ones((8, 1), bool)])
def test_values_and_gradients_are_those_of_float64(sds, mask):
    for epsilon in EPSILONS:
        x = np.float32(NOISE * sds * np.sqrt(epsilon))

        def loss(x, epsilon=epsilon):
            y = jbn.batch_norm(x, *layer_of_one(), train=True, epsilon=epsilon, mask=mask)[0]
            return jnp.sum(y * np.float32(TARGET)), y

        dx, y = quick_jit(jax.grad(loss, has_aux=True))(x)
        assert np.isfinite(dx).all() and np.isfinite(y).all()
        if epsilon < 1e-35 and 0 < sds < 10:
            continue  # finite, but the squares that it is to be exact to are below the normal numbers
        expected_y, expected_dx = exact(np.float64(x), epsilon)
        assert_allclose(y, expected_y, rtol=1e-4, atol=1e-5, err_msg=epsilon)
        assert_allclose(dx, expected_dx, rtol=1e-3, atol=1e-4 * np.abs(expected_dx).max(), err_msg=epsilon)


@pytest.mark.parametrize("f", [composed, module(Linen), module(NNX)], ids=["composed", "Linen", "NNX"])
def test_gradients_of_a_constant_are_finite_everywhere(f):
    x = jnp.full((8, 1), 3.0)
    for epsilon in (TINY, 1e-20):
        dx = jax.grad(lambda x, epsilon=epsilon: jnp.sum(f(x, epsilon) * np.float32(TARGET)))(x)
        assert_allclose(dx, exact(np.full((8, 1), 3.0), epsilon)[1], rtol=1e-4)


def test_further_derivatives_of_a_constant_are_finite():
    x = jnp.full((4, 1), 3.0)
    for f in (pure, composed):
        loss = lambda x, f=f: jnp.sum(f(x, 1e-20) * np.float32(TARGET[:4]))
        # The layer is odd in x - mean, so that its second derivative at a constant is 0.
        assert_array_equal(quick_jit(jax.hessian(loss))(x), 0)


def test_float64_takes_its_own_smallest_number(x64):
    epsilon = float(np.finfo(np.float64).tiny)
    x = jnp.full((8, 1), 3.0)
    dx = jax.grad(lambda x: jnp.sum(pure(x, epsilon) * TARGET))(x)
    assert_allclose(dx, exact(np.full((8, 1), 3.0), epsilon)[1], rtol=1e-10)
    with pytest.raises(ValueError, match="epsilon=1e-308; expected .* 0 in float64 arithmetic"):
        pure(x, 1e-308)


@pytest.mark.parametrize("epsilon", [1e-38, 1e-45, 5e-324, 0.0, -1e-5, float("inf"), float("nan"), 1e39])
def test_epsilon_that_float32_takes_for_something_else_is_refused(epsilon):
    x, (params, running) = jnp.ones((8, 3)), layer(3)
    calls = [
        lambda: jbn.batch_norm(x, params, running, train=True, epsilon=epsilon),
        lambda: jbn.batch_norm(x, params, running, train=False, epsilon=epsilon),
        lambda: jbn.normalize(x, running, epsilon=epsilon),
        lambda: inspection.identity_params(running, epsilon=epsilon),
        *(
            lambda flavour=flavour: flavour(flavour.ours, x, epsilon=epsilon).train(x)
            for flavour in (Linen, NNX)
        ),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"epsilon={re.escape(str(epsilon))}; expected a number > 0, .*1.1754944e-38 at"
        ):
            call()
