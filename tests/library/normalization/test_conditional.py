"""Conditional normalization: scale and bias of their own for each example, or each position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from tests.helpers.layers import random

SHAPE = (6, 4, 3)
# of scale, of bias, and the feature axis
CASES = {
    "per example": ((6, 1, 3), (6, 1, 3), -1),
    "per position": ((6, 4, 3), (6, 4, 1), -1),
    "scale per example, bias learnt": ((6, 1, 3), (3,), -1),
    "scale learnt, bias per example": ((3,), (6, 1, 3), -1),
    "scale alone": ((6, 1, 3), None, -1),
    "bias alone": (None, (6, 1, 3), -1),
    "channels first": ((6, 4, 1), (6, 4, 1), 1),
}


def parameters(case, dtype="float32"):
    scale, bias, axis = CASES[case]
    make = lambda shape, seed: None if shape is None else random(shape, dtype, seed=seed)
    return jbn.Params(make(scale, 1), make(bias, 2)), axis


def affine(y, params):
    """With NumPy's broadcasting: learnt parameters are of the last axis."""
    scale, bias = (value if leaf is None else reference.wide(leaf) for value, leaf in zip((1, 0), params))
    return y * scale + bias


def reduced(gradient, leaf):
    """Adds up what broadcasting repeated."""
    if leaf is None:
        return None
    gradient = gradient.sum(tuple(range(gradient.ndim - leaf.ndim)))
    return gradient.sum(tuple(a for a, size in enumerate(leaf.shape) if size == 1), keepdims=True)


@pytest.mark.parametrize(
    "case", ["per example", *(pytest.param(case, marks=pytest.mark.slow) for case in list(CASES)[1:])]
)
def test_values_and_gradients_are_those_of_float64(case):
    x, (params, axis) = random(SHAPE), parameters(case)
    running = jbn.Moments(*(random(SHAPE[axis], mean=4, sd=0.5, seed=s) for s in (3, 4)), jnp.float32(1))
    target = np.asarray(random(SHAPE, mean=0, seed=5))

    @jax.jit
    def gradients(x, params, train):
        def loss(x, params):
            y, new = jbn.batch_norm(x, params, running, train=train, axis=axis, update=jbn.ema(0.0))
            return jnp.sum(y * target), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    (dx, dparams), (y, new) = gradients(x, params, True)
    normalized = reference.batch_norm(x, axis=axis)
    assert_allclose(y, affine(normalized, params), rtol=1e-4, atol=1e-4)
    assert_allclose(new.var, reference.moments(x, axis)[1], rtol=1e-5)
    back = target * (1 if params.scale is None else np.float64(params.scale))
    assert_allclose(dx, reference.gradients(x, back, axis=axis)[0], rtol=1e-4, atol=1e-4)
    for actual, gradient, leaf in zip(dparams, (target * normalized, np.float64(target)), params):
        if leaf is not None:
            assert_allclose(actual, reduced(gradient, leaf), rtol=1e-4, atol=1e-4)

    _, (y, _) = gradients(x, params, False)
    normalized = reference.normalize(x, running.mean, running.var, axis=axis)
    assert_allclose(y, affine(normalized, params), rtol=1e-4, atol=1e-4)


def test_the_mode_may_be_known_and_moments_given():
    x, (params, _) = random(SHAPE), parameters("per example")
    mean, var, _ = reference.moments(x)
    running = jbn.Moments(*map(np.float32, (mean + 1, var * 2)), 1.0)

    @jax.jit
    def outputs(x, params):
        trained, inferred = (jbn.batch_norm(x, params, running, train=train)[0] for train in (True, False))
        return trained, inferred, jbn.normalize(x, running, params)

    trained, *inferred = outputs(x, params)
    assert_allclose(trained, affine(reference.batch_norm(x), params), rtol=1e-4, atol=1e-4)
    for y in inferred:
        expected = affine(reference.normalize(x, running.mean, running.var), params)
        assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_parts_of_a_batch_are_normalized_each_before_the_affine_map():
    x, (params, _) = random(SHAPE), parameters("per example")
    f = jax.jit(lambda x, p: jbn.batch_norm(x, p, jbn.init(3)[1], train=True, virtual_batch_size=2)[0])
    normalized = np.concatenate([reference.batch_norm(part) for part in np.split(np.asarray(x), 3)])
    assert_allclose(f(x, params), affine(normalized, params), rtol=1e-4, atol=1e-4)


def test_result_is_rounded_once():
    x, (params, _) = random(SHAPE, "bfloat16"), parameters("per example", "bfloat16")
    y = jax.jit(lambda x, params: jbn.batch_norm(x, params, jbn.init(3)[1], train=True)[0])(x, params)
    assert y.dtype == jnp.bfloat16
    assert_allclose(np.float64(y), affine(reference.batch_norm(x), params), rtol=2**-8, atol=1e-4)


def test_wider_parameters_widen_the_arithmetic(x64):
    x, (params, _) = random(SHAPE), parameters("per example", "float64")
    mean, var, _ = reference.moments(x)

    @jax.jit
    def outputs(x, params):
        y, _ = jbn.batch_norm(x, params, jbn.init(3)[1], train=True, dtype=jnp.float64)
        return y, jbn.normalize(x, jbn.Moments(mean, var, np.ones(3)), params, dtype=jnp.float64)

    expected = affine(reference.batch_norm(x), params)
    by_its_own, by_given = outputs(x, params)
    assert_allclose(by_its_own, expected, rtol=1e-6, atol=1e-6)  # the moments of x are float32
    assert_allclose(by_given, expected, rtol=1e-12, atol=1e-12)


def test_vmap_over_examples_has_parameters_of_each():
    x, (params, _) = random((6, 3)), parameters("per example")
    params = jax.tree.map(lambda leaf: leaf[:, 0], params)
    running = jbn.init(3)[1]
    f = lambda x, params: jbn.batch_norm(x, params, running, train=True, axis_name="batch")[0]
    y = jax.jit(jax.vmap(f, axis_name="batch"))(x, params)
    assert_allclose(y, affine(reference.batch_norm(x), params), rtol=1e-5, atol=1e-5)


def test_other_shapes_are_refused_with_the_two_that_are_wanted():
    x, running = random(SHAPE), jbn.init(3)[1]
    fits = r"params.scale has shape .* expected \(3,\), .* all 3 axes of x"
    for shape in (6, 3), (4, 3), (2,), (6, 2, 3), (1, 6, 4, 3):
        params = jbn.Params(np.ones(shape, np.float32), None)
        with pytest.raises(ValueError, match=fits):
            jbn.batch_norm(x, params, running, train=True)
        with pytest.raises(ValueError, match=fits):
            jbn.normalize(x, running, params)
    normalize = jax.jit(lambda scale: jbn.normalize(x, running, jbn.Params(scale, None)))
    assert_array_equal(normalize(None), normalize(np.ones((1, 1, 1), np.float32)))
