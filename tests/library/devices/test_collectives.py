"""One batch over eight devices, or over a vmap, is the batch on one device."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from tests.helpers.layers import WAYS, layer, on_devices, per_example, random, train

SHAPE = (16, 5, 3)
ROWS = np.arange(16)[:, None, None]
MASKS = {
    "no mask": {"no mask": None},
    "Boolean": {"unequal counts": ROWS % 5 > 1, "six empty shards": ROWS // 2 % 4 == 1},
    "weights": {"weights per feature": np.random.RandomState(7).gamma(1.0, size=SHAPE)},
}
slow = pytest.mark.slow


def loss_of(way):
    def loss(x, params, mask, running, target):
        y, new = way(x, mask, params, running)
        return jnp.sum(jnp.real(jnp.sin(y)) * target), (y, new)

    return loss


@cache
def program(way):
    """Returns loss, `y`, running moments and gradients, compiled once for each shape and dtype."""
    return jax.jit(jax.value_and_grad(loss_of(WAYS.get(way, train)), (0, 1), has_aux=True))


def results(way, *args):
    """Returns `y`, running moments, and the gradients to `x` and to the parameters."""
    (_, (y, new)), (dx, dparams) = jax.tree.map(np.asarray, program(way)(*args))
    return y, new, dx, dparams


@cache
def forward(way):
    return jax.jit(WAYS.get(way, train))


@cache
def on_one_device(kind, case):
    return program("one device")(*batch(MASKS[kind][case]))


def batch(mask, dtype="float64"):
    params, running = layer(3, dtype)
    if mask is not None:
        mask = np.broadcast_to(mask, (*SHAPE[:2], mask.shape[-1]))
    x, target = random(SHAPE, dtype), random(SHAPE, dtype, 0.0, 1.0, seed=3)
    return np.asarray(x), params, mask, running, np.asarray(target)


def assert_close(actual, expected, tolerance, case=""):
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=case), actual, expected
    )


@pytest.mark.parametrize(
    "way, kind",
    [
        ("shard_map, two axes", "Boolean"),
        ("vmap per example", "weights"),
        pytest.param("shard_map, two axes", "no mask", marks=slow),
        pytest.param("shard_map, two axes", "weights", marks=slow),
        pytest.param("vmap per example", "no mask", marks=slow),
        pytest.param("shard_map, one axis", "Boolean", marks=slow),
        pytest.param("shard_map, unchecked", "Boolean", marks=slow),
        pytest.param("vmap per position", "Boolean", marks=slow),
        pytest.param("vmap in shard_map", "Boolean", marks=slow),
    ],
)
def test_value_state_and_gradient_are_those_of_one_device(x64, way, kind):
    for case, mask in MASKS[kind].items():
        args, expected = batch(mask), on_one_device(kind, case)
        assert_close(program(way)(*args), expected, 1e-11, case)
        assert_close(expected[0][1][0], reference.batch_norm(args[0], *args[1], mask=args[2]), 1e-11, case)


@slow
@pytest.mark.parametrize(
    "way, derive",
    [
        # Others of shard_map are in test_transforms.py.
        ("shard_map, two axes", lambda loss: jax.jacrev(jax.grad(loss, (0, 1)), (0, 1))),
        ("vmap per example", lambda loss: jax.hessian(loss, (0, 1))),
    ],
    ids=["shard_map, reverse over reverse", "vmap, Hessian"],
)
def test_further_derivatives_are_those_of_one_device(x64, way, derive):
    x, params, mask, running, target = batch(ROWS % 5 > 1)

    def derivative(way):
        def loss(direction, params):
            # A few numbers that move every x; the Hessian in x itself would be large.
            return loss_of(way)(x + jnp.sin(x) * direction[None, None], params, mask, running, target)[0]

        return jax.jit(derive(loss))(jnp.ones(3), params)

    assert_close(derivative(WAYS[way]), derivative(train), 1e-9)


@slow
def test_further_derivatives_of_many_narrow_samples_are_those_of_one_device():
    # So many on each device that the backward pass adds up a third sum, for GPUs.
    x, target = (np.asarray(random((8 * 8200, 3), "bfloat16", mean, sd)) for mean, sd in ((3, 2), (0, 1)))
    params, running = layer(3)

    def derive(way):
        def norm_of_the_gradient(params, x, target):
            def loss(x, params):
                y, _ = way(x, None, params, running)
                return jnp.mean((jnp.sin(y) * target).astype(jnp.float32))

            return jnp.sum(jax.grad(loss)(x, params).astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(norm_of_the_gradient))(params, x, target)

    for actual, expected in zip(derive(WAYS["shard_map, two axes"]), derive(train)):
        assert_allclose(actual, expected, rtol=0.02)


@slow
@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_dtypes_are_those_of_one_device(dtype):
    x, (params, running) = np.asarray(random(SHAPE, dtype)), layer(3, dtype)
    actual, expected = (
        forward(way)(x, None, params, running) for way in ("shard_map, two axes", "one device")
    )
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)
    tolerance = 5e-2 if dtype == "bfloat16" else 1e-5
    wide = np.complex64 if dtype == "complex64" else np.float32
    actual, expected = (jax.tree.map(wide, tree) for tree in (actual, expected))
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("way", ["shard_map, two axes", "vmap per example"])
def test_large_means_are_exact_from_the_first_step(way):
    params, running = layer(3)
    for size in (1e4, 1e6):
        x = np.asarray(random(SHAPE, mean=size, sd=1))
        y, new = forward(way)(x, None, params, running)
        mean, var, _ = reference.moments(x)
        step = np.spacing(np.float32(size))
        assert_allclose(y, reference.batch_norm(x, *params), atol=4 * step)
        assert_allclose(2 * new.mean, mean, atol=2 * step)
        assert_allclose(2 * new.var - 1, var, rtol=1e-6)


def test_nan_on_one_device_spares_the_running_moments_of_all():
    x, (params, running) = np.array(random(SHAPE)), layer(3)
    x[3, 2, 1] = np.nan
    _, new = forward("shard_map, two axes")(x, None, params, running)
    mean, var, _ = reference.moments(x)
    for leaf, old, expected in zip(new, running, ((0 + mean) / 2, (1 + var) / 2)):
        assert_allclose(leaf, np.where([False, True, False], old, expected), rtol=1e-5, atol=1e-6)


def test_counts_8_and_2_give_the_exact_mean():
    # The average of the two shards' means is 2.71.
    low, high = 1.13 / 3, 15.13 / 3
    x = np.float32([low] * 8 + [high] * 8)[:, None]
    mask = np.arange(16)[:, None] < 10
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    f = lambda x, mask: jbn.moments(x, mask=mask, axis_name="a")
    moments = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P()))(x, mask)
    assert_allclose(moments.mean, 1.31, rtol=1e-6)
    assert_allclose(moments.var, np.var([low] * 8 + [high] * 2), rtol=1e-6)
    assert_array_equal(moments.count, 10)


@pytest.mark.parametrize("way", ["shard_map, two axes", pytest.param("vmap per example", marks=slow)])
def test_uncounted_rows_may_hold_anything_on_any_device(way):
    clean, params, mask, running, target = batch(ROWS < 5, "float32")
    poisoned, target = np.where(mask, clean, np.float32(np.nan)), np.where(mask, target, np.float32(0))
    poisoned[-1] = np.inf
    y, new, dx, dparams = results(way, poisoned, params, mask, running, target)
    assert np.isfinite(y).all()
    assert_array_equal(dx[5:], 0)
    y_clean, new_clean, dx_clean, dparams_clean = results("one device", clean, params, mask, running, target)
    assert_close((y[:5], new, dx[:5], dparams), (y_clean[:5], new_clean, dx_clean[:5], dparams_clean), 1e-5)

    poisoned[:] = np.nan
    y, new, *gradients = results(way, poisoned, params, np.zeros_like(mask), running, np.zeros_like(target))
    assert np.isfinite(y).all()
    jax.tree.map(assert_array_equal, new, running)
    jax.tree.map(lambda leaf: assert_array_equal(leaf, 0), gradients)


@slow
def test_moments_carry_their_gradient_over_devices(x64):
    x, w = np.asarray(random((16, 3), "float64")), np.random.RandomState(1).rand(16, 3)

    def first_and_second(measure):
        def loss(x):
            mean, var, count = measure(x)
            return jnp.sum(jnp.sin(mean) + var**2 / count)

        return jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (jnp.cos(x),)))(x)

    over_devices = on_devices(
        lambda x, w, *_: jbn.moments(x, mask=w, axis_name=("a", "b")), ("a", "b"), out_specs=P()
    )
    actual = first_and_second(lambda x: over_devices(x, w, 0.0, 0.0))
    expected = first_and_second(lambda x: jbn.moments(x, mask=w))
    for a, b in zip(actual, expected):
        assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def in_scan(f):
    return lambda x: jax.lax.scan(lambda total, x: (total + f(x[None])[0], None), 0.0, x)[0]


@slow
@pytest.mark.parametrize("stage", [jax.jit, jax.checkpoint, in_scan], ids=["jit", "checkpoint", "scan"])
def test_gradient_of_a_vmap_that_was_staged_before(x64, stage):
    # JAX forgets the axis name in a custom rule here; the layer must not depend on it.
    x, (params, running) = np.asarray(random((2, 16, 3), "float64")), layer(3, "float64")

    def gradient(way, stage):
        one = lambda x: jnp.sum(jnp.sin(way(x, None, params, running)[0]))
        return jax.jit(jax.grad(lambda x: jnp.sum(stage(lambda x: jax.vmap(one)(x))(x))))

    expected = gradient(train, lambda f: f)(x)
    assert_allclose(gradient(per_example(["i"]), stage)(x), expected, rtol=1e-11, atol=1e-11)
