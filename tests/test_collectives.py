"""One batch over eight devices, or over a vmap, is the batch on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import collectives, quick_jit
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn._collectives import NamedAxes, named_axes, smallest_group

MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
ROWS, FEATURES = 16, 3
GROUPS = [[0, 5, 2], [1, 3, 4, 6, 7]]
RULE = jbn.ema(0.5)


def random(shape, mean=0.0, sd=1.0, seed=0, dtype="float32"):
    x = np.random.RandomState(seed).normal(mean, sd, shape)
    return jnp.asarray(x + 1j * x[::-1] if dtype.startswith("complex") else x, dtype)


def masks():
    rng = np.random.RandomState(7)
    return {
        "no mask": None,
        "unequal counts": np.arange(ROWS)[:, None, None] % 5 > 1,
        "weights per feature": rng.gamma(1.0, size=(ROWS, 5, FEATURES)).astype(np.float32),
        "six empty shards": np.arange(ROWS)[:, None, None] // 2 % 4 == 1,
    }


def layer(dtype="float32"):
    _, running = jbn.init(FEATURES, dtype=dtype)
    return jbn.Params(random(FEATURES, 1, 0.3, 1, dtype), random(FEATURES, 0, 1, 2, dtype)), running


def on_devices(f, names, check_vma=True, out_specs=None):
    """Maps `f(x, mask, params, running)` over shards of `x` and `mask`."""
    spec = P(names)
    return jax.jit(
        jax.shard_map(
            f,
            mesh=MESH,
            in_specs=(spec, spec, P(), P()),
            out_specs=(spec, P()) if out_specs is None else out_specs,
            check_vma=check_vma,
        )
    )


def train_layer(x, mask, params, running, **options):
    return jbn.batch_norm(x, params, running, train=True, mask=mask, update=RULE, **options)


def per_example(names):
    """Written for one example of shape (5, C), or for one position of shape (C,) inside two maps."""

    def f(x, mask, params, running):
        one = lambda x, mask: train_layer(x, mask, params, running, axis_name=names)
        for name in names:
            one = jax.vmap(one, (0, None if mask is None else 0), (0, None), axis_name=name)
        return one(x, mask)

    return f


def per_example_in(device):
    def f(x, mask, params, running):
        one = lambda x, mask: train_layer(x, mask, params, running, axis_name=("i", device))
        return jax.vmap(one, (0, None if mask is None else 0), (0, None), axis_name="i")(x, mask)

    return f


WAYS = {
    "shard_map, one axis": on_devices(partial(train_layer, axis_name="a"), "a"),
    "shard_map, two axes": on_devices(partial(train_layer, axis_name=["a", "b"]), ("a", "b")),
    "shard_map, unchecked": on_devices(partial(train_layer, axis_name="b"), "b", check_vma=False),
    "vmap per example": per_example(["i"]),
    "vmap per position": per_example(["j", "i"]),
    "vmap in shard_map": on_devices(per_example_in("a"), "a", check_vma=False),
}


def loss_and_state(way, target):
    def loss(x, params, mask, running):
        y, new = way(x, mask, params, running)
        return jnp.sum(jnp.real(jnp.sin(y) * target)), (y, new)

    return loss


def assert_close(actual, expected, tolerance):
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


@pytest.mark.parametrize(
    "way, mask",
    [
        *((way, mask) for way in ("shard_map, two axes", "vmap per example") for mask in masks()),
        ("shard_map, one axis", "six empty shards"),
        ("shard_map, unchecked", "six empty shards"),
        ("vmap per position", "six empty shards"),
        ("vmap in shard_map", "six empty shards"),
    ],
)
def test_value_state_and_gradient_are_those_of_one_device(x64, way, mask):
    x, target = random((ROWS, 5, FEATURES), 3, 2, dtype="float64"), random((ROWS, 5, FEATURES), seed=3)
    (params, running), mask = layer("float64"), masks()[mask]
    if mask is not None:
        mask = np.broadcast_to(mask, (ROWS, 5, mask.shape[-1]))
    target = target.astype(x.dtype)
    actual, expected = (
        quick_jit(jax.value_and_grad(loss_and_state(f, target), (0, 1), has_aux=True))(
            x, params, mask, running
        )
        for f in (WAYS[way], train_layer)
    )
    assert_close(actual, expected, 1e-11)
    assert_close(expected[0][1][0], reference.batch_norm(x, *params, mask=mask), 1e-11)


@pytest.mark.parametrize(
    "way, derivative",
    [
        *(
            ("shard_map, two axes", derivative)
            for derivative in ("linearize", "hessian", "reverse over reverse")
        ),
        ("vmap per example", "hessian"),
    ],
)
def test_further_derivatives_are_those_of_one_device(x64, derivative, way):
    x, target = random((ROWS, 2, FEATURES), 3, 2, dtype="float64"), random((ROWS, 2, FEATURES), seed=3)
    params, running = layer("float64")
    mask = np.broadcast_to(masks()["unequal counts"], (ROWS, 2, 1))

    def derive(way):
        def loss(direction, params):
            # A few numbers that move every x; the Hessian in x itself would be large.
            x_moved = x + jnp.sin(x) * direction[None, None]
            return loss_and_state(way, target.astype(x.dtype))(x_moved, params, mask, running)[0]

        args = jnp.ones(FEATURES, x.dtype), params
        tangents = jax.tree.map(jnp.cos, args)
        return {
            "jvp": lambda: jax.jvp(loss, args, tangents),
            "linearize": lambda: jax.linearize(loss, *args)[1](*tangents),
            "hessian": lambda: jax.hessian(loss, (0, 1))(*args),
            "reverse over reverse": lambda: jax.jacrev(jax.grad(loss, (0, 1)), (0, 1))(*args),
        }[derivative]

    assert_close(quick_jit(derive(WAYS[way]))(), quick_jit(derive(train_layer))(), 1e-9)


def test_further_derivatives_of_many_narrow_samples_are_those_of_one_device():
    # So many on each device that the backward pass adds up a third sum, for GPUs.
    x, target = (random((8 * 8200, FEATURES), 3, 2, seed, "bfloat16") for seed in (0, 1))
    params, running = layer()

    def derive(way):
        def norm_of_the_gradient(params):
            def loss(x, params):
                y, _ = way(x, None, params, running)
                return jnp.mean((jnp.sin(y) * target).astype(jnp.float32))

            return jnp.sum(jax.grad(loss)(x, params).astype(jnp.float32) ** 2)

        return jax.grad(norm_of_the_gradient)(params)

    for actual, expected in zip(*(derive(way) for way in (WAYS["shard_map, two axes"], train_layer))):
        assert_allclose(actual, expected, rtol=0.02)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_dtypes_are_those_of_one_device(dtype):
    x, (params, running) = random((ROWS, 5, FEATURES), 3, 2, dtype=dtype), layer(dtype)
    actual = WAYS["shard_map, two axes"](x, None, params, running)
    expected = train_layer(x, None, params, running)
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)
    tolerance = {"float16": 2e-2, "bfloat16": 5e-2}.get(dtype, 1e-5)
    assert_close(jax.tree.map(jnp.abs, actual), jax.tree.map(jnp.abs, expected), tolerance)


@pytest.mark.parametrize("way", ["shard_map, two axes", "vmap per example", "vmap per position"])
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_large_means_are_exact_from_the_first_step(size, way):
    x, (params, running) = random((ROWS, 64, FEATURES), size, 1), layer()
    y, new = jax.jit(WAYS[way])(x, None, params, running)
    mean, var, _ = reference.moments(x)
    step = np.spacing(np.float32(size))
    assert_allclose(y, reference.batch_norm(x, *params), atol=4 * step)
    assert_allclose(2 * new.mean, mean, atol=2 * step)
    assert_allclose(2 * new.var - 1, var, rtol=1e-6)


def test_counts_8_and_2_give_the_exact_mean():
    # The average of the two shards' means is 2.71.
    low, high = 1.13 / 3, 15.13 / 3
    x = jnp.concatenate([jnp.full((8, 1), low), jnp.full((8, 1), high)])
    mask = (jnp.arange(16) < 10)[:, None]
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    f = lambda x, mask: jbn.moments(x, mask=mask, axis_name="a")
    moments = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P()))(x, mask)
    assert_allclose(moments.mean, 1.31, rtol=1e-6)
    assert_allclose(moments.var, np.var([low] * 8 + [high] * 2), rtol=1e-6)
    assert_array_equal(moments.count, 10)


@pytest.mark.parametrize("way", ["shard_map, two axes", "vmap per example"])
@pytest.mark.parametrize("counted", [0, 5])
def test_uncounted_rows_may_hold_anything_on_any_device(counted, way):
    clean, (params, running) = random((ROWS, 5, FEATURES)), layer()
    mask = np.broadcast_to(np.arange(ROWS)[:, None, None] < counted, (ROWS, 5, 1))
    x = jnp.where(mask, clean, np.nan).at[-1].set(np.inf)

    @partial(jax.jit, static_argnums=0)
    def gradients(way, x, params):
        def loss(x, params):
            y, new = way(x, mask, params, running)
            return jnp.sum(jnp.sin(y), where=mask), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    (dx, dparams), (y, new) = gradients(WAYS[way], x, params)
    assert np.isfinite(y).all()
    assert_array_equal(dx[counted:], 0)
    if counted:
        wanted, (y_wanted, new_wanted) = gradients(train_layer, clean, params)
        assert_close((dx[:counted], dparams, new), (wanted[0][:counted], wanted[1], new_wanted), 1e-5)
        assert_close(y[:counted], y_wanted[:counted], 1e-5)
    else:
        jax.tree.map(assert_array_equal, new, running)
        jax.tree.map(lambda leaf: assert_array_equal(leaf, 0), dparams)


def test_nan_on_one_device_spares_the_running_moments_of_all():
    x, (params, running) = random((ROWS, 5, FEATURES)).at[3, 2, 1].set(np.nan), layer()
    _, new = WAYS["shard_map, two axes"](x, None, params, running)
    _, clean = train_layer(x.at[3, 2, 1].set(0), None, params, running)
    for leaf, old, wanted in zip(new, running, clean):
        assert_allclose(leaf, np.where([False, True, False], old, wanted), rtol=1e-5, atol=1e-6)


def test_moments_carry_their_gradient_over_devices(x64):
    x, w = random((ROWS, FEATURES), 3, 2, dtype="float64"), np.random.RandomState(1).rand(ROWS, FEATURES)

    def loss(x, **options):
        mean, var, count = jbn.moments(x, mask=w, **options)
        return jnp.sum(jnp.sin(mean) + var**2 / count)

    def over_devices(x):
        f = lambda x, w: jbn.moments(x, mask=w, axis_name=("a", "b"))
        mean, var, count = jax.shard_map(f, mesh=MESH, in_specs=P(("a", "b")), out_specs=P())(x, w)
        return jnp.sum(jnp.sin(mean) + var**2 / count)

    for derive in jax.grad, jax.hessian:
        actual, expected = quick_jit(derive(over_devices))(x), quick_jit(derive(loss))(x)
        assert_allclose(actual, expected, rtol=1e-10, atol=1e-14)


def in_scan(f):
    return lambda x: jax.lax.scan(lambda total, x: (total + f(x[None])[0], None), 0.0, x)[0]


@pytest.mark.parametrize("stage", [jax.jit, jax.checkpoint, in_scan], ids=range(3))
def test_gradient_of_a_vmap_that_was_staged_before(x64, stage):
    # JAX forgets the axis name in a custom rule here; the layer must not depend on it.
    x, (params, running) = random((2, ROWS, FEATURES), 3, 2, dtype="float64"), layer("float64")

    def loss(way):
        one = lambda x: jnp.sum(jnp.sin(way(x, None, params, running)[0]))
        return lambda x: jnp.sum(stage(lambda x: jax.vmap(one)(x))(x))

    actual, expected = (quick_jit(jax.grad(loss(way)))(x) for way in (per_example(["i"]), train_layer))
    assert_close(actual, expected, 1e-11)


# Groups.


def groups_on_devices(x, mask, params, running):
    def f(x, mask, params, running):
        y, new = train_layer(x, mask, params, running, axis_name=("a", "b"), axis_index_groups=GROUPS)
        return y, jax.tree.map(lambda leaf: leaf[None], new)

    return on_devices(f, ("a", "b"), out_specs=P(("a", "b")))(x, mask, params, running)


def groups_in_vmap(x, mask, params, running):
    f = partial(train_layer, axis_name="i", axis_index_groups=GROUPS)
    shards = lambda x: x.reshape(8, ROWS // 8, *x.shape[1:])
    y, new = jax.vmap(f, (0, 0, None, None), axis_name="i")(shards(x), shards(mask), params, running)
    return y.reshape(x.shape), new


def groups_in_vmap_in_shard_map(x, mask, params, running):
    def f(x, mask, params, running):
        g = partial(train_layer, axis_name=("a", "i"), axis_index_groups=GROUPS)
        return jax.vmap(g, (0, 0, None, None), axis_name="i")(x, mask, params, running)

    shards = lambda x: x.reshape(8, ROWS // 8, *x.shape[1:])
    mapped = on_devices(f, "a", check_vma=False, out_specs=P("a"))
    y, new = mapped(shards(x), shards(mask), params, running)
    return y.reshape(x.shape), new


def one_group_after_the_other(x, mask, params, running):
    y, new = jnp.zeros_like(x), [None] * 8
    for group in GROUPS:
        rows = np.concatenate([np.arange(ROWS).reshape(8, -1)[i] for i in group])
        y_group, new_group = train_layer(x[rows], mask[rows], params, running)
        y = y.at[rows].set(y_group)
        for i in group:
            new[i] = new_group
    return y, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)


@pytest.mark.parametrize("way", [groups_on_devices, groups_in_vmap, groups_in_vmap_in_shard_map])
def test_groups_of_any_sizes_share_among_themselves_only(x64, way):
    x, target = random((ROWS, 5, FEATURES), 3, 2, dtype="float64"), random((ROWS, 5, FEATURES), seed=3)
    (params, running), mask = layer("float64"), masks()["weights per feature"]
    target = target.astype(x.dtype)
    actual, expected = (
        quick_jit(jax.value_and_grad(loss_and_state(f, target), (0, 1), has_aux=True))(
            x, params, mask, running
        )
        for f in (way, one_group_after_the_other)
    )
    assert_close(actual, expected, 1e-11)


def test_nan_in_one_group_does_not_reach_another():
    x, (params, running), mask = random((ROWS, 5, FEATURES)), layer(), np.ones((ROWS, 5, 1), bool)
    y, new = groups_on_devices(x.at[0].set(np.nan), mask, params, running)  # member 0, first group
    first = np.isin(np.arange(8), GROUPS[0])
    assert np.isnan(y[np.repeat(first, 2)]).all() and np.isfinite(y[np.repeat(~first, 2)]).all()
    assert_array_equal(new.mean[first], 0)
    assert np.all(new.mean[~first] != 0)


# Cost.


@pytest.mark.parametrize(
    "params, mask, options",
    [
        ("scale and bias", "no mask", {}),
        ("scale and bias", "weights per feature", {}),
        ("scale", "no mask", {}),
        ("neither", "no mask", {}),
        ("scale and bias", "weights per feature", {"axis_index_groups": GROUPS}),
    ],
)
def test_a_layer_has_one_collective_forward_and_one_backward(params, mask, options):
    x, (both, running), mask = random((ROWS, 5, FEATURES)), layer(), masks()[mask]
    params = {"scale and bias": both, "scale": both._replace(bias=None), "neither": None}[params]
    names = ("a", "b")
    out_specs = P(names) if options else (P(names), P())

    def f(x, mask, params, running):
        y, new = train_layer(x, mask, params, running, axis_name=names, **options)
        return y, jax.tree.map(lambda leaf: leaf[None], new) if options else new

    forward = on_devices(f, names, out_specs=out_specs)
    assert collectives(forward, x, mask, params, running) == ["all-reduce"]

    def backward(x, mask, params, running, dy):
        y, vjp = jax.vjp(lambda x, params: forward(x, mask, params, running)[0], x, params)
        return y, vjp(dy)

    # The gradients are all there: of x, of scale and of bias.
    assert collectives(backward, x, mask, params, running, x) == ["all-reduce"] * 2


def test_ten_layers_have_ten_collectives_each_way():
    x, (params, running) = random((ROWS, 5, FEATURES)), layer()

    def f(x, mask, params, running):
        for _ in range(10):
            x, running = train_layer(jnp.sin(x), mask, params, running, axis_name=("a", "b"))
        return x, running

    forward = on_devices(f, ("a", "b"))
    assert len(collectives(forward, x, None, params, running)) == 10
    loss = lambda x, params: jnp.sum(forward(x, None, params, running)[0] ** 3)
    # One more for the sum, and one for the gradients of the ten layers' one scale and bias.
    assert len(collectives(jax.grad(loss, (0, 1)), x, params)) <= 22


def test_inference_has_no_collective_and_needs_no_axis():
    x, (params, running) = random((ROWS, 5, FEATURES)), layer()
    f = lambda x: jbn.batch_norm(x, params, running, train=False, axis_name="nowhere")[0]
    assert collectives(f, x) == []
    assert_allclose(f(x), reference.normalize(x, running.mean, running.var, *params), atol=5e-6)


def test_local_statistics_need_no_collective_but_for_the_gradients_of_the_parameters():
    x, (params, running) = random((ROWS, 5, FEATURES)), layer()
    f = on_devices(lambda *args: train_layer(*args)[0], ("a", "b"), out_specs=P(("a", "b")))
    assert collectives(f, x, None, params, running) == []
    loss = lambda x, params: jnp.sum(jnp.sin(f(x, None, params, running)))
    assert collectives(jax.grad(loss), x, params) == []
    assert collectives(jax.grad(loss, (0, 1)), x, params) == ["all-reduce"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_pass_keeps_x_in_its_own_dtype_on_each_device(dtype):
    x, (params, running) = random((256, 4, FEATURES), dtype=dtype), layer()

    def residuals(x, mask, params, running):
        f = lambda x, params: train_layer(x, mask, params, running, axis_name=("a", "b"))[0]
        return jax.tree.map(lambda leaf: leaf[None], jax.tree.leaves(jax.vjp(f, x, params)[1]))

    kept = on_devices(residuals, ("a", "b"), out_specs=P(("a", "b")), check_vma=False)
    kept = jax.jit(kept)(x, None, params, running)
    per_device = [leaf.nbytes // 8 for leaf in kept]
    assert sum(per_device) <= x.nbytes // 8 + 8 * FEATURES * 4


@pytest.mark.parametrize("mask", [None, np.ones((8, 8, 8, 1), np.float32)])
def test_backward_pass_of_a_vmap_keeps_x_in_its_own_dtype(mask):
    x, (params, running) = random((8, 8, 8, 32), dtype="bfloat16"), jbn.init(32)

    def residuals(x, params):
        f = lambda x, params: per_example(["i"])(x, mask, params, running)[0]
        return jax.vjp(f, x, params)[1]

    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.jit(residuals)(x, params)))
    assert kept <= x.nbytes + (0 if mask is None else mask.nbytes) + 8 * 10 * 32 * 4


# Arguments.


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"axis_name": "nowhere"},
            "axis_name='nowhere': 'nowhere' is not bound here.*shard_map.*jax.vmap.*axis_name=None",
        ),
        ({"axis_name": ("i", "there")}, "'there' is not bound"),
        ({"axis_name": ("i", "i")}, "names an axis twice"),
        ({"axis_name": "i", "axis_index_groups": [[0, 1]]}, "0 to 3, in exactly one group"),
        ({"axis_name": "i", "axis_index_groups": [[0, 1], [1, 2, 3]]}, "0 to 3, in exactly one group"),
        ({"axis_name": "i", "axis_index_groups": [[], [0, 1, 2, 3]]}, "in exactly one group, and no empty"),
        ({"axis_name": "i", "axis_index_groups": [[0, 1, 2, 3], ()]}, "in exactly one group, and no empty"),
        (
            {"axis_name": "i", "axis_index_groups": [0, 1, 2, 3]},
            r"\[0, 1, 2, 3\] with axis_name='i'; expected each",
        ),
        ({"axis_index_groups": [[0, 1]]}, "needs axis_name, which is None"),
    ],
)
def test_bad_names_and_groups_are_named(options, message):
    x, (params, running) = random((4, 5, FEATURES)), layer()
    with pytest.raises(ValueError, match=message):
        jax.vmap(lambda x: train_layer(x, None, params, running, **options), axis_name="i")(x)
    with pytest.raises(ValueError, match=message):
        jax.vmap(lambda x: jbn.moments(x, **options), axis_name="i")(x)


def test_vmap_axis_in_a_checked_shard_map_names_the_way_out():
    x, (params, running) = random((ROWS, 5, FEATURES)), layer()
    for f in per_example(["i"]), per_example_in("a"):
        with pytest.raises(ValueError, match="names a vmap axis inside a jax.shard_map.*check_vma=False"):
            on_devices(f, "a")(x, None, params, running)


def test_names_and_groups_are_hashable_and_counted():
    def f(x):
        one = named_axes("i", None)
        assert one == NamedAxes(("i",)) and smallest_group(one) == 8
        grouped = named_axes(["i"], np.array([[0, 1, 2], [3, 4, 5]]).tolist() + [[6, 7]])
        assert grouped == NamedAxes(("i",), ((0, 1, 2), (3, 4, 5), (6, 7))) and smallest_group(grouped) == 2
        assert hash(grouped) == hash(NamedAxes(("i",), ((0, 1, 2), (3, 4, 5), (6, 7))))
        assert smallest_group(named_axes(None, None)) == 1
        return x

    jax.vmap(f, axis_name="i")(jnp.arange(8.0))
