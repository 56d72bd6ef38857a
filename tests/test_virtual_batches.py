from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import collectives, quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn

EXAMPLES, SIZES = 10, [1, 4, 7, 99]
MASKS = {
    "no mask": None,
    "rows": np.array([1, 1, 1, 0, 1, 0, 1, 1, 0, 1], bool)[:, None, None],
    "weights": np.random.RandomState(4).gamma(1.0, size=(EXAMPLES, 5, 3)),
    "features": np.array([1, 0, 2.0]),
}


def random(shape, mean=3.0, sd=2.0, seed=0, dtype="float64"):
    return jnp.asarray(np.random.RandomState(seed).normal(mean, sd, shape), dtype)


def layer(features=3, dtype="float64"):
    _, running = jbn.init(features, dtype=dtype)
    return jbn.Params(random(features, 1, 0.3, 1, dtype), random(features, 0, 1, 2, dtype)), running


def parts_of(x, mask, size):
    parts = -(-len(x) // size)
    mask = np.broadcast_to(1 if mask is None else mask, x.shape)
    return list(zip(jnp.array_split(x, parts), np.array_split(mask, parts)))


def one_after_the_other(x, mask, params, running, size, rule=jbn.ema(0.5)):
    """Each part on its own, by the functions that know nothing of parts."""
    batches = [jbn.moments(part, mask=weights) for part, weights in parts_of(x, mask, size)]
    y = [jbn.normalize(part, m, params) for (part, _), m in zip(parts_of(x, mask, size), batches)]
    return jnp.concatenate(y), rule(running, jbn.merge(*batches))


def at_once(x, mask, params, running, size, rule=jbn.ema(0.5)):
    return jbn.batch_norm(x, params, running, train=True, mask=mask, update=rule, virtual_batch_size=size)


def gradients(f, x, mask, params, running, size):
    target = random(x.shape, 0, 1, 5, x.dtype)

    def loss(x, params):
        y, new = f(x, mask, params, running, size)
        return jnp.sum(jnp.sin(y) * target), (y, new)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)


def assert_close(actual, expected, tolerance):
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


@pytest.mark.parametrize(
    "size, mask", [*((size, "weights") for size in SIZES), *((3, mask) for mask in MASKS)]
)
def test_each_part_is_normalized_by_its_own_moments(x64, size, mask):
    x, (params, running), mask = random((EXAMPLES, 5, 3)), layer(), MASKS[mask]
    actual, expected = (
        quick_jit(lambda x, params: gradients(f, x, mask, params, running, size))(x, params)  # noqa: B023
        for f in (at_once, one_after_the_other)
    )
    assert_close(actual, expected, 1e-11)
    y = np.concatenate([reference.batch_norm(part, *params, mask=m) for part, m in parts_of(x, mask, size)])
    assert_close(actual[0][1][0], y, 1e-11)


def test_sizes_differ_by_one_at_most_and_a_part_is_padded_by_one_row():
    x = random((EXAMPLES, 3), dtype="float32")
    params, running = layer(dtype="float32")
    last = lambda running, batch: batch
    for size, sizes in (3, [3, 3, 2, 2]), (4, [4, 3, 3]), (9, [5, 5]), (5, [5, 5]), (10, [10]), (99, [10]):
        y, batch = jax.jit(partial(at_once, size=size, rule=last))(x, None, params, running)
        wanted = [reference.batch_norm(part, *params) for part in np.split(x, np.cumsum(sizes)[:-1])]
        assert_allclose(y, np.concatenate(wanted), atol=2e-5)
        assert_array_equal(batch.count, EXAMPLES)  # the padding counts for nothing
        assert_allclose(batch.var, np.var(x, 0), rtol=1e-5)  # between the parts too


@pytest.mark.parametrize(
    "axis, shape, batch_axis", [(0, (3, 10), 1), ((0, 2), (2, 10, 3, 4), 1), (1, (10, 3, 4), 0)]
)
def test_examples_are_counted_by_the_first_axis_that_is_no_feature_axis(x64, axis, shape, batch_axis):
    x = random(shape)
    features = tuple(shape[a] for a in np.atleast_1d(axis))
    params, running = layer(features)
    f = partial(jbn.batch_norm, train=True, axis=axis, virtual_batch_size=4)
    y, _ = jax.jit(f)(x, params, running)
    parts = np.array_split(x, 3, batch_axis)
    wanted = np.concatenate([reference.batch_norm(part, *params, axis) for part in parts], batch_axis)
    assert_close(y, wanted, 1e-11)


