"""The derivative rule: autodiff of the plain formula is the reference, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import quick_jit
from jax.test_util import check_grads
from layers import MASKS, layer, random
from numpy.testing import assert_allclose, assert_array_equal

import jbn


def plain(x, scale, bias, mask):
    weights = jnp.ones_like(x) if mask is None else jnp.broadcast_to(jnp.asarray(mask, x.dtype), x.shape)
    count = jnp.sum(weights, 0, keepdims=True)
    mean = jnp.sum(weights * x, 0, keepdims=True) / count
    var = jnp.sum(weights * (x - mean) ** 2, 0, keepdims=True) / count
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale[None] + bias[None]


def ours(x, scale, bias, mask):
    return jbn.batch_norm(x, jbn.Params(scale, bias), jbn.init(3)[1], train=True, mask=mask)[0]


def ours_traced(x, scale, bias, mask):
    def f(train):
        return jbn.batch_norm(x, jbn.Params(scale, bias), jbn.init(3)[1], train=train, mask=mask)[0]

    return jax.vmap(f)(jnp.array([True]))[0]


def loss_of(f, mask):
    target = random((7, 3), "float64", seed=5)
    return lambda x, scale, bias: jnp.sum(jnp.sin(f(x, scale, bias, mask) * target))


DERIVATIVES = {
    "grad": lambda f, args: jax.grad(f, (0, 1, 2))(*args),
    "jvp": lambda f, args: jax.jvp(f, args, tuple(jnp.cos(a) for a in args)),
    "linearize": lambda f, args: jax.linearize(f, *args)[1](*(jnp.cos(a) for a in args)),
    "hessian": lambda f, args: jax.hessian(f, (0, 1, 2))(*args),
    "reverse over reverse": lambda f, args: jax.jacrev(jax.grad(f, (0, 1, 2)), (0, 1, 2))(*args),
    "third": lambda f, args: jax.jacfwd(jax.jacrev(jax.jacfwd(f)))(*args),
}


def assert_derivative_is_that_of_the_plain_formula(function, derivative, mask):
    args = random((7, 3), "float64"), random(3, "float64", seed=1), random(3, "float64", seed=2)
    derive, mask = DERIVATIVES[derivative], MASKS[mask]
    actual = quick_jit(lambda args: derive(loss_of(function, mask), args))(args)
    expected = quick_jit(lambda args: derive(loss_of(plain, mask), args))(args)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-9, atol=1e-11), actual, expected)


@pytest.mark.parametrize(
    "derivative, mask",
    [
        *((derivative, "weights, per feature") for derivative in DERIVATIVES),
        *((derivative, mask) for derivative in ("grad", "jvp", "hessian") for mask in ("no mask", "Boolean")),
    ],
)
def test_derivatives_are_those_of_the_plain_formula(x64, derivative, mask):
    assert_derivative_is_that_of_the_plain_formula(ours, derivative, mask)


@pytest.mark.parametrize("derivative", ["grad", "jvp", "hessian"])
def test_derivatives_hold_with_a_traced_train_flag(x64, derivative):
    assert_derivative_is_that_of_the_plain_formula(ours_traced, derivative, "weights, per feature")


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("train", [True, False])
def test_derivatives_are_those_of_finite_differences(x64, train, dtype):
    x, (params, running) = random((5, 3), dtype), layer(3, dtype)
    running = running._replace(mean=running.mean + 0.5, var=running.var * 2)

    def f(x, params):
        return jbn.batch_norm(x, params, running, train=train)[0]

    check_grads(jax.jit(f), (x, params), order=2, modes=["fwd", "rev"], rtol=1e-5)


def test_moments_and_normalize_compose_to_the_same_gradient(x64):
    args = random((7, 3), "float64"), random(3, "float64", seed=1), random(3, "float64", seed=2)

    def composed(x, scale, bias, mask):
        return jbn.normalize(x, jbn.moments(x, mask=mask), jbn.Params(scale, bias))

    for mask in MASKS.values():
        actual, expected = (quick_jit(jax.grad(loss_of(f, mask), (0, 1, 2)))(*args) for f in (composed, ours))
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-9, atol=1e-12), actual, expected)


def test_running_moments_carry_no_gradient():
    x, (params, running) = random((7, 3)), layer(3)

    def total(x, params, running, train):
        _, new = jbn.batch_norm(x, params, running, train=train)
        return sum(jnp.sum(leaf) for leaf in new)

    for train in (True, False):
        for leaf in jax.tree.leaves(jax.grad(total, (0, 1, 2))(x, params, running, train)):
            assert_array_equal(leaf, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, np.ones((256, 1), bool)])
def test_backward_pass_keeps_x_in_its_own_dtype_and_per_feature_vectors(dtype, mask):
    x, (params, running) = random((256, 32), dtype), layer(32)

    @jax.jit
    def residuals(x, params):
        return jax.vjp(lambda x, p: jbn.batch_norm(x, p, running, train=True, mask=mask)[0], x, params)[1]

    kept = jax.tree.leaves(residuals(x, params))
    assert sum(leaf.nbytes for leaf in kept) <= x.nbytes + 256 + 8 * 32 * 4
