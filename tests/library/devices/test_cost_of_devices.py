"""What statistics over devices send, counted in compiled programs, and what is kept for the backward pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn.linen
from benchmarks.devices import all_reduces
from jbn._merging import MOST_IN_ROWS
from tests.helpers import reference
from tests.helpers.compiled import collectives
from tests.helpers.layers import layer, on_devices, per_example, random, train

SHAPE, NAMES = (16, 5, 3), ("a", "b")


@pytest.mark.parametrize(
    "learnt, weighted, groups",
    [
        ("scale and bias", False, None),
        pytest.param("scale", True, None, marks=pytest.mark.slow),
        pytest.param("neither", False, None, marks=pytest.mark.slow),
        pytest.param("scale and bias", True, [[0, 5, 2], [1, 3, 4, 6, 7]], marks=pytest.mark.slow),
    ],
)
def test_a_layer_has_one_collective_forward_and_one_backward(learnt, weighted, groups):
    x, (params, running) = random(SHAPE), layer(3)
    params = {"scale": params._replace(bias=None), "neither": None}.get(learnt, params)
    mask = np.random.RandomState(7).gamma(1.0, size=SHAPE).astype("float32") if weighted else None

    def f(*args):
        y, new = train(*args, axis_name=NAMES, axis_index_groups=groups)
        return y, jax.tree.map(lambda leaf: leaf[None], new) if groups else new

    forward = on_devices(f, NAMES, out_specs=P(NAMES) if groups else (P(NAMES), P()))

    def both_ways(x, mask, params, running, dy):
        y, vjp = jax.vjp(lambda x, params: forward(x, mask, params, running)[0], x, params)
        return y, vjp(dy)

    # The gradients are all there: of x, of scale and of bias.
    assert collectives(both_ways, x, mask, params, running, x) == ["all-reduce"] * 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_devices_exchange_a_few_numbers_a_feature_and_no_samples(dtype, masked):
    # So many rows that 16-bit samples take the other backward pass.
    x, mask = jax.ShapeDtypeStruct((8 * 8200, 3), dtype), jax.ShapeDtypeStruct((8 * 8200, 1), bool)
    params, running = jbn.init(3)
    forward = on_devices(
        lambda x, mask, *rest: train(x, mask if masked else None, *rest, axis_name=NAMES)[0],
        NAMES,
        out_specs=P(NAMES),
    )

    def both_ways(x, mask, params, dy):
        y, vjp = jax.vjp(lambda x, params: forward(x, mask, params, running), x, params)
        return y, vjp(dy)

    lowered = jax.jit(both_ways).lower(x, mask, params, x)
    assert lowered.as_text().count("stablehlo.all_reduce") == 2  # one each way, before XLA combines any
    sizes = [size for size, _ in all_reduces(lowered.compile().as_text())]
    assert len(sizes) == 2 and max(sizes) <= 8 * 4 * 3 * 4  # bytes of 4 numbers a feature and device


@pytest.mark.slow
def test_three_layers_have_three_collectives_each_way():
    x, (params, running) = random(SHAPE), layer(3)

    def f(x, mask, params, running):
        for _ in range(3):
            x, running = train(jnp.sin(x), mask, params, running, axis_name=NAMES)
        return x, running

    forward = on_devices(f, NAMES)
    assert len(collectives(forward, x, None, params, running)) == 3
    loss = lambda x, params: jnp.sum(forward(x, None, params, running)[0] ** 3)
    # One more for the sum, and one for the gradients of the three layers' one scale and bias.
    assert len(collectives(jax.grad(loss, (0, 1)), x, params)) <= 8


def test_inference_has_no_collective_and_needs_no_axis():
    x, (params, running) = random(SHAPE), layer(3)
    f = lambda x: jbn.batch_norm(x, params, running, train=False, axis_name="nowhere")[0]
    assert collectives(f, x) == []
    assert_allclose(jax.jit(f)(x), reference.normalize(x, running.mean, running.var, *params), atol=5e-6)


@pytest.mark.slow
def test_local_statistics_need_no_collective_but_for_the_gradients_of_the_parameters():
    x, (params, running) = random(SHAPE), layer(3)
    f = on_devices(lambda *args: train(*args)[0], NAMES, out_specs=P(NAMES))
    loss = lambda x, params: jnp.sum(jnp.sin(f(x, None, params, running)))
    assert collectives(jax.value_and_grad(loss), x, params) == ["all-reduce"]  # of the loss
    assert collectives(jax.grad(loss, (0, 1)), x, params) == ["all-reduce"]


@pytest.mark.slow
def test_many_features_on_many_devices_take_two_or_three_small_collectives():
    features = MOST_IN_ROWS // 8 + 1
    x = np.asarray(random((16, features), mean=5, sd=1)) + np.float32(np.arange(16))[:, None]
    mask = (np.arange(16) % 3 > 0)[:, None]
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    for counted in mask, None:
        f = jax.shard_map(
            lambda x, mask: jbn.moments(x, mask=mask, axis_name="i"),
            mesh=mesh,
            in_specs=(P("i"), None if counted is None else P("i")),
            out_specs=P(),
        )
        # Of their counts, if those may differ; of their means; and of what is left about the mean of these.
        assert collectives(f, x, counted) == ["all-reduce"] * (2 if counted is None else 3)
        of_samples = np.ones((16, 1)) if counted is None else counted
        mean = np.average(np.float64(x), 0, of_samples[:, 0])
        var = np.average((np.float64(x) - mean) ** 2, 0, of_samples[:, 0])
        for leaf, expected in zip(jax.jit(f)(x, counted), (mean, var, of_samples.sum())):
            assert_allclose(leaf, np.broadcast_to(expected, leaf.shape), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flavour, rows, dtype", [("jbn", 32, "float32"), ("flax", 32, "float32"), ("jbn", 65536, "bfloat16")]
)
def test_a_sharded_batch_under_plain_jit_takes_one_collective_each_way(flavour, rows, dtype):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    sharded, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())
    norm = {"jbn": jbn.linen.BatchNorm, "flax": nn.BatchNorm}[flavour](use_running_average=False)
    x = jax.ShapeDtypeStruct((rows, 16), dtype, sharding=sharded)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf.update(sharding=whole), variables)

    def both(variables, x):
        f = lambda params, x: norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        y, backward, updated = jax.vjp(f, variables["params"], x, has_aux=True)
        return y, updated, backward(jnp.sin(y))

    for platform in ("cpu", "cuda", "tpu") if flavour == "jbn" else ("cpu",):
        text = jax.jit(both).trace(variables, x).lower(lowering_platforms=(platform,)).compile().as_text()
        always = [in_branch for _, in_branch in all_reduces(text) if not in_branch]
        assert len(always) == 2, platform


# What is kept is known before it is compiled.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_pass_keeps_x_in_its_own_dtype_on_each_device(dtype):
    x, (params, running) = random((256, 4, 3), dtype), layer(3)

    def residuals(x, mask, params, running):
        f = lambda x, params: train(x, mask, params, running, axis_name=NAMES)[0]
        return jax.tree.map(lambda leaf: leaf[None], jax.tree.leaves(jax.vjp(f, x, params)[1]))

    kept = on_devices(residuals, NAMES, out_specs=P(NAMES), check_vma=False)
    kept = jax.eval_shape(kept, x, None, params, running)
    per_device = sum(leaf.size * leaf.dtype.itemsize // 8 for leaf in kept)
    assert x.nbytes // 8 <= per_device <= x.nbytes // 8 + 8 * 3 * 4


@pytest.mark.parametrize("mask", [None, np.ones((8, 8, 8, 1), np.float32)])
def test_backward_pass_of_a_vmap_keeps_x_in_its_own_dtype(mask):
    x, (params, running) = random((8, 8, 8, 32), "bfloat16"), jbn.init(32)

    def residuals(x, params):
        return jax.vjp(lambda x, params: per_example(["i"])(x, mask, params, running)[0], x, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, x, params))
    of_mask = 0 if mask is None else mask.nbytes
    assert (
        x.nbytes <= sum(leaf.size * leaf.dtype.itemsize for leaf in kept) <= x.nbytes + of_mask + 8 * 10 * 128
    )
