"""Epsilon down to the smallest normal number: gradients are finite wherever the true ones are."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn import inspection
from tests.helpers import reference
from tests.helpers.flax_layers import NNX, Linen
from tests.helpers.layers import layer, random

TINY = float(np.finfo(np.float32).tiny)
NOISE, TARGET = (np.random.RandomState(seed).normal(0, 1, (8, 1)) for seed in (0, 1))
CONSTANT = np.full((8, 1), 3, np.float32)


def exact(x, epsilon):
    """Output and gradient of sum(y * target), in float64."""
    return reference.batch_norm(x, epsilon=epsilon), reference.gradients(x, TARGET, epsilon=epsilon)[0]


def of_target(f):
    """Returns `f(x)`'s gradient of sum(y * target), and y."""

    def loss(x):
        y = f(x)
        return jnp.sum(y * TARGET.astype(y.dtype)), y

    return jax.jit(jax.grad(loss, has_aux=True))


def pure(x, epsilon, mask=None):
    params, running = jbn.Params(jnp.ones(1), jnp.zeros(1)), jbn.init(1)[1]
    return jbn.batch_norm(x, params, running, train=True, epsilon=epsilon, mask=mask)[0]


def composed(x, epsilon):
    return jbn.normalize(x, jbn.moments(x), epsilon=epsilon)


def module(flavour):
    def f(x, epsilon):
        driver = flavour(flavour.ours, np.zeros((2, 1), np.float32), epsilon=epsilon)
        return driver.call(driver.params, driver.stats, x, True)[0]

    return f


@pytest.mark.parametrize(
    "epsilon, mask",
    [
        (TINY, None),
        (1e-20, None),
        *(pytest.param(e, None, marks=pytest.mark.slow) for e in (1e-37, 1e-12, 1e-5)),
        *(pytest.param(e, np.ones((8, 1), bool), marks=pytest.mark.slow) for e in (TINY, 1e-12)),
    ],
)
def test_values_and_gradients_are_those_of_float64(epsilon, mask):
    f = of_target(partial(pure, epsilon=epsilon, mask=mask))
    for sds in 0.0, 0.5, 1.0, 1e3:
        x = np.float32(NOISE * sds * np.sqrt(epsilon))
        dx, y = f(x)
        assert np.isfinite(dx).all() and np.isfinite(y).all(), sds
        if epsilon < 1e-35 and 0 < sds < 10:
            continue  # finite, but the squares that it is to be exact to are below the normal numbers
        expected_y, expected_dx = exact(x, epsilon)
        assert_allclose(y, expected_y, rtol=1e-4, atol=1e-5, err_msg=sds)
        assert_allclose(dx, expected_dx, rtol=1e-3, atol=1e-4 * np.abs(expected_dx).max(), err_msg=sds)


@pytest.mark.parametrize(
    "f, epsilon",
    [(composed, TINY), (composed, 1e-20), *((module(flavour), TINY) for flavour in (Linen, NNX))],
    ids=["composed, smallest", "composed", "Linen", "NNX"],
)
def test_gradients_of_a_constant_are_finite_everywhere(f, epsilon):
    dx, _ = of_target(partial(f, epsilon=epsilon))(CONSTANT)
    assert_allclose(dx, exact(CONSTANT, epsilon)[1], rtol=1e-4)


@pytest.mark.parametrize("f", [pytest.param(pure, marks=pytest.mark.slow), composed])
def test_further_derivatives_of_a_constant_are_finite(f):
    loss = lambda x: jnp.sum(f(x, 1e-20) * np.float32(TARGET[:4]))
    # The layer is odd in x - mean, so that its second derivative at a constant is 0.
    assert_array_equal(jax.jit(jax.hessian(loss))(CONSTANT[:4]), 0)


def test_float64_takes_its_own_smallest_number(x64):
    epsilon = float(np.finfo(np.float64).tiny)
    x = np.float64(CONSTANT)
    dx, _ = of_target(partial(pure, epsilon=epsilon))(x)
    assert_allclose(dx, exact(x, epsilon)[1], rtol=1e-10)
    with pytest.raises(ValueError, match="epsilon=1e-308; expected .* 0 in float64 arithmetic"):
        pure(x, 1e-308)


def test_epsilon_that_float32_takes_for_something_else_is_refused():
    x, (params, running) = np.ones((8, 3), np.float32), layer(3)
    calls = [
        lambda epsilon: jbn.batch_norm(x, params, running, train=True, epsilon=epsilon),
        lambda epsilon: jbn.batch_norm(x, params, running, train=False, epsilon=epsilon),
        lambda epsilon: jbn.normalize(x, running, epsilon=epsilon),
        lambda epsilon: inspection.identity_params(running, epsilon=epsilon),
        *(lambda epsilon, f=f: f(f.ours, x, epsilon=epsilon).train(x) for f in (Linen, NNX)),
    ]
    for epsilon in (1e-38, 1e-45, 5e-324, 0.0, -1e-5, float("inf"), float("nan"), 1e39):
        named = rf"epsilon={re.escape(str(epsilon))}; expected a number from 1.1754944e-38"
        # The modules give it to the functions.
        for call in calls if epsilon in (1e-38, 0.0) else calls[:1]:
            with pytest.raises(ValueError, match=named):
                call(epsilon)


def test_epsilon_may_be_of_any_type_of_number_but_is_not_traced(x64):
    x, (params, running) = random((7, 3)), layer(3)
    f = lambda epsilon, train: jbn.batch_norm(x, params, running, train=train, epsilon=epsilon)[0]
    for train in True, False:
        outputs = [
            jax.jit(lambda e=e, train=train: f(e, train))() for e in (np.float64(0.7), jnp.float64(0.7))
        ]
        mean, var = reference.moments(x)[:2] if train else running[:2]
        for y in outputs:
            assert y.dtype == jnp.float32
            assert_allclose(y, reference.normalize(x, mean, var, *params, epsilon=0.7), atol=5e-6)
    with pytest.raises(TypeError, match="epsilon=.*; expected a number > 0 that is not traced"):
        jax.eval_shape(lambda epsilon: f(epsilon, True), 1e-5)
