"""The walk along the gradient, against closed forms."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    return {"a": np.asarray(w[..., :2], dtype), "b": (np.asarray(w[..., 2:, None], dtype),)}


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


def walk_of(f, step_sizes, params):
    """Returns the landscape with its properties, all compiled."""

    def measured(params):
        walk = inspection.along_gradient(f, params, step_sizes)
        return walk._asdict() | {name: getattr(walk, name) for name in ("loss_range", "smoothness")}

    return SimpleNamespace(**jax.jit(measured)(params))


def walk_on_quadratic(params, A):
    return inspection.along_gradient(lambda p: loss(p, A), params, STEP_SIZES)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_walk_on_a_quadratic_loss_is_the_closed_form(dtype):
    with jax.enable_x64(dtype == "float64"):
        matrix, w = quadratic()
        walk = jax.jit(walk_on_quadratic)(as_tree(w, dtype), np.asarray(matrix, dtype))
        rtol = 1e-12 if dtype == "float64" else 2e-5
        for actual, wanted in zip(walk, expected(matrix, w, STEP_SIZES)):
            assert actual.dtype == dtype
            assert_allclose(actual, wanted, rtol=rtol, atol=rtol)


def test_walks_in_a_vmap_and_their_properties_are_those_of_each():
    matrices, ws = zip(*map(quadratic, range(30)))

    @jax.jit
    def walked(ws, matrices):
        walks = jax.vmap(walk_on_quadratic)(ws, matrices)
        return walks, walks.smoothness, walks.loss_range  # of stacked landscapes

    walks, smoothness, loss_range = jax.device_get(walked(as_tree(np.stack(ws)), np.float32(matrices)))
    for i, (A, w) in enumerate(zip(matrices, ws)):
        wanted = expected(A, w, STEP_SIZES)
        for leaf, value in zip(walks, wanted):
            assert_allclose(leaf[i], value, rtol=1e-3, atol=1e-3)
        assert_allclose(smoothness[i], np.linalg.norm(A @ (A @ w)) / np.linalg.norm(A @ w), rtol=1e-3)
        low, *_, high = np.linalg.eigvalsh(A)
        assert low - 1e-3 * high <= smoothness[i] <= high * 1.001  # between the extreme curvatures
        visited = np.append(wanted[2], wanted[0])
        assert_allclose(loss_range[i], visited.max() - visited.min(), rtol=1e-3)


def test_loss_range_covers_the_start_and_the_points():
    walk = walk_of(lambda w: jnp.sum(w**2) / 2, (0.5, 2.0, 1.5), np.float32([3, 4]))
    assert_allclose(walk.losses, [3.125, 12.5, 3.125])
    assert_allclose(walk.loss_range, 12.5 - 3.125)
    # It ends below the start.
    assert_allclose(walk_of(jnp.sum, (0.5,), np.float32([3, 4])).loss_range, 1.0)


def test_where_the_gradient_is_zero_nothing_changes():
    for step_sizes in (), (0.1, 0.0):
        walk = walk_of(lambda w: jnp.sum(w**2) + 1, step_sizes, np.zeros(3, np.float32))
        assert (walk.loss, walk.gradient_norm, walk.smoothness, walk.loss_range) == (1, 0, 0, 0)
        assert_array_equal(walk.losses, np.ones(len(step_sizes)))
        assert_array_equal(walk.gradient_changes, np.zeros(len(step_sizes)))
        assert_array_equal(walk.distances, np.zeros(len(step_sizes)))


def test_step_size_zero_changes_the_gradient_by_exactly_nothing():
    w = np.random.RandomState(0).normal(size=(50, 50)).astype(np.float32)
    walk = walk_of(lambda w: jnp.sum(jnp.tanh(w @ w)), (0.0,), w)
    assert (walk.gradient_changes, walk.smoothness, walk.losses) == (0, 0, walk.loss)


def test_gradients_whose_squares_leave_the_range_are_measured():
    @jax.jit
    def walk_at(scale, step_size):
        loss = lambda w: scale * jnp.sum(w**2) / 2
        walk = inspection.along_gradient(loss, jnp.array([3.0, 4.0]), step_size[None])
        return walk.gradient_norm, walk.smoothness

    for scale in 1e-25, 1e25:
        gradient_norm, smoothness = walk_at(np.float32(scale), np.float32(1 / scale))
        assert_allclose(gradient_norm, 5 * scale, rtol=1e-6)
        assert_allclose(smoothness, scale, rtol=1e-6)


def test_each_leaf_keeps_its_dtype_and_measures_are_float32():
    seen = []

    def remember(params):
        seen.append(jax.tree.map(lambda p: p.dtype.name, params))
        return jnp.sum(params["half"]).astype(jnp.float32) + jnp.sum(params["full"] ** 2) + params["number"]

    params = {"half": np.ones(2, jnp.bfloat16), "full": np.ones(2, np.float32), "number": 1.0}
    walk = walk_of(remember, np.array([1, 2]), params)
    assert seen and all(d == {"half": "bfloat16", "full": "float32", "number": "float32"} for d in seen)
    assert {leaf.dtype.name for leaf in vars(walk).values()} == {"float32"}
    assert_allclose(walk.gradient_norm, np.sqrt(2 + 8 + 1), rtol=1e-6)
    half = jax.eval_shape(lambda w: inspection.along_gradient(jnp.sum, w, (1,)), params["half"])
    assert {leaf.dtype.name for leaf in half} == {"float32"}


def test_a_loss_that_leaves_the_numbers_does_not_spoil_the_other_points():
    walk = walk_of(lambda w: -jnp.sum(jnp.log(w)), (-2.0, 1.0, 2.0), np.float32([1]))
    assert_allclose(walk.losses[1:], [-np.log(2), -np.log(3)], rtol=1e-6)
    assert np.isnan(walk.losses[0]) and np.isnan(walk.loss_range)
    infinite = walk_of(lambda w: jnp.sum(w**0.5), (0.1,), np.float32([0, 1]))
    assert infinite.gradient_norm == np.inf


def test_the_program_holds_the_loss_once_however_many_steps():
    walk = functools.partial(inspection.along_gradient, lambda w: jnp.sum(jnp.sinh(w)))
    for k in 1, 30:
        text = str(jax.make_jaxpr(walk)(np.ones(3, np.float32), np.ones(k, np.float32)))
        assert text.count("sinh") == 1


def test_bad_input_is_named():
    w = np.ones(4, np.float32)
    for error, message, f, params, step_sizes in (
        (ValueError, r"step_sizes has shape \(\); ", jnp.sum, w, 0.1),
        (
            TypeError,
            r"params\['step'\] has dtype int32; .* a real floating",
            lambda p: jnp.sum(p["w"]),
            {"w": w, "step": 3},
            (0.1,),
        ),
        (TypeError, "params has dtype complex64", jnp.sum, w.astype(np.complex64), (0.1,)),
        (ValueError, "params has no leaves", lambda p: 0.0, {}, (0.1,)),
        (TypeError, "scalar", jnp.sin, w, (0.1,)),
    ):
        with pytest.raises(error, match=message):
            inspection.along_gradient(f, params, step_sizes)
