"""`jbn.batch_norm`, `jbn.normalize` and `jbn.init`: values, dtypes and masks, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from tests.helpers.layers import MASKS, layer, random

TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2, "float64": 1e-13, "complex64": 1e-5}


def test_worked_example_gives_0_and_2_with_scale_and_bias_1():
    # On paper's numbers, and not compiled.
    x, ones = jnp.array([[0.23, 1.26, -2.41], [0.56, 0.75, 1.00]]), jnp.ones(3)
    y, _ = jbn.batch_norm(x, jbn.Params(ones, ones), jbn.init(3)[1], train=True)
    assert_allclose(y, [[0, 2, 0], [2, 0, 2]], atol=4e-4)  # up to epsilon over the variance, 1e-5 / 0.027
    exact = 1 + np.array([[-1, 1, -1], [1, -1, 1]]) / np.sqrt(
        1 + 1e-5 / np.array([0.027225, 0.065025, 2.907025])
    )
    assert_allclose(y, exact, atol=2e-6)


@pytest.mark.parametrize(
    "dtype, axis, mask",
    [
        ("float32", -1, "no mask"),
        ("float32", (1, 3), "rows"),
        *(pytest.param("float32", *case, marks=pytest.mark.slow) for case in [(-1, "rows"), (1, "weights")]),
        ("bfloat16", -1, "rows"),
        *(pytest.param(dtype, -1, "rows", marks=pytest.mark.slow) for dtype in ("float64", "complex64")),
    ],
)
def test_training_and_inference_are_those_of_float64(dtype, axis, mask):
    with jax.enable_x64(dtype == "float64"):
        x, rng = random((6, 4, 5, 3), dtype), np.random.RandomState(3)
        mask = {
            "no mask": None,
            "rows": rng.rand(6, 1, 1, 1) < 0.6,
            "weights": rng.rand(6, 4, 5, 3).astype(np.float32),
        }[mask]
        params, running = layer(tuple(x.shape[a] for a in np.atleast_1d(axis)), dtype)

        @jax.jit
        def step_and_inference(x, params, running):
            options = {"axis": axis, "mask": mask, "update": jbn.ema(0.75)}
            y, new = jbn.batch_norm(x, params, running, train=True, **options)
            return y, new, *jbn.batch_norm(x, params, new, train=False, **options)

        y, new, z, same = step_and_inference(x, params, running)
        assert_allclose(y, reference.batch_norm(x, *params, axis, mask=mask), atol=20 * TOLERANCE[dtype])
        mean, var, _ = reference.moments(x, axis, mask)
        tolerance = TOLERANCE["float32" if dtype == "bfloat16" else dtype]
        assert_allclose(new.mean, 0.25 * mean, rtol=tolerance, atol=tolerance)
        assert_allclose(new.var, 0.75 + 0.25 * var, rtol=tolerance)
        expected = reference.normalize(x, new.mean, new.var, *params, axis)
        assert_allclose(z, expected, atol=20 * TOLERANCE[dtype])
        jax.tree.map(assert_array_equal, same, new)
        assert y.dtype == z.dtype == x.dtype
        assert [leaf.dtype for leaf in new] == [leaf.dtype for leaf in running]


def test_scale_and_bias_are_optional():
    x, running = random((7, 3)), jbn.init(3)[1]
    scale = jbn.Params(np.full(3, 2, np.float32), None)
    outputs = jax.jit(
        lambda x: [
            jbn.batch_norm(x, params, running, train=True)[0]
            for params in (None, jbn.Params(None, None), scale)
        ]
    )(x)
    for y, factor in zip(outputs, (1, 1, 2)):
        assert_allclose(y, reference.batch_norm(x) * factor, atol=5e-6)


def test_init_makes_the_identity_map_and_empty_moments():
    for features, shape in (3, (3,)), ((3, 2), (3, 2)), ((), ()):
        params, running = jbn.init(features, dtype=jnp.bfloat16)
        dtypes = [jnp.bfloat16] * 2 + [jnp.float32] * 3
        for leaf, value, dtype in zip((*params, *running), (1, 0, 0, 1, 0), dtypes):
            assert_array_equal(leaf, np.full(shape, value))
            assert leaf.dtype == dtype
    assert jbn.init(3, use_scale=False, use_bias=False)[0] == jbn.Params(None, None)


def test_output_dtype_may_be_chosen():
    x, (params, running) = jax.ShapeDtypeStruct((7, 3), jnp.float16), layer(3)
    for dtype in "float32", "bfloat16":
        normalized = lambda x, dtype=dtype: [
            jbn.normalize(x, running, params, dtype=dtype),
            *(jbn.batch_norm(x, params, running, train=train, dtype=dtype)[0] for train in (True, False)),
        ]
        assert [y.dtype for y in jax.eval_shape(normalized, x)] == [dtype] * 3


def test_low_precision_parameters_and_input_are_computed_in_float32():
    x, (params, running) = random((512, 3), "bfloat16", mean=20.0), layer(3, "bfloat16")
    f = lambda x, p: jbn.batch_norm(x, p, running, train=True, update=jbn.ema(0.0), dtype=jnp.float32)
    y, new = jax.jit(f)(x, params)
    assert_allclose(y, reference.batch_norm(x, *params), atol=2e-5)
    assert_allclose(new.var, reference.moments(x)[1], rtol=1e-5)


def test_wider_moments_and_parameters_widen_the_arithmetic(x64):
    x, (params, running) = random((7, 3)), layer(3, "float64")
    running = running._replace(mean=running.mean + np.pi, var=running.var * np.e)
    y = jax.jit(lambda x, params: jbn.normalize(x, running, params, dtype=jnp.float64))(x, params)
    assert_allclose(y, reference.normalize(x, running.mean, running.var, *params), rtol=1e-13)
    loss = lambda p: jnp.sum(jnp.sin(jbn.batch_norm(x, p, jbn.init(3)[1], train=True)[0]))
    assert [leaf.dtype for leaf in jax.eval_shape(jax.grad(loss), params)] == [jnp.float64] * 2


# Masks; what is hidden is in test_hidden_values.


@pytest.mark.parametrize("train", [True, False])
def test_uncounted_rows_are_normalized_too_and_may_hold_anything(train):
    x, (params, running), mask = random((7, 3)), layer(3), MASKS["Boolean"]

    def loss(x, params):
        y, new = jbn.batch_norm(x, params, running, train=train, mask=mask)
        return jnp.sum(jnp.sin(y), where=mask), (y, new)

    f = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (dx, dparams), (y, new) = jax.device_get(f(x, params))
    counted = mask[:, 0]
    moments = reference.moments(x, mask=mask)[:2] if train else running[:2]
    assert_allclose(y, reference.normalize(x, *moments, *params), atol=5e-6)
    for held in np.nan, np.inf:
        poisoned = jax.device_get(f(np.where(mask, x, held), params))
        (dx_poisoned, dparams_poisoned), (y_poisoned, new_poisoned) = poisoned
        # The two ways to measure, in one pass and in two, lose some roundings each.
        assert_allclose(dx_poisoned[counted], dx[counted], rtol=1e-5, atol=1e-6)
        assert_array_equal(dx_poisoned[~counted], 0)
        assert_allclose(y_poisoned[counted], y[counted], rtol=1e-5, atol=1e-6)
        expected = np.broadcast_to(params.bias, (2, 3))
        assert_allclose(y_poisoned[~counted], expected, rtol=1e-5, atol=1e-6)
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            (dparams_poisoned, new_poisoned),
            (dparams, new),
        )


def test_fully_masked_batch_changes_nothing_and_is_finite():
    x, (params, running), mask = random((7, 3)), layer(3), np.zeros((7, 1), bool)
    rules = jbn.ema(0.9), jbn.pooled(), lambda running, batch: batch

    def loss(x, params):
        y, new = zip(
            *(jbn.batch_norm(x, params, running, train=True, mask=mask, update=rule) for rule in rules)
        )
        return jnp.sum(jnp.sin(y[0]), where=mask), (y, new)

    gradients, (y, new) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, params)
    assert np.isfinite(y).all()
    jax.tree.map(assert_array_equal, new, (running,) * 3)
    jax.tree.map(lambda leaf: assert_array_equal(leaf, 0), gradients)
