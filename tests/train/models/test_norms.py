"""Each kind of norm, in Linen and in NNX, beside what it is in NumPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import quick_jit
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from train.config import Model
from train.models.norms import Norm, running_rule

IMAGES = np.random.RandomState(0).normal(1, 2, (8, 3, 2, 6)).astype(np.float32)
VECTORS = np.random.RandomState(1).normal(1, 2, (8, 6)).astype(np.float32)
KINDS = ["none", "batch", "ghost", "flax", "layer", "group"]


def make(kind, **options):
    return Norm(Model(norm=kind, virtual_batch_size=4, norm_groups=2, **options), jbn.ema(0.75, debias=True))


def standardized(x, axis):
    return (x - x.mean(axis, keepdims=True)) / x.std(axis, keepdims=True)


def of_groups(x):
    groups = x.reshape(len(x), -1, 2, x.shape[-1] // 2)
    return standardized(groups, (1, 3)).reshape(x.shape)


def of_batch(x):
    return standardized(x, tuple(range(x.ndim - 1)))


EXPECTED = {
    "none": lambda x: x,
    "batch": of_batch,
    "ghost": lambda x: np.concatenate([of_batch(x[:4]), of_batch(x[4:])]),
    "flax": of_batch,
    "layer": lambda x: standardized(x, -1),
    "group": of_groups,
}


def in_linen(norm, x):
    """Returns what a new layer makes of `x` in training, its parameters and its new running statistics."""
    layer = norm.linen_layer(train=True)
    if not norm.adds_bias:
        return layer(x), {}, {}
    variables = layer.init(jax.random.key(0), x)
    y, updated = layer.apply(variables, x, mutable=["batch_stats"])
    return y, variables["params"], updated.get("batch_stats", {})


def in_nnx(norm, x):
    """Does the same in NNX."""
    layer = norm.nnx_layer(x.shape[-1], rngs=nnx.Rngs(0))
    y = layer(x)
    if not norm.adds_bias:
        return y, {}, {}
    return y, *(nnx.to_pure_dict(nnx.state(layer, kind)) for kind in (nnx.Param, nnx.BatchStat))


@pytest.mark.parametrize("run", [in_linen, in_nnx])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [IMAGES, VECTORS], ids=["images", "vectors"])
def test_each_kind_normalizes_over_what_it_says_and_then_scales_and_shifts(kind, x, run):
    y, params, _ = quick_jit(partial(run, make(kind)))(x)
    assert_allclose(y, EXPECTED[kind](np.float64(x)), atol=1e-4)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == ({} if kind == "none" else {"scale": (6,), "bias": (6,)})
    assert make(kind).adds_bias == ("bias" in shapes)


@pytest.mark.parametrize("run", [in_linen, in_nnx])
@pytest.mark.parametrize(
    "kind, weight, names",
    [("batch", 1, "mean var count"), ("ghost", 1, "mean var count"), ("flax", 0.25, "mean var")]
    + [("layer", 0, ""), ("group", 0, ""), ("none", 0, "")],
)
def test_running_statistics_are_those_of_the_whole_batch_by_the_rule_or_by_the_momentum(
    kind, weight, names, run
):
    _, _, stats = quick_jit(partial(run, make(kind, norm_momentum=0.75)))(IMAGES)
    assert set(stats) == set(names.split())
    if stats:
        over = IMAGES.reshape(-1, 6)
        assert_allclose(stats["mean"], weight * over.mean(0), rtol=1e-5, atol=1e-6)
        assert_allclose(stats["var"], 1 - weight + weight * over.var(0), rtol=1e-5)
    assert_allclose(stats.get("count", 0.25), 0.25)


@pytest.mark.parametrize("kind", ["batch", "ghost", "flax"])
def test_inputs_go_through_a_layer_of_their_own_where_a_config_asks_for_it(kind):
    def in_both(norm, x):
        layer = norm.linen_input_layer(train=True)
        if isinstance(layer, nn.Module):
            layer = layer.bind(layer.init(jax.random.key(0), x), mutable=["batch_stats"])
        return layer(x), norm.nnx_input_layer(6, rngs=nnx.Rngs(0))(x)

    for y in quick_jit(partial(in_both, make(kind, norm_inputs=True)))(IMAGES):
        assert_allclose(y, EXPECTED[kind](np.float64(IMAGES)), atol=1e-4)
    for y in in_both(make(kind), IMAGES):
        assert_array_equal(y, IMAGES)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_running_rule_is_a_moving_average_with_the_configs_momentum_debiased_or_not(momentum, debias):
    moments = lambda mean, var, count: jbn.Moments(*(jnp.full(2, value) for value in (mean, var, count)))
    running, rule = moments(0.0, 1.0, 0.0), running_rule(Model(norm_momentum=momentum, norm_debias=debias))
    mean, var, weight = 0.0, 1.0, 0.0
    for batch_mean, batch_var in ((2.0, 5.0), (-3.0, 7.0)):
        running = rule(running, moments(batch_mean, batch_var, 64.0))
        mean = momentum * mean + (1 - momentum) * batch_mean
        var = momentum * var + (1 - momentum) * batch_var
        weight = momentum * weight + 1 - momentum
        # What is left of the initial mean 0 and variance 1 has the weight 1 - weight.
        assert_allclose(running.mean, mean / weight if debias else mean, rtol=1e-5)
        assert_allclose(running.var, (var - (1 - weight)) / weight if debias else var, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_for_outputs_alone(kind):
    norm, x = make(kind, dtype="bfloat16"), jnp.asarray(VECTORS, jnp.bfloat16)
    for run in (in_linen, in_nnx):
        y, *variables = jax.eval_shape(partial(run, norm), x)
        assert y.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} <= {jnp.dtype("float32")}


def test_norms_of_the_same_options_are_equal_and_hash_alike():
    assert make("batch") == make("batch") and hash(make("batch")) == hash(make("batch"))
    others = {make("batch", norm_momentum=0.5), make("batch", norm_inputs=True)}
    assert len({make(kind) for kind in KINDS} | others) == len(KINDS) + 2
