import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen

OPTIONS = [
    {},
    {"axis": (1, -1)},
    {"axis": 1, "momentum": 0.5, "epsilon": 1e-3},
    {"use_scale": False},
    {"use_bias": False},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"scale_init": nn.initializers.constant(2.0), "bias_init": nn.initializers.constant(-1.0)},
]


def random(shape, dtype="float32", mean=1.0, sd=2.0):
    return jnp.asarray(np.random.RandomState(0).normal(mean, sd, shape), dtype)


def close(a, b):
    jax.tree.map(lambda p, q: assert_allclose(np.float32(p), np.float32(q), rtol=1e-5, atol=5e-6), a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variables_dtypes_and_numbers_are_those_of_flax_on_ordinary_input(standard_promotion, dtype, options):
    x, key, mask = random((8, 4, 3), dtype), jax.random.key(0), jnp.arange(8)[:, None, None] > 2
    theirs, ours = nn.BatchNorm(use_fast_variance=False, **options), jbn.linen.BatchNorm(**options)
    variables, ours_variables = (layer.init(key, x, use_running_average=False) for layer in (theirs, ours))
    assert jax.tree.structure(variables) == jax.tree.structure(ours_variables)
    jax.tree.map(assert_array_equal, variables, ours_variables)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), v) for v in (variables, ours_variables)]
    assert shapes[0] == shapes[1]
    for step_mask in (None, mask):
        (y, updated), (ours_y, ours_updated) = (
            layer.apply(variables, x, use_running_average=False, mask=step_mask, mutable=["batch_stats"])
            for layer in (theirs, ours)
        )
        assert y.dtype == ours_y.dtype
        # bfloat16 results may round to neighbours
        tolerance = 2e-2 if y.dtype == jnp.bfloat16 else 5e-6
        assert_allclose(np.float32(ours_y), np.float32(y), atol=tolerance, rtol=tolerance)
        close(ours_updated, updated)
        variables = {**variables, **updated}
    y, ours_y = (layer.apply(variables, x, use_running_average=True) for layer in (theirs, ours))
    assert_allclose(np.float32(ours_y), np.float32(y), atol=tolerance, rtol=tolerance)
    assert y.dtype == ours_y.dtype


def test_running_statistics_and_outputs_are_those_of_float64():
    layer, x = jbn.linen.BatchNorm(momentum=0.75), random((16, 3))
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    mean, var, _ = reference.moments(x)
    assert_allclose(y, reference.batch_norm(x), atol=5e-6)
    assert_allclose(updated["batch_stats"]["mean"], 0.25 * mean, rtol=1e-5)
    assert_allclose(updated["batch_stats"]["var"], 0.75 + 0.25 * var, rtol=1e-5)
    z = layer.apply({**variables, **updated}, x, use_running_average=True)
    assert_allclose(z, reference.normalize(x, 0.25 * mean, 0.75 + 0.25 * var), atol=5e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_works_under_strict_promotion(dtype):
    layer, x = jbn.linen.BatchNorm(), random((16, 3), dtype)
    y, _ = layer.init_with_output(jax.random.key(0), x, use_running_average=False)
    assert y.dtype == jnp.float32  # what Flax returns too: x promoted with float32 parameters
    assert_allclose(y, reference.batch_norm(x), atol=5e-6)


def test_complex_input_has_a_complex_mean_and_a_real_variance():
    x = jax.lax.complex(random((16, 3)), random((16, 3), mean=2.0, sd=3.0)[::-1])
    layer = jbn.linen.BatchNorm(momentum=0.0)
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    mean, var, _ = reference.moments(x)
    assert_allclose(y, reference.batch_norm(x), atol=5e-6)
    assert_allclose(updated["batch_stats"]["mean"], mean, rtol=1e-5)
    assert_allclose(updated["batch_stats"]["var"], var, rtol=1e-5)
    z = layer.apply({**variables, **updated}, x, use_running_average=True)
    assert_allclose(z, y, atol=5e-6)


def test_init_leaves_the_running_statistics_as_they_start():
    variables = jbn.linen.BatchNorm().init(jax.random.key(0), random((16, 3)), use_running_average=False)
    assert_array_equal(variables["batch_stats"]["mean"], 0)
    assert_array_equal(variables["batch_stats"]["var"], 1)


def test_large_mean_costs_no_accuracy():
    x = random((512, 3), mean=1e4, sd=1.0)
    y, _ = jbn.linen.BatchNorm().init_with_output(jax.random.key(0), x, use_running_average=False)
    assert_allclose(y, reference.batch_norm(x), atol=4e-3)


def test_momentum_may_be_a_traced_schedule():
    x = random((16, 3))
    variables = jbn.linen.BatchNorm().init(jax.random.key(0), x, use_running_average=False)

    @jax.jit
    def step(momentum):
        layer = jbn.linen.BatchNorm(momentum=momentum)
        return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])[1]

    for momentum in (0.0, 0.5):
        assert_allclose(step(momentum)["batch_stats"]["mean"], (1 - momentum) * np.mean(x, 0), rtol=1e-5)


