"""What is particular to the Linen module: its signature, collections, dtypes, errors and metadata."""

import dataclasses
import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ModifyScopeVariableError, ScopeCollectionNotFound, ScopeVariableNotFoundError
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
from tests.helpers.layers import random

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = np.asarray(random((16, 3), mean=1))


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype.name, tree)


def test_every_argument_of_flax_is_one_of_ours_with_its_place_and_default():
    ours = {field.name: field for field in dataclasses.fields(jbn.linen.BatchNorm)}
    theirs = {field.name: field for field in dataclasses.fields(nn.BatchNorm)}
    positional = [
        [name for name, f in fields.items() if not f.kw_only and name not in ("parent", "name")]
        for fields in (ours, theirs)
    ]
    assert positional[0] == positional[1]
    assert {name: ours[name].default for name in theirs} == {name: f.default for name, f in theirs.items()}
    calls = [inspect.signature(module.__call__).parameters for module in (jbn.linen.BatchNorm, nn.BatchNorm)]
    for name, parameter in calls[1].items():
        assert (calls[0][name].kind, calls[0][name].default) == (parameter.kind, parameter.default)


def test_arguments_may_be_given_by_position():
    layer = jbn.linen.BatchNorm(None, 1, 0.5, 1e-3)
    assert (layer.axis, layer.momentum, layer.epsilon) == (1, 0.5, 1e-3)
    y, variables = jax.jit(layer.init_with_output, static_argnums=2)(jax.random.key(0), X.T[None], False)
    assert variables["params"]["scale"].shape == (3,)
    assert_allclose(y.mean((0, 2)), 0, atol=1e-6)


def test_init_leaves_the_statistics_needs_no_axis_and_does_not_warn():
    layer = jbn.linen.BatchNorm(use_running_average=False, axis_name="i")
    stats = layer.init(jax.random.key(0), X[:1])["batch_stats"]
    assert_array_equal(stats["mean"], 0)
    assert_array_equal(stats["var"], 1)


def test_init_returns_what_training_returns():
    layer = jbn.linen.BatchNorm(use_running_average=False, axis=0, epsilon=0.5, dtype=jnp.bfloat16)
    mask = np.random.RandomState(1).rand(16, 3) < 0.6

    @jax.jit
    def init_and_train(x):
        y, variables = layer.init_with_output(jax.random.key(0), x, mask=mask)
        return y, layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[0]

    assert_array_equal(*init_and_train(X))


def test_use_running_average_is_wanted_once():
    with pytest.raises(ValueError, match="use_running_average"):
        jbn.linen.BatchNorm().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="use_running_average"):
        jbn.linen.BatchNorm(use_running_average=True).init(jax.random.key(0), X, use_running_average=True)


def test_inference_needs_no_mutable_collection_and_training_says_what_to_pass():
    layer = jbn.linen.BatchNorm()
    variables = layer.init(jax.random.key(0), X, use_running_average=True)
    assert layer.apply(variables, X, use_running_average=True).shape == X.shape
    with pytest.raises(ModifyScopeVariableError) as raised:
        layer.apply(variables, X, use_running_average=False)
    assert 'mutable=["batch_stats"]' in raised.value.__notes__[0]
    for option in dict(update=jbn.cumulative()), dict(renorm=jbn.renorm_limits()):  # have a variable more
        with pytest.raises(ScopeVariableNotFoundError) as raised:
            jbn.linen.BatchNorm(**option).apply(variables, X, use_running_average=False)
        assert 'mutable=["batch_stats"]' in raised.value.__notes__[0]
    frozen = jbn.linen.BatchNorm(frozen=True)
    assert frozen.apply(variables, X, use_running_average=False).shape == X.shape


def test_statistics_that_are_missing_are_an_error_in_inference_and_start_anew_in_training():
    layer = jbn.linen.BatchNorm(momentum=0.0)
    params = {"params": layer.init(jax.random.key(0), X, use_running_average=True)["params"]}
    with pytest.raises(ScopeCollectionNotFound, match="batch_stats"):
        layer.apply(params, X, use_running_average=True)
    _, updated = layer.apply(params, X, use_running_average=False, mutable=["batch_stats"])
    assert_allclose(updated["batch_stats"]["mean"], X.mean(0), rtol=1e-6)