@pytest.mark.parametrize("rule", [jbn.pooled(), jbn.cumulative(unbiased=True), jbn.ema(0.9, debias=True)])
def test_running_moments_absorb_the_merge_of_all_parts(rule):
    x, (params, running) = random((EXAMPLES, 3), dtype="float32"), layer(dtype="float32")
    _, new = jax.jit(partial(at_once, size=3, rule=rule))(x, None, params, running)
    assert_close(new, rule(running, jbn.moments(x)), 1e-5)


def test_part_without_samples_and_part_with_nan_harm_nobody_else():
    x, (params, running) = random((EXAMPLES, 3), dtype="float32"), layer(dtype="float32")
    mask = np.ones((EXAMPLES, 1))
    mask[:5] = 0
    f = jax.jit(partial(at_once, size=5))
    y, new = f(x.at[:5].set(np.nan), mask, params, running)
    assert np.isfinite(y).all()
    assert_close(new, jbn.ema(0.5)(running, jbn.moments(x[5:])), 1e-5)

    y, new = f(x.at[0, 0].set(np.nan), None, params, running)
    assert_array_equal(np.isnan(y[:, 0]), [True] * 5 + [False] * 5)
    assert_array_equal(new.mean[0], running.mean[0])
    assert np.all(new.mean[1:] != running.mean[1:])


@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 3), (0, 3)])
def test_nothing_to_normalize_is_no_error(shape):
    y, new = jbn.batch_norm(jnp.zeros(shape), *jbn.init(shape[-1]), train=True, virtual_batch_size=2)
    assert y.shape == shape
    assert_array_equal(new.count, 0)


@pytest.mark.parametrize("train", [False, np.array(False)], ids=["known", "not known to be False"])
def test_no_effect_in_inference(train):
    x, (params, running) = random((EXAMPLES, 3), dtype="float32"), layer(dtype="float32")
    y, new = jbn.batch_norm(x, params, running, train=train, virtual_batch_size=4)
    assert_close(y, jbn.normalize(x, running, params), 1e-6)
    jax.tree.map(assert_array_equal, new, running)


@pytest.mark.parametrize("derivative", ["hessian", "linearize"])
def test_derivatives_go_through_parts(x64, derivative):
    x, (params, running), target = random((5, 3)), layer(), random((5, 3), 0, 1, 5)

    def derive(f):
        def loss(scale, shift):
            y, _ = f(x + jnp.sin(x) * shift[None], None, params._replace(scale=scale), running, 3)
            return jnp.sum(jnp.sin(y) * target)

        args = params.scale, params.bias
        return {
            "hessian": lambda: jax.hessian(loss, (0, 1))(*args),
            "linearize": lambda: jax.linearize(loss, *args)[1](*args),
        }[derivative]

    assert_close(quick_jit(derive(at_once))(), quick_jit(derive(one_after_the_other))(), 1e-9)


# Devices.

DEVICES, ROWS = 8, 24


