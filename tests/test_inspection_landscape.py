import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from jbn import inspection

STEP_SIZES = (0.0, 0.01, 0.1, -0.2)


def quadratic(seed=0, n=5):
    """Returns a symmetric A, and parameters, of which the last three are in a leaf of their own."""
    rng = np.random.RandomState(seed)
    root = rng.normal(size=(n, n))
    w = rng.normal(size=n)
    return root @ root.T, w


def as_tree(w, dtype="float32"):
    return {"a": jnp.asarray(w[:2], dtype), "b": (jnp.asarray(w[2:, None], dtype),)}


def loss(params, A):
    w = jnp.concatenate([params["a"], params["b"][0][:, 0]]).astype(A.dtype)
    return 0.5 * w @ A @ w


def expected(A, w, step_sizes):
    g, eta = A @ w, np.asarray(step_sizes)
    points = w - eta[:, None] * g
    return (
        0.5 * w @ A @ w,
        np.linalg.norm(g),
        0.5 * np.einsum("ki,ij,kj->k", points, A, points),
        np.abs(eta) * np.linalg.norm(A @ g),
        np.abs(eta) * np.linalg.norm(g),
    )


TRANSFORMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: (
        lambda w: jax.tree.map(
            lambda leaf: leaf[0], jax.jit(jax.vmap(f))(jax.tree.map(lambda p: np.stack([p, 3 * p]), w))
        )
    ),
}


@pytest.mark.parametrize("transform, dtype", [*((t, "float32") for t in TRANSFORMS), ("jit", "float64")])
def test_walk_on_a_quadratic_loss_is_the_closed_form(transform, dtype):
    with jax.enable_x64(dtype == "float64"):
        matrix, w = quadratic()
        A, params = jnp.asarray(matrix, dtype), as_tree(w, dtype)
        walk = TRANSFORMS[transform](
            lambda w: inspection.along_gradient(lambda p: loss(p, A), w, STEP_SIZES)
        )(params)
        rtol = 1e-12 if dtype == "float64" else 2e-5
        for actual, wanted in zip(walk, expected(matrix, w, STEP_SIZES)):
            assert actual.dtype == dtype
            assert_allclose(actual, wanted, rtol=rtol, atol=rtol)


@jax.jit
def walk_on_quadratic(params, A):
    return inspection.along_gradient(lambda p: loss(p, A), params, (0.05, 0.1))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999))
def test_smoothness_of_a_quadratic_loss_is_between_its_extreme_curvatures(seed):
    matrix, w = quadratic(seed)
    A, g = jnp.asarray(matrix, jnp.float32), matrix @ w
    walk = walk_on_quadratic(as_tree(w), A)
    assert_allclose(walk.smoothness, np.linalg.norm(matrix @ g) / np.linalg.norm(g), rtol=1e-3)
    low, *_, high = np.linalg.eigvalsh(matrix)
    assert low - 1e-3 * high <= walk.smoothness <= high * 1.001


def test_loss_range_covers_the_start_and_the_points():
    w = jnp.array([3.0, 4.0])
    walk = inspection.along_gradient(lambda w: jnp.sum(w**2) / 2, w, (0.5, 2.0, 1.5))
    assert_allclose(walk.losses, [3.125, 12.5, 3.125])
    assert_allclose(walk.loss_range, 12.5 - 3.125)
    assert_allclose(inspection.along_gradient(lambda w: jnp.sum(w), w, (0.5,)).loss_range, 1.0)


def test_properties_of_stacked_landscapes_are_those_of_each():
    measure = jax.jit(lambda w: inspection.along_gradient(lambda w: jnp.sum(jnp.sin(w)), w, (0.1, 0.2)))
    ws = np.arange(6, dtype=np.float32).reshape(2, 3)
    stacked = jax.vmap(measure)(ws)
    for i in range(2):
        assert_allclose(stacked.loss_range[i], measure(ws[i]).loss_range, rtol=1e-6)
        assert_allclose(stacked.smoothness[i], measure(ws[i]).smoothness, rtol=1e-5)


