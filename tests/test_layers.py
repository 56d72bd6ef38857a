"""What the Linen and the NNX module have in common, beside Flax's own and beside NumPy float64."""

import flax_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax_layers import NNX, Linen, gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn

pytestmark = pytest.mark.usefixtures("standard_promotion")
both = pytest.mark.parametrize("flavour", [Linen, NNX])

OPTIONS = {
    "defaults": {},
    "channels first": {"axis": 1},
    "momentum and epsilon": {"momentum": 0.5, "epsilon": 1e-3},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_scale": False, "use_bias": False},
    "dtype bfloat16": {"dtype": jnp.bfloat16},
    "dtype float16": {"dtype": jnp.float16},
    "param_dtype bfloat16": {"param_dtype": jnp.bfloat16},
    "initializers": {
        "scale_init": jax.nn.initializers.normal(1.0),
        "bias_init": jax.nn.initializers.uniform(3.0),
    },
    "fast variance off": {"use_fast_variance": False},
}
MASKS = {
    "no mask": None,
    "of examples": np.arange(8)[:, None, None] > 2,
    "of positions": np.random.RandomState(1).rand(8, 4, 3) > 0.3,
}


def random(shape, dtype="float32", mean=1.0, sd=2.0, seed=0):
    return jnp.asarray(np.random.RandomState(seed).normal(mean, sd, shape), dtype)


def pair(flavour, x, **options):
    """Flax's layer and ours, with the same variables."""
    return flavour(flavour.flax, x, **options), flavour(flavour.ours, x, **options)