def test_parts_are_per_device_and_collectives_touch_only_the_running_moments(x64):
    x, (params, running) = random((ROWS, 5, 3)), layer()
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(AxisType.Auto,))

    def f(x, params, running):
        return jbn.batch_norm(
            x, params, running, train=True, update=jbn.ema(0.5), axis_name="i", virtual_batch_size=2
        )

    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P("i"), P(), P()), out_specs=(P("i"), P())))
    y, new = mapped(x, params, running)
    shards = x.reshape(DEVICES, -1, 5, 3)
    wanted = [one_after_the_other(shard, None, params, running, 2)[0] for shard in shards]
    assert_close(y, jnp.concatenate(wanted), 1e-11)
    assert_close(new, jbn.ema(0.5)(running, jbn.moments(x)), 1e-11)
    assert collectives(mapped, x, params, running) == ["all-reduce"]
    assert collectives(lambda *args: mapped(*args)[0], x, params, running) == []
    dx = jax.grad(lambda x: jnp.sum(jnp.sin(mapped(x, params, running)[0])))
    assert collectives(dx, x) == []


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_n_over_devices_gives_local_statistics_under_plain_jit(kind):
    x, (params, running) = random((ROWS, 5, 3), dtype="float32"), layer(dtype="float32")
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("i")))
        f = partial(at_once, size=ROWS // DEVICES)
        y, new = jax.jit(f)(sharded, None, params, running)
        forward = lambda x: f(x, None, params, running)[0]
        dx = jax.grad(lambda x: jnp.sum(jnp.sin(forward(x))))
        assert collectives(forward, sharded) == []
        assert collectives(dx, sharded) == []
        assert y.sharding.is_equivalent_to(sharded.sharding, y.ndim)
    local = [reference.batch_norm(shard, *params) for shard in np.split(x, DEVICES)]
    assert_allclose(y, np.concatenate(local), atol=2e-5)
    assert_close(new, jbn.ema(0.5)(running, jbn.moments(x)), 1e-5)


@pytest.mark.parametrize("size", [5])
def test_parts_that_devices_share_are_exact_on_an_explicit_mesh(size):
    x, (params, running) = random((ROWS, 5, 3), dtype="float32"), layer(dtype="float32")
    mask = np.random.RandomState(1).rand(ROWS, 1, 1).astype(np.float32)
    f = quick_jit(partial(gradients, at_once, size=size))
    expected = f(x, mask, params, running)  # on one device
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, mask = jax.device_put((x, mask), NamedSharding(mesh, P("i")))
        actual = f(x, mask, params, running)
    assert_close(actual, expected, 3e-5)
    assert actual[0][1][0].sharding.spec == actual[1][0].sharding.spec == P("i", None, None)


@pytest.mark.parametrize("size", [ROWS // DEVICES, 5])
@pytest.mark.parametrize("of_x, of_mask", [(P("i"), P()), (P(), P("i"))])
def test_mask_may_be_sharded_in_another_way_than_x_on_an_explicit_mesh(size, of_x, of_mask):
    x, (params, running) = random((ROWS, 5, 3), dtype="float32"), layer(dtype="float32")
    mask = np.random.RandomState(1).rand(ROWS, 1, 1).astype(np.float32)
    f = quick_jit(partial(gradients, at_once, size=size))
    expected = f(x, mask, params, running)
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, mask = (jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in ((x, of_x), (mask, of_mask)))
        assert_close(f(x, mask, params, running), expected, 3e-5)


def test_backward_pass_keeps_x_in_its_own_dtype():
    x, (params, running) = random((250, 4, 3), dtype="bfloat16"), layer(dtype="float32")
    f = lambda x, params: at_once(x, None, params, running, 16)[0]
    kept = jax.tree.leaves(jax.jit(lambda x, params: jax.vjp(f, x, params)[1])(x, params))
    padded = 16 * 16 * 4 * 3 * 2  # 250 examples in 16 parts of 15 or 16
    assert sum(leaf.nbytes for leaf in kept) <= padded + 16 * 16 + 16 * 8 * 3 * 4


@pytest.mark.parametrize(
    "size, error, message",
    [
        (0, ValueError, "virtual_batch_size=0; wanted a number of examples >= 1, or None"),
        (-2, ValueError, "virtual_batch_size=-2; wanted"),
        (2.5, TypeError, "virtual_batch_size=2.5; wanted an integer"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_bad_sizes_are_named(train, size, error, message):
    x, (params, running) = random((4, 3), dtype="float32"), layer(dtype="float32")
    with pytest.raises(error, match=message):
        jbn.batch_norm(x, params, running, train=train, virtual_batch_size=size)


def test_x_without_a_batch_axis_is_named():
    params, running = layer(dtype="float32")
    f = lambda x: jbn.batch_norm(x, params, running, train=True, axis_name="i", virtual_batch_size=2)[0]
    with pytest.raises(ValueError, match=r"needs a batch axis to split, but x of shape \(3,\)"):
        jax.vmap(f, axis_name="i")(random((4, 3), dtype="float32"))