@pytest.mark.parametrize("step_sizes", [(), (0.0,), (0.1, 0.2)])
def test_where_the_gradient_is_zero_nothing_changes(step_sizes):
    walk = inspection.along_gradient(lambda w: jnp.sum(w**2) + 1, jnp.zeros(3), step_sizes)
    assert (walk.loss, walk.gradient_norm, walk.smoothness, walk.loss_range) == (1, 0, 0, 0)
    assert_array_equal(walk.losses, np.ones(len(step_sizes)))
    assert_array_equal(walk.gradient_changes, np.zeros(len(step_sizes)))
    assert_array_equal(walk.distances, np.zeros(len(step_sizes)))


def test_step_size_zero_changes_the_gradient_by_exactly_nothing():
    w = jnp.asarray(np.random.RandomState(0).normal(size=(50, 50)), jnp.float32)
    walk = inspection.along_gradient(lambda w: jnp.sum(jnp.tanh(w @ w)), w, (0.0,))
    assert (walk.gradient_changes, walk.smoothness, walk.losses) == (0, 0, walk.loss)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_gradients_whose_squares_leave_the_range_are_measured(scale):
    walk = inspection.along_gradient(lambda w: scale * jnp.sum(w**2) / 2, jnp.array([3.0, 4.0]), (1 / scale,))
    assert_allclose(walk.gradient_norm, 5 * scale, rtol=1e-6)
    assert_allclose(walk.smoothness, scale, rtol=1e-6)


def test_each_leaf_keeps_its_dtype_and_measures_are_float32():
    seen = []

    def remember(params):
        seen.append(jax.tree.map(lambda p: p.dtype.name, params))
        return jnp.sum(params["half"]).astype(jnp.float32) + jnp.sum(params["full"] ** 2) + params["number"]

    params = {"half": jnp.ones(2, jnp.bfloat16), "full": jnp.ones(2), "number": 1.0}
    walk = inspection.along_gradient(remember, params, np.array([1, 2]))
    assert seen and all(d == {"half": "bfloat16", "full": "float32", "number": "float32"} for d in seen)
    assert {leaf.dtype.name for leaf in walk} == {"float32"}
    assert_allclose(walk.gradient_norm, np.sqrt(2 + 8 + 1), rtol=1e-6)
    half = inspection.along_gradient(jnp.sum, jnp.ones(2, jnp.bfloat16), (1,))
    assert {leaf.dtype.name for leaf in half} == {"float32"}


def test_a_loss_that_leaves_the_numbers_does_not_spoil_the_other_points():
    walk = inspection.along_gradient(lambda w: -jnp.sum(jnp.log(w)), jnp.array([1.0]), (-2.0, 1.0, 2.0))
    assert_allclose(walk.losses[1:], [-np.log(2), -np.log(3)], rtol=1e-6)
    assert np.isnan(walk.losses[0]) and np.isnan(walk.loss_range)
    infinite = inspection.along_gradient(lambda w: jnp.sum(w**0.5), jnp.array([0.0, 1.0]), (0.1,))
    assert infinite.gradient_norm == np.inf


def test_the_program_holds_the_loss_once_however_many_steps():
    walk = functools.partial(inspection.along_gradient, lambda w: jnp.sum(jnp.sinh(w)))
    for k in 1, 30:
        assert str(jax.make_jaxpr(walk)(jnp.ones(3), jnp.ones(k))).count("sinh") == 1


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda w: inspection.along_gradient(jnp.sum, w, 0.1),
            ValueError,
            r"step_sizes has shape \(\); want",
        ),
        (
            lambda w: inspection.along_gradient(lambda p: jnp.sum(p["w"]), {"w": w, "step": 3}, (0.1,)),
            TypeError,
            r"params\['step'\] has dtype int32; wanted a real floating",
        ),
        (
            lambda w: inspection.along_gradient(jnp.sum, w.astype(jnp.complex64), (0.1,)),
            TypeError,
            "params has dtype complex64",
        ),
        (lambda w: inspection.along_gradient(lambda p: 0.0, {}, (0.1,)), ValueError, "params has no leaves"),
        (lambda w: inspection.along_gradient(jnp.sin, w, (0.1,)), TypeError, "scalar"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones(4))
