"""What is particular to the NNX module: its signature, variables, modes, errors, and Flax's bridges."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
import jbn.nnx
from tests.helpers import reference
from tests.helpers.flax_layers import Block, quick_init
from tests.helpers.layers import random

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = np.asarray(random((8, 4), mean=1))
BOTH = (jbn.nnx.BatchNorm, nnx.BatchNorm)


def state(model):
    return nnx.to_pure_dict(nnx.state(model))


def test_every_argument_of_flax_is_one_of_ours_with_its_kind_and_default():
    for method in ("__init__", "__call__", "set_view"):
        if not hasattr(nnx.BatchNorm, method):
            continue
        ours, theirs = (inspect.signature(getattr(module, method)).parameters for module in BOTH)
        for name, parameter in theirs.items():
            assert ours[name].kind == parameter.kind
            if not name.endswith("_init"):  # made anew by each module, and compared by their values elsewhere
                assert ours[name].default == parameter.default


def test_variables_have_the_types_names_and_metadata_of_flax():
    options = {"scale_metadata": {"tag": "scale"}, "bias_metadata": {"tag": "bias"}}
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    kinds = {path[-1]: type(v) for path, v in nnx.to_flat_state(nnx.state(layer))}
    assert kinds == {"scale": nnx.Param, "bias": nnx.Param, "mean": nnx.BatchStat, "var": nnx.BatchStat}
    assert (layer.scale.tag, layer.bias.tag) == ("scale", "bias")
    layer = jbn.nnx.BatchNorm(3, use_scale=False, use_bias=False, update=jbn.pooled(), rngs=nnx.Rngs(0))
    kinds = {path[-1]: type(v) for path, v in nnx.to_flat_state(nnx.state(layer))}
    assert kinds == dict.fromkeys(("mean", "var", "count"), nnx.BatchStat)


def test_initializers_draw_the_keys_that_they_draw_in_flax():
    options = {"scale_init": quick_init, "bias_init": quick_init}
    rngs = nnx.Rngs(0), nnx.Rngs(0)
    for _ in range(2):  # a second layer draws other keys
        ours, theirs = (state(norm(4, rngs=keys, **options)) for norm, keys in zip(BOTH, rngs))
        jax.tree.map(assert_array_equal, ours, theirs)
        assert len({*ours["scale"].tolist(), *ours["bias"].tolist()}) == 8


def test_layer_starts_in_training_and_modes_are_set_as_in_flax():
    layer = jbn.nnx.BatchNorm(4, momentum=0.0, rngs=nnx.Rngs(0))
    assert_allclose(layer(X), reference.batch_norm(X), atol=5e-6)
    mean, var, _ = reference.moments(X)
    layer.eval()
    assert_allclose(layer(X + 1), reference.normalize(X + 1, mean, var), atol=5e-6)
    layer.train()
    layer(X + 1)
    assert_allclose(layer.mean[...], mean + 1, rtol=1e-6)
    layer(X, use_running_average=False)  # the call is obeyed first
    layer.eval()
    layer(X + 2, use_running_average=False)
    assert_allclose(layer.mean[...], mean + 2, rtol=1e-6)


def test_use_running_average_has_to_come_from_somewhere():
    layer = jbn.nnx.BatchNorm(4, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="use_running_average is None"):
        layer(X)
    assert layer(X, use_running_average=True).shape == X.shape


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this version of Flax has no nnx.view")
def test_views_share_the_variables_and_have_a_mode_of_their_own():
    model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    inference, frozen = nnx.view(model, use_running_average=True), nnx.view(model, frozen=True)
    before = inference(X)
    model(X)
    assert_array_equal(inference(X), frozen(X))
    assert np.max(np.abs(inference(X) - before)) > 0.1
    assert not model.bn.use_running_average and not model.bn.frozen
    assert not nnx.view(inference, use_running_average=False).bn.use_running_average
    assert not nnx.view(frozen, frozen=False).bn.frozen


def test_frozen_is_set_for_a_whole_model():
    model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    model.set_attributes(frozen=True)
    before = jax.tree.map(np.array, state(model))
    model(X)
    jax.tree.map(assert_array_equal, state(model), before)


def test_promote_dtype_tells_the_dtype_of_the_result_and_converts_nothing():
    def to_half(values, dtype=None):
        assert len(values) == 5 and dtype is None
        return tuple(None if v is None else jnp.asarray(v, jnp.bfloat16) for v in values)

    layer = jbn.nnx.BatchNorm(4, momentum=0.0, promote_dtype=to_half, rngs=nnx.Rngs(0))
    y = layer(X)
    assert y.dtype == jnp.bfloat16
    assert_allclose(layer.mean[...], reference.moments(X)[0], rtol=1e-6)
    assert_allclose(np.float32(y), reference.batch_norm(X), rtol=2**-8, atol=1e-5)


def test_narrow_statistics_of_a_model_that_was_cast_are_widened_and_do_not_stop_short():
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    nnx.update(layer, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(layer)))
    step = nnx.jit(lambda layer, x: layer(x))
    for _ in range(300):
        step(layer, jnp.full((2, 3), 10, jnp.bfloat16))
    assert layer.mean.dtype == layer.var.dtype == jnp.float32
    assert_allclose(layer.mean[...], 10 * (1 - 0.99**300), rtol=1e-5)


def test_other_features_are_named():
    for features, axis in [(3, -1), (8, -1), (32, (0, 1)), ((4, 8), (0, 1))]:
        layer = jbn.nnx.BatchNorm(features, axis=axis, rngs=nnx.Rngs(0))
        with pytest.raises(
            ValueError, match=r"num_features=.*; expected \(.*\), .* features of x of shape \(8, 4\)"
        ):
            layer(X)


def test_layer_without_initializers_needs_no_key():
    layer = jbn.nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=None)
    assert_allclose(layer(X), reference.batch_norm(X), atol=5e-6)


def test_rule_that_comes_after_construction_is_told_where_it_belongs():
    layer = jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    layer.set_attributes(update=jbn.cumulative())
    with pytest.raises(
        ValueError, match=r"update=cumulative.* was set later; expected it in the constructor"
    ):
        layer(X)


def test_complex_input_wants_complex_statistics():
    with pytest.raises(ValueError, match="running.mean has dtype float32, but x is complex; .* param_dtype"):
        jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))(np.complex64(X))


def test_bridge_to_nnx_trains_the_linen_module():
    linen = jbn.linen.BatchNorm(use_running_average=False, momentum=0.0)
    model = bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(X)
    y = model(X, mutable=["batch_stats"])
    assert_allclose(y, reference.batch_norm(X), atol=5e-6)
    assert_allclose(model.mean[...], reference.moments(X)[0], rtol=1e-6)


def test_bridge_to_linen_trains_the_nnx_module():
    layer = bridge.to_linen(jbn.nnx.BatchNorm, 4, momentum=0.0)
    variables = layer.init(jax.random.key(0), X)
    y, updated = layer.apply(variables, X, mutable=["batch_stats"])
    assert_allclose(y, reference.batch_norm(X), atol=5e-6)
    (mean,) = [
        leaf for path, leaf in jax.tree.leaves_with_path(updated["batch_stats"]) if "mean" in str(path)
    ]
    assert_allclose(mean, reference.moments(X)[0], rtol=1e-6)