def like(actual, expected, tolerance=1e-5):
    """Compares trees by structure, dtypes, shapes and values; half precision to neighbouring numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        rounding = {"bfloat16": 2e-2, "float16": 2e-3}.get(a.dtype.name, tolerance)
        assert_allclose(np.float32(a), np.float32(b), rtol=rounding, atol=rounding)


# The same as Flax's, on ordinary input.


@both
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variables_outputs_and_statistics_are_those_of_flax(flavour, options, dtype):
    x = random((8, 4, 3), dtype)
    theirs, ours = pair(flavour, x, **options)
    assert jax.tree.structure(theirs.params) == jax.tree.structure(ours.params)
    jax.tree.map(assert_array_equal, (theirs.params, theirs.stats), (ours.params, ours.stats))
    for mask in MASKS.values():
        # Flax's NNX module rounds what it measures to `dtype`; from there on ours is the better one.
        y, ours_y = (layer.train(x, mask=mask) for layer in (theirs, ours))
        like(ours_y, y)
        like(ours.stats, theirs.stats, 2e-2 if flavour is NNX and "dtype" in options else 1e-5)
    like(ours.infer(x), theirs.infer(x))


@both
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gradients_are_those_of_flax(flavour, mask):
    x, weight = random((8, 4, 3)), random((8, 4, 3), seed=1)
    theirs, ours = pair(flavour, x, use_fast_variance=False, **OPTIONS["initializers"])
    like(*(gradients(layer, x, weight, mask=mask) for layer in (ours, theirs)), tolerance=2e-5)


@both
def test_statistics_and_outputs_are_those_of_float64(flavour):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x, momentum=0.75, axis=1)
    mean, var, _ = reference.moments(x, 1)
    assert_allclose(layer.train(x), reference.batch_norm(x, axis=1), atol=5e-6)
    assert_allclose(layer.stats["mean"], 0.25 * mean, rtol=1e-5)
    assert_allclose(layer.stats["var"], 0.75 + 0.25 * var, rtol=1e-5)
    expected = reference.normalize(x, 0.25 * mean, 0.75 + 0.25 * var, axis=1)
    assert_allclose(layer.infer(x), expected, atol=5e-6)


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_module_works_under_strict_promotion(flavour, dtype):
    x = random((8, 4, 3), dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        layer = flavour(flavour.ours, x)
        y = layer.train(x, mask=MASKS["of examples"])
        z = layer.infer(x)
    assert y.dtype == z.dtype == jnp.float32  # as in Flax: x promoted with float32 parameters
    assert_allclose(y, reference.batch_norm(x, mask=MASKS["of examples"]), atol=5e-6)


@both
@pytest.mark.parametrize("dtype", ["uint8", "int32"])
@pytest.mark.parametrize("options", ["defaults", "neither", "param_dtype bfloat16"])
def test_integers_are_taken_as_float32(flavour, dtype, options):
    x = random((8, 4, 3), mean=100, sd=30).astype(dtype)
    theirs, ours = pair(flavour, x, **OPTIONS[options])
    like(ours.train(x), theirs.train(x), 1e-4)
    expected = reference.normalize(x, *ours.stats.values())
    assert_allclose(np.float32(ours.infer(x)), expected, rtol=1e-2 if "bfloat16" in options else 1e-5)


@both
def test_several_feature_axes_have_moments_each(flavour):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x, axis=(-1, 1), momentum=0.0)
    assert_allclose(layer.train(x), reference.batch_norm(x, axis=(1, 2)), atol=5e-6)
    like(layer.stats["mean"], jnp.mean(x, 0))


@both
def test_momentum_may_be_traced(flavour):
    x = random((8, 4, 3))

    @jax.jit
    def mean_after(momentum):
        layer = flavour(flavour.ours, x, momentum=momentum)
        layer.train(x)
        return layer.stats["mean"]

    for momentum in (0.0, 0.5):
        assert_allclose(mean_after(momentum), (1 - momentum) * np.mean(x, (0, 1)), rtol=1e-5)


@both
def test_use_running_average_may_be_traced(flavour):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x)
    layer.train(x)
    call = lambda train: layer.call(layer.params, layer.stats, x, train)
    for train in (True, False):
        like(jax.jit(call)(train), call(train))


# Right where Flax's is not.


@both
def test_large_mean_costs_no_accuracy(flavour):
    x = random((512, 3), mean=1e4, sd=1.0)
    theirs, ours = pair(flavour, x)
    expected = reference.batch_norm(x)
    assert_allclose(ours.train(x), expected, atol=2e-3)
    assert np.max(np.abs(theirs.train(x) - expected)) > 1


@both
def test_non_finite_values_in_a_batch_leave_the_running_statistics_of_their_feature(flavour):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x, momentum=0.0)
    layer.train(x)
    before = jax.tree.map(np.array, layer.stats)
    layer.train((2 * x).at[1, 1, 0].set(jnp.nan).at[2, 2, 1].set(jnp.inf))
    for name, power in (("mean", 1), ("var", 2)):
        assert_array_equal(layer.stats[name][:2], before[name][:2])
        assert_allclose(layer.stats[name][2], before[name][2] * 2**power, rtol=1e-5)


@both
def test_masked_values_that_are_not_finite_reach_neither_values_nor_gradients(flavour):
    x, mask, weight = (
        random((8, 4, 3)),
        MASKS["of examples"],
        random((8, 4, 3), seed=1) * MASKS["of examples"],
    )
    poisoned = jnp.where(mask, x, jnp.nan)
    layer = flavour(flavour.ours, x)
    clean, dirty = (gradients(layer, v, weight, mask=mask) for v in (x, poisoned))
    like(dirty[0], clean[0])
    assert_allclose(dirty[1][3:], clean[1][3:], rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(dirty[1]))
    assert_allclose(layer.train(poisoned, mask=mask)[3:], reference.batch_norm(x, mask=mask)[3:], atol=5e-6)


@both
def test_a_batch_without_samples_leaves_the_running_statistics(flavour):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x)
    layer.train(x)
    before = jax.tree.map(np.array, layer.stats)
    assert np.all(np.isfinite(layer.train(x, mask=np.zeros((8, 1, 1), bool))))
    assert layer.train(x[:0]).shape == (0, 4, 3)
    jax.tree.map(assert_array_equal, layer.stats, before)


@both
def test_devices_merge_unequal_masks_by_count(flavour):
    x, mask = random((16, 3), mean=5.0), np.arange(16)[:, None] < 10  # rows 8 and 2, of two devices
    layer = flavour(flavour.ours, x, axis_name="i", momentum=0.0)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    step = lambda stats, x, mask: layer.call(layer.params, stats, x, True, mask=mask)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("i"), P("i")), out_specs=(P("i"), P()))
    y, stats = jax.jit(mapped)(layer.stats, x, mask)
    mean, var, _ = reference.moments(x, mask=mask)
    assert_allclose(stats["mean"], mean, rtol=1e-5)
    assert_allclose(stats["var"], var, rtol=1e-5)
    assert_allclose(y, reference.batch_norm(x, mask=mask), atol=5e-6)


@both
def test_devices_share_within_their_groups_alone(flavour):
    x = random((16, 3), mean=5.0)
    layer = flavour(flavour.ours, x, axis_name="i", axis_index_groups=[[0, 1], [2, 3]])
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    step = lambda x: layer.call(layer.params, layer.stats, x, True)[0]
    y = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("i"), out_specs=P("i")))(x)
    assert_allclose(y, np.concatenate([reference.batch_norm(part) for part in np.split(x, 2)]), atol=5e-6)


@both
def test_one_value_per_feature_warns_in_training_alone(flavour):
    x = jnp.ones((1, 3))
    layer = flavour(flavour.ours, x)
    layer.infer(x)
    with pytest.warns(jbn.OneValueWarning, match="one value per feature") as warned:
        assert_array_equal(layer.train(x), 0)
    assert [warning.filename for warning in warned] == [flax_layers.__file__]  # where the layer is called


@both
def test_dtype_rounds_the_result_and_nothing_before(flavour):
    x = jnp.array([[-3.0], [2.0], [7.0], [12.0]])
    layer = flavour(flavour.ours, x, dtype=jnp.bfloat16, momentum=0.0)
    layer.train(x + 1000)
    assert_allclose(layer.stats["var"], 31.25)
    layer.train(x / 1000 + 0.3333)
    assert_allclose(layer.stats["mean"], 0.3333 + 0.0045, rtol=1e-6)
    assert_allclose(layer.stats["var"], 31.25e-6, rtol=1e-4)
    assert layer.infer(x).dtype == jnp.bfloat16
    expected = reference.normalize(x, *layer.stats.values())
    assert_allclose(np.float32(layer.infer(x)), expected, rtol=2**-8)


@both
def test_backward_pass_keeps_x_in_its_own_dtype(flavour):
    x = random((256, 64), "bfloat16")

    def bytes_an_element(layer):
        f = lambda params, x: layer.call(params, layer.stats, x, True)[0]
        kept = jax.jit(lambda params, x: jax.vjp(f, params, x)[1])(layer.params, x)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) / x.size

    theirs, ours = (bytes_an_element(layer) for layer in pair(flavour, x, dtype=jnp.bfloat16))
    assert ours < 2.2 and theirs > 5


@both
def test_float16_of_large_magnitude_is_normalized(flavour):
    x = random((64, 3), "float16", mean=300, sd=100)
    layer = flavour(flavour.ours, x, dtype=jnp.float16)
    assert_allclose(np.float32(layer.train(x)), reference.batch_norm(x), atol=4e-3)


@both
def test_float64_input_has_float64_results(flavour, x64):
    x = random((64, 3), "float64", mean=1e6, sd=1e-3)
    layer = flavour(flavour.ours, x, param_dtype=jnp.float64, momentum=0.0)
    assert_allclose(layer.train(x), reference.batch_norm(x), rtol=1e-6, atol=1e-6)
    mean, var, _ = reference.moments(x)
    assert layer.stats["mean"].dtype == layer.stats["var"].dtype == jnp.float64
    assert_allclose(layer.stats["mean"], mean, rtol=1e-14)
    assert_allclose(layer.stats["var"], var, rtol=1e-6)


@both
def test_complex_input_has_a_complex_mean_and_a_real_variance(flavour):
    x = jax.lax.complex(random((8, 4, 3)), random((8, 4, 3), mean=2.0, sd=3.0, seed=1))
    layer = flavour(flavour.ours, x, momentum=0.0, param_dtype=jnp.complex64)
    y = layer.train(x)
    mean, var, _ = reference.moments(x)
    assert_allclose(y, reference.batch_norm(x), atol=5e-6)
    assert_allclose(layer.stats["mean"], mean, rtol=1e-5)
    assert_allclose(layer.stats["var"], var, rtol=1e-5)
    assert_allclose(layer.infer(x), y, atol=5e-6)


# More than Flax's, by keyword.


@both
@pytest.mark.parametrize("rule", [jbn.ema(0.9, debias=True), jbn.cumulative(unbiased=True), jbn.pooled()])
def test_any_update_rule_keeps_its_count_beside_the_statistics(flavour, rule):
    x = random((5, 8, 4, 3))
    layer = flavour(flavour.ours, x[0], update=rule)
    _, expected = jbn.init(3)
    for batch in x:
        layer.train(batch)
        _, expected = jbn.batch_norm(batch, None, expected, train=True, update=rule)
    like(layer.stats, expected._asdict())
    assert_allclose(layer.infer(x[0]), jbn.normalize(x[0], expected), rtol=1e-5, atol=1e-6)


@both
def test_virtual_batches_are_normalized_each(flavour):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x, virtual_batch_size=4, momentum=0.0)
    y = layer.train(x)
    assert_allclose(y, np.concatenate([reference.batch_norm(part) for part in np.split(x, 2)]), atol=5e-6)
    assert_allclose(layer.stats["var"], reference.moments(x)[1], rtol=1e-5)


@both
def test_statistics_are_local_to_a_device_under_sharded_jit(flavour):
    x, weight = random((8, 4, 3)), random((8, 4, 3), seed=1)
    layer = flavour(flavour.ours, x, virtual_batch_size=1, momentum=0.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = [jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (x, weight)]

    @jax.jit
    def gradient_of_x(x, weight):
        return gradients(layer, x, weight)[1]

    compiled = gradient_of_x.lower(*sharded).compile()
    assert not [name for name in ("all-reduce", "all-gather", "all-to-all") if name in compiled.as_text()]
    alone = flavour(flavour.ours, x)
    parts = [gradients(alone, x[i : i + 1], weight[i : i + 1])[1] for i in range(8)]
    assert_allclose(compiled(*sharded), jnp.concatenate(parts), rtol=1e-4, atol=1e-5)
    layer.train(x)
    assert_allclose(layer.stats["var"], reference.moments(x)[1], rtol=1e-5)


@both
def test_real_weights_in_the_mask_are_frequencies(flavour):
    x, weights = random((8, 4, 3)), np.random.RandomState(2).gamma(1.0, size=(8, 4, 1))
    layer = flavour(flavour.ours, x, momentum=0.0)
    assert_allclose(layer.train(x, mask=weights), reference.batch_norm(x, mask=weights), atol=5e-6)
    assert_allclose(layer.stats["var"], reference.moments(x, mask=weights)[1], rtol=1e-5)


@both
@pytest.mark.parametrize("shape", [(3,), (8, 1, 3), (8, 4, 1)])
def test_scale_and_bias_may_be_given_in_the_call(flavour, shape):
    x, scale, bias = random((8, 4, 3)), random(shape, seed=1), random(shape, seed=2)
    layer = flavour(flavour.ours, x, use_scale=False, use_bias=False)
    assert layer.params == {}
    expected = reference.batch_norm(x) * np.asarray(scale) + np.asarray(bias)
    assert_allclose(layer.train(x, scale=scale, bias=bias.tolist()), expected, rtol=1e-5, atol=2e-5)
    expected = reference.normalize(x, *layer.stats.values()) * np.asarray(scale) + np.asarray(bias)
    assert_allclose(layer.infer(x, scale=scale, bias=bias), expected, rtol=1e-5, atol=2e-5)


@both
@pytest.mark.parametrize("name", ["scale", "bias"])
def test_scale_or_bias_that_is_learnt_is_not_taken_from_the_call(flavour, name):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x)
    with pytest.raises(ValueError, match=f"{name} was given in the call .* use_{name}=False"):
        layer.train(x, **{name: jnp.ones(3)})


@both
def test_running_statistics_start_as_their_initializers_say(flavour):
    x = random((8, 4, 3))
    layer = flavour(
        flavour.ours,
        x,
        mean_init=jax.nn.initializers.uniform(4.0),
        var_init=jax.nn.initializers.uniform(4.0),
        scale_init=jax.nn.initializers.normal(1.0),
    )
    drawn = np.concatenate([layer.stats["mean"], layer.stats["var"]])
    assert len(set(drawn.tolist())) == 6 and np.all((drawn >= 0) & (drawn < 4))
    expected = reference.normalize(x, *layer.stats.values(), layer.params["scale"])
    assert_allclose(layer.infer(x), expected, rtol=1e-4, atol=1e-5)


@both
def test_frozen_layer_uses_its_statistics_updates_nothing_and_gets_no_gradient(flavour):
    x, weight = random((8, 4, 3)), random((8, 4, 3), seed=1)
    trained = flavour(flavour.ours, x, momentum=0.5, scale_init=jax.nn.initializers.normal(1.0))
    trained.train(x)
    layer = flavour(flavour.ours, x, frozen=True)
    layer.copy_from(trained)
    y = layer.infer(x)
    assert_array_equal(layer.call(layer.params, layer.stats, x, True)[0], y)
    jax.tree.map(assert_array_equal, layer.call(layer.params, layer.stats, x, True)[1], trained.stats)
    to_params, to_x = gradients(layer, x, weight)
    jax.tree.map(lambda leaf: assert_array_equal(leaf, 0), to_params)
    expected = np.asarray(weight) * layer.params["scale"] / np.sqrt(layer.stats["var"] + 1e-5)
    assert_allclose(to_x, expected, rtol=1e-5)


@both
def test_frozen_layer_gives_a_gradient_to_what_comes_from_outside(flavour):
    x, weight = random((8, 4, 3)), random((8, 4, 3), seed=1)
    layer = flavour(flavour.ours, x, use_scale=False, frozen=True)
    gradient = jax.grad(lambda scale: jnp.sum(layer.infer(x, scale=scale) * weight))(jnp.ones((8, 1, 3)))
    expected = np.sum(reference.normalize(x, np.zeros(3), np.ones(3)) * weight, 1, keepdims=True)
    assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@both
def test_running_statistics_are_constants_to_gradients(flavour):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x)
    of_x = jax.grad(lambda x: jnp.sum(layer.call(layer.params, layer.stats, x, True)[1]["var"]))(x)
    of_stats = jax.grad(lambda stats: jnp.sum(layer.call(layer.params, stats, x, False)[0] ** 2))(layer.stats)
    jax.tree.map(lambda leaf: assert_array_equal(leaf, 0), (of_x, of_stats))


@both
def test_traced_mode_has_to_be_one_boolean(flavour):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x)
    with pytest.raises(
        TypeError, match="use_running_average is an array of .*; expected True, False, or a traced"
    ):
        jax.jit(lambda train: layer.call(layer.params, layer.stats, x, train))(np.array([True, False]))


@both
def test_errors_of_batch_norm_come_through(flavour):
    x = random((8, 4, 3))
    layer = flavour(flavour.ours, x)
    with pytest.raises(ValueError, match="mask of shape .* does not broadcast"):
        layer.train(x, mask=np.ones(8, bool))
    with pytest.raises(ValueError, match="is not bound here"):
        flavour(flavour.ours, x, axis_name="i").train(x)
    with pytest.raises(ValueError, match=r"momentum=1.5 is outside"):
        flavour(flavour.ours, x, momentum=1.5).train(x)
