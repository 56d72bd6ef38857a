"""The derivative rule: autodiff of the plain formula is the reference, in float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from tests.helpers.layers import MASKS, layer, random

RUNNING = jbn.Moments(*np.float64([[0.5] * 3, [2] * 3, [0] * 3]))
TARGET = np.asarray(np.random.RandomState(5).normal(3, 2, (7, 3)))


def plain(x, scale, bias, mask, train=True):
    if train:
        weights = jnp.ones(x.shape) if mask is None else jnp.broadcast_to(mask * 1.0, x.shape)
        weights = weights / jnp.sum(weights, 0, keepdims=True)
        mean = jnp.sum(weights.astype(x.dtype) * x, 0, keepdims=True)
        deviation = x - mean
        var = jnp.sum(weights * jnp.real(deviation * jnp.conj(deviation)), 0, keepdims=True)
    else:
        mean, var = RUNNING.mean.astype(x.dtype)[None], RUNNING.var[None]
    return (x - mean) * (1 / jnp.sqrt(var + 1e-5)).astype(x.dtype) * scale[None] + bias[None]


def ours(x, scale, bias, mask, train=True):
    running = RUNNING._replace(mean=RUNNING.mean.astype(x.dtype))
    return jbn.batch_norm(x, jbn.Params(scale, bias), running, train=train, mask=mask)[0]


def ours_traced(x, scale, bias, mask):
    return jax.vmap(lambda train: ours(x, scale, bias, mask, train))(jnp.array([True]))[0]


def composed(x, scale, bias, mask):
    return jbn.normalize(x, jbn.moments(x, mask=mask), jbn.Params(scale, bias))


def loss_of(f, **options):
    return lambda x, scale, bias: jnp.sum(jnp.real(jnp.sin(f(x, scale, bias, **options))) * TARGET)


def arguments(dtype="float64"):
    return random((7, 3), dtype), random(3, dtype, seed=1), random(3, dtype, seed=2)


DERIVATIVES = {
    "grad": lambda f, args: jax.grad(f, (0, 1, 2))(*args),
    "jvp": lambda f, args: jax.jvp(f, args, tuple(jnp.cos(a) for a in args)),
    "linearize": lambda f, args: jax.linearize(f, *args)[1](*(jnp.cos(a) for a in args)),
    "hessian": lambda f, args: jax.hessian(f, (0, 1, 2))(*args),
    "reverse over reverse": lambda f, args: jax.jacrev(jax.grad(f, (0, 1, 2)), (0, 1, 2))(*args),
    "third": lambda f, args: jax.jacfwd(jax.jacrev(jax.jacfwd(f)))(*args),
}


@cache
def derived(function, derivative, mask, train=True, dtype="float64"):
    options = {"mask": MASKS[mask]} | ({} if train else {"train": train})
    f = loss_of(function, **options)
    return jax.jit(lambda args: DERIVATIVES[derivative](f, args))(arguments(dtype))


def assert_is_that_of_the_plain_formula(function, *case):
    actual, expected = derived(function, *case), derived(plain, *case)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-9, atol=1e-11), actual, expected)


@pytest.mark.parametrize(
    "derivative, mask",
    [
        ("grad", "no mask"),
        *(pytest.param(name, "weights, per feature", marks=pytest.mark.slow) for name in DERIVATIVES),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("grad", "Boolean"), ("hessian", "no mask")]
        ),
    ],
)
def test_derivatives_are_those_of_the_plain_formula(x64, derivative, mask):
    assert_is_that_of_the_plain_formula(ours, derivative, mask)


@pytest.mark.slow
def test_derivatives_hold_with_a_traced_train_flag(x64):
    assert_is_that_of_the_plain_formula(ours_traced, "hessian", "weights, per feature")


@pytest.mark.slow
@pytest.mark.parametrize("train, dtype", [(True, "complex128"), (False, "complex128")])
def test_derivatives_are_those_of_complex_numbers_and_of_inference_too(x64, train, dtype):
    assert_is_that_of_the_plain_formula(ours, "grad", "no mask", train, dtype)


@pytest.mark.parametrize("mask", ["no mask", pytest.param("weights, per feature", marks=pytest.mark.slow)])
def test_moments_and_normalize_compose_to_the_same_gradient(x64, mask):
    actual = derived(composed, "grad", mask)
    # The one by hand, too.
    x, scale, bias = arguments()
    dy = np.cos(reference.batch_norm(x, scale, bias, mask=MASKS[mask])) * TARGET
    expected = reference.gradients(x, dy, scale, mask=MASKS[mask])
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-9, atol=1e-11), actual, expected)


@pytest.mark.parametrize("derivative", ["grad", pytest.param("hessian", marks=pytest.mark.slow)])
def test_hidden_nan_acts_as_the_mean_also_where_a_loss_sees_its_output(x64, derivative):
    mask = MASKS["Boolean"]
    hidden = lambda x, *params: ours(jnp.where(mask, x, jnp.nan), *params, mask)
    expected = lambda x, scale, bias: jnp.where(mask, plain(x, scale, bias, mask), bias[None])
    actual, expected = (
        jax.jit(partial(DERIVATIVES[derivative], loss_of(f)))(arguments()) for f in (hidden, expected)
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-9, atol=1e-11), actual, expected)


def test_running_moments_carry_no_gradient():
    x, (params, running) = random((7, 3)), layer(3)

    def total(x, params, running, train):
        _, new = jbn.batch_norm(x, params, running, train=train)
        return sum(jnp.sum(leaf) for leaf in new)

    for train in (True, False):
        gradients = jax.jit(lambda *args, train=train: jax.grad(total, (0, 1, 2))(*args, train))
        for leaf in jax.tree.leaves(gradients(x, params, running)):
            assert_array_equal(leaf, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, np.ones((256, 1), bool)])
def test_backward_pass_keeps_x_in_its_own_dtype_and_per_feature_vectors(dtype, mask):
    x, (params, running) = jax.ShapeDtypeStruct((256, 32), dtype), layer(32)

    @jax.jit
    def residuals(x, params):
        return jax.vjp(lambda x, p: jbn.batch_norm(x, p, running, train=True, mask=mask)[0], x, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, x, params))
    assert (
        sum(leaf.size * leaf.dtype.itemsize for leaf in kept) <= x.size * x.dtype.itemsize + 256 + 8 * 32 * 4
    )