@pytest.mark.parametrize("rule", [jbn.ema(0.9, debias=True), jbn.cumulative(), jbn.pooled()])
def test_any_update_rule_keeps_its_count_beside_the_statistics(rule):
    layer, x = jbn.linen.BatchNorm(update=rule), random((5, 16, 3))
    variables = layer.init(jax.random.key(0), x[0], use_running_average=False)
    _, expected = jbn.init(3)
    for batch in x:
        _, updated = layer.apply(variables, batch, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **updated}
        _, expected = jbn.batch_norm(batch, None, expected, train=True, update=rule)
    assert_allclose(jbn.Moments(**variables["batch_stats"]), expected, rtol=1e-6)


def test_axis_name_shares_the_batch_over_devices_and_init_needs_no_axis():
    layer, x = jbn.linen.BatchNorm(use_running_average=False, axis_name="i"), random((16, 3))
    variables = layer.init(jax.random.key(0), x[:2])
    mask = jnp.arange(16)[:, None] > 4
    apply = lambda x, mask: layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(apply, mesh=mesh, in_specs=P("i"), out_specs=(P("i"), P()))
    whole = jbn.linen.BatchNorm(use_running_average=False)
    actual = jax.jit(mapped)(x, mask)
    expected = whole.apply(variables, x, mask=mask, mutable=["batch_stats"])
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)

    pairs = [[2 * i, 2 * i + 1] for i in range(4)]
    grouped = jbn.linen.BatchNorm(use_running_average=False, axis_name="i", axis_index_groups=pairs)
    apply = lambda x: grouped.apply(variables, x, mutable=["batch_stats"])[0]
    y = jax.jit(jax.shard_map(apply, mesh=mesh, in_specs=P("i"), out_specs=P("i")))(x)
    wanted = [whole.apply(variables, part, mutable=["batch_stats"])[0] for part in jnp.split(x, 4)]
    assert_allclose(y, jnp.concatenate(wanted), rtol=1e-5, atol=1e-5)


def test_virtual_batch_size_normalizes_each_part():
    layer = jbn.linen.BatchNorm(use_running_average=False, virtual_batch_size=4, momentum=0.5)
    x = random((8, 3))
    variables = layer.init(jax.random.key(0), x)
    y, updated = layer.apply(variables, x, mutable=["batch_stats"])
    parts = [jbn.normalize(part, jbn.moments(part)) for part in jnp.split(x, 2)]
    assert_allclose(y, jnp.concatenate(parts), rtol=1e-5, atol=1e-6)
    assert_allclose(updated["batch_stats"]["mean"], x.mean(0) / 2, rtol=1e-5)


def test_one_value_per_feature_warns_in_training_and_not_in_init():
    layer, x = jbn.linen.BatchNorm(use_running_average=False), jnp.ones((1, 3))
    variables = layer.init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match="one value per feature"):
        layer.apply(variables, x, mutable=["batch_stats"])


def test_use_running_average_is_wanted_once():
    layer, x = jbn.linen.BatchNorm(), random((4, 3))
    with pytest.raises(ValueError, match="use_running_average"):
        layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="use_running_average"):
        jbn.linen.BatchNorm(use_running_average=True).init(jax.random.key(0), x, use_running_average=True)


class Model(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, train):
        for width in (16, 8):
            x = nn.relu(self.norm(use_running_average=not train)(nn.Dense(width)(x)))
        return nn.Dense(1)(x)


def test_model_trains_with_optax_as_it_does_with_flax(standard_promotion):
    x = random((64, 5))
    target = jnp.sin(x.sum(-1, keepdims=True))
    optimizer = optax.sgd(0.1)

    def train(norm):
        model = Model(norm)
        variables = model.init(jax.random.key(0), x, train=False)
        params, stats = variables["params"], variables["batch_stats"]
        state = optimizer.init(params)

        @jax.jit
        def step(params, stats, state):
            def loss(params):
                y, updated = model.apply(
                    {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
                )
                return jnp.mean((y - target) ** 2), updated["batch_stats"]

            (value, stats_new), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state_new = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), stats_new, state_new, value

        losses = []
        for _ in range(20):
            params, stats, state, value = step(params, stats, state)
            losses.append(value)
        return np.array(losses), stats

    (losses, stats), (flax_losses, flax_stats) = train(jbn.linen.BatchNorm), train(nn.BatchNorm)
    assert losses[-1] < losses[0] / 2
    assert_allclose(losses, flax_losses, rtol=1e-4)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-5), stats, flax_stats)