def test_count_is_wanted_by_rules_alone_and_by_them_in_training_alone():
    x, plain, debiased = X, jbn.linen.BatchNorm(), jbn.linen.BatchNorm(update=jbn.ema(0.9, debias=True))
    variables = plain.init(jax.random.key(0), x, use_running_average=True)
    assert set(variables["batch_stats"]) == {"mean", "var"}
    counted = debiased.init(jax.random.key(0), x, use_running_average=True)
    assert set(counted["batch_stats"]) == {"mean", "var", "count"}
    y, z = (layer.apply(variables, x, use_running_average=True) for layer in (plain, debiased))
    assert_array_equal(y, z)
    # Of a checkpoint without a count a debiased rule knows no more than of a new layer's.
    _, updated = debiased.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    assert_allclose(updated["batch_stats"]["mean"], x.mean(0), rtol=1e-6)


@pytest.mark.slow
def test_running_variance_does_not_get_stuck_in_low_precision():
    x = jnp.asarray(np.random.RandomState(0).normal(0, 2, (256, 3)), jnp.bfloat16)
    options = dict(
        force_float32_reductions=False,
        param_dtype=jnp.bfloat16,
        dtype=jnp.bfloat16,
        use_running_average=False,
    )

    def variance_after_1000_steps(kind):
        layer = kind(**options)

        def step(variables, _):
            return variables | layer.apply(variables, x, mutable=["batch_stats"])[1], None

        run = lambda key: jax.lax.scan(step, layer.init(key, x), length=1000)[0]
        return jax.jit(run)(jax.random.key(0))["batch_stats"]["var"]

    expected = np.var(np.float64(x), 0)
    assert_allclose(variance_after_1000_steps(jbn.linen.BatchNorm), expected, rtol=1e-3)
    assert np.max(np.abs(np.float64(variance_after_1000_steps(nn.BatchNorm)) / expected - 1)) > 0.1


def test_statistics_have_from_init_on_the_dtype_that_they_have_after_a_step(x64):
    layer = jbn.linen.BatchNorm(use_running_average=False)
    for dtype, (mean, var) in {
        "float32": ("float32", "float32"),
        "bfloat16": ("float32", "float32"),
        "float64": ("float64", "float64"),
        "complex64": ("complex64", "float32"),
    }.items():
        x = jax.ShapeDtypeStruct(X.shape, dtype)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        _, updated = jax.eval_shape(partial(layer.apply, mutable=["batch_stats"]), variables, x)
        expected = {"mean": mean, "var": var}
        assert dtypes(variables["batch_stats"]) == dtypes(updated["batch_stats"]) == expected


def test_statistics_have_the_dtype_of_wider_parameters_where_flax_is_asked_for_it(x64):
    layer = jbn.linen.BatchNorm(
        use_running_average=False, force_float32_reductions=False, param_dtype=jnp.float64
    )
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    _, updated = jax.eval_shape(partial(layer.apply, mutable=["batch_stats"]), variables, X)
    for tree in variables, updated:
        assert dtypes(tree["batch_stats"]) == {"mean": "float64", "var": "float64"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_narrower_statistics_of_flax_are_taken_and_widened(x64, dtype):
    x = X.astype(dtype) * (1 + 2j if dtype == "complex64" else 1)
    variables = jax.jit(nn.BatchNorm(use_running_average=False).init)(jax.random.key(0), x)
    assert dtypes(variables["batch_stats"]) == {"mean": "float32", "var": "float32"}
    layers = (kind(use_running_average=False, momentum=0.0) for kind in (jbn.linen.BatchNorm, nn.BatchNorm))
    updated = [jax.jit(partial(layer.apply, mutable=["batch_stats"]))(variables, x)[1] for layer in layers]
    assert dtypes(updated[0]) == dtypes(updated[1])
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), *updated)


def test_metadata_of_partitioned_variables_stays():
    boxed = lambda init, *names: nn.with_partitioning(init, names)
    layer = jbn.linen.BatchNorm(
        use_running_average=False,
        scale_init=boxed(nn.initializers.ones, "features"),
        mean_init=boxed(nn.initializers.zeros, "features"),
    )
    variables = layer.init(jax.random.key(0), X)
    _, updated = layer.apply(variables, X, mutable=["batch_stats"])
    spec = nn.get_partition_spec(variables | updated)
    assert spec["params"]["scale"] == spec["batch_stats"]["mean"] == jax.sharding.PartitionSpec("features")
    assert_allclose(updated["batch_stats"]["mean"].unbox(), 0.01 * X.mean(0), rtol=1e-5)


def test_statistics_of_another_layer_are_named():
    bare = jbn.linen.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
    stats = {"batch_stats": {"mean": np.zeros(5, np.float32), "var": np.ones(5, np.float32)}}
    with pytest.raises(ValueError, match=r'"batch_stats" has shape \(5,\); expected \(3,\), .* on axis 1'):
        bare.apply(stats, X)
