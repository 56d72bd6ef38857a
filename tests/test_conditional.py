"""Conditional normalization: scale and bias of their own for each example, or each position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import quick_jit
from layers import random
from numpy.testing import assert_allclose, assert_array_equal

import jbn

SHAPE = (6, 4, 3)
# of scale, of bias, and the feature axis
CASES = {
    "per example": ((6, 1, 3), (6, 1, 3), -1),
    "per position": ((6, 4, 3), (6, 4, 1), -1),
    "scale per example, bias learnt": ((6, 1, 3), (3,), -1),
    "scale learnt, bias per example": ((3,), (6, 1, 3), -1),
    "scale alone": ((6, 1, 3), None, -1),
    "channels first": ((6, 4, 1), (6, 4, 1), 1),
}


def parameters(case, dtype="float32"):
    scale, bias, axis = CASES[case]
    make = lambda shape, seed: None if shape is None else random(shape, dtype, seed=seed)
    return jbn.Params(make(scale, 1), make(bias, 2)), axis


def affine(y, params):
    scale = (
        1
        if params.scale is None
        else params.scale.reshape((1,) * (3 - params.scale.ndim) + params.scale.shape)
    )
    bias = (
        0 if params.bias is None else params.bias.reshape((1,) * (3 - params.bias.ndim) + params.bias.shape)
    )
    return y * scale + bias


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("train", [True, False, "traced"])
def test_values_are_those_of_float64(case, train):
    x, (params, axis) = random(SHAPE), parameters(case)
    running = jbn.Moments(*(random(SHAPE[axis], mean=4, sd=0.5, seed=s) for s in (3, 4)), jnp.float32(1))
    call = lambda train: jbn.batch_norm(x, params, running, train=train, axis=axis, update=jbn.ema(0.0))
    y, new = jax.jit(call)(jnp.array(True)) if train == "traced" else call(train)
    params = jax.tree.map(np.float64, params)
    if train:
        assert_allclose(y, affine(reference.batch_norm(x, axis=axis), params), rtol=1e-4, atol=1e-4)
        assert_allclose(new.var, reference.moments(x, axis)[1], rtol=1e-5)
    else:
        expected = affine(reference.normalize(x, running.mean, running.var, axis=axis), params)
        assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        assert_allclose(jbn.normalize(x, running, jax.tree.map(jnp.float32, params), axis=axis), y, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_plain_formula(x64, case):
    x, (params, axis) = random(SHAPE, "float64"), parameters(case, "float64")
    running = jbn.init(SHAPE[axis], dtype=jnp.float64)[1]
    others = tuple(a for a in range(3) if a != axis % 3)

    def ours(x, params):
        return jbn.batch_norm(x, params, running, train=True, axis=axis)[0]

    def plain(x, params):
        mean, var = jnp.mean(x, others, keepdims=True), jnp.var(x, others, keepdims=True)
        return affine((x - mean) / jnp.sqrt(var + 1e-5), params)

    actual, expected = (
        quick_jit(jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), (0, 1)))(x, params)
        for f in (ours, plain)
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-9, atol=1e-11), actual, expected)


def test_parts_of_a_batch_are_normalized_each_before_the_affine_map():
    x, (params, _) = random(SHAPE), parameters("per example")
    y, _ = jbn.batch_norm(x, params, jbn.init(3)[1], train=True, virtual_batch_size=2)
    normalized = np.concatenate([reference.batch_norm(part) for part in np.split(x, 3)])
    assert_allclose(y, affine(normalized, jax.tree.map(np.float64, params)), rtol=1e-4, atol=1e-4)


def test_result_is_rounded_once():
    x, (params, _) = random(SHAPE, "bfloat16"), parameters("per example", "bfloat16")
    y, _ = jbn.batch_norm(x, params, jbn.init(3)[1], train=True)
    expected = affine(reference.batch_norm(x), jax.tree.map(np.float64, params))
    assert y.dtype == jnp.bfloat16
    assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-4)


def test_wider_parameters_widen_the_arithmetic(x64):
    x, (params, _) = random(SHAPE), parameters("per example", "float64")
    y, _ = jbn.batch_norm(x, params, jbn.init(3)[1], train=True, dtype=jnp.float64)
    expected = affine(reference.batch_norm(x), params)
    assert_allclose(y, expected, rtol=1e-6, atol=1e-6)  # the moments of x are float32
    mean, var, _ = reference.moments(x)
    y = jbn.normalize(x, jbn.Moments(mean, var, jnp.ones(3)), params, dtype=jnp.float64)
    assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_equal_rows_of_parameters_are_the_learnt_ones():
    x, params = random(SHAPE), jbn.Params(random(3, seed=1), random(3, seed=2))
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (6, 1, 3)), params)
    y, z = (jbn.batch_norm(x, p, jbn.init(3)[1], train=True)[0] for p in (params, rows))
    assert_allclose(y, z, rtol=1e-5, atol=1e-5)


def test_vmap_over_examples_has_parameters_of_each():
    x, (params, _) = random((6, 3)), parameters("per example")
    params = jax.tree.map(lambda leaf: leaf[:, 0], params)
    running = jbn.init(3)[1]
    per_example = jax.vmap(
        lambda x, params: jbn.batch_norm(x, params, running, train=True, axis_name="batch")[0],
        axis_name="batch",
    )
    y, _ = jbn.batch_norm(x, params, running, train=True)
    assert_allclose(quick_jit(per_example)(x, params), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3), (2,), (6, 2, 3), (1, 6, 4, 3)])
def test_other_shapes_are_refused_with_the_two_that_are_wanted(shape):
    x, running = random(SHAPE), jbn.init(3)[1]
    params = jbn.Params(jnp.ones(shape), None)
    for call in (
        lambda: jbn.batch_norm(x, params, running, train=True),
        lambda: jbn.normalize(x, running, params),
    ):
        with pytest.raises(
            ValueError, match=r"params.scale has shape .* features of shape \(3,\) .* all 3 axes of x"
        ):
            call()
    assert_array_equal(
        jbn.normalize(x, running), jbn.normalize(x, running, jbn.Params(jnp.ones((1, 1, 1)), None))
    )
