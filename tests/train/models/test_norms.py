"""Each line of the table of norms, in Linen and in NNX, beside what it is in NumPy."""

from functools import cache, partial
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

import jbn
from train.config import Model, NormName
from train.models import NORMS, build, running_rule
from train.models.norms import Norm, NormKind

IMAGES = np.random.RandomState(0).normal(1, 2, (8, 3, 2, 6)).astype(np.float32)
VECTORS = np.random.RandomState(1).normal(1, 2, (8, 6)).astype(np.float32)
RULE = jbn.ema(0.75, debias=True)


def make(kind, **options):
    return Norm(Model(norm=kind, virtual_batch_size=4, norm_groups=2, **options), RULE)


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
    "renorm": of_batch,  # in the first step
    "ghost": lambda x: np.concatenate([of_batch(x[:4]), of_batch(x[4:])]),
    "flax": of_batch,
    "layer": lambda x: standardized(x, -1),
    "group": of_groups,
}


def in_linen(norm, x):
    """Return what a new layer makes of `x` in training, its parameters and its new running statistics."""
    layer = norm.linen_layer(train=True)
    if not isinstance(layer, nn.Module):
        return layer(x), {}, {}
    variables = layer.init(jax.random.key(0), x)
    y, updated = layer.apply(variables, x, mutable=["batch_stats"])
    return y, variables["params"], updated.get("batch_stats", {})


def in_nnx(norm, x):
    """Do the same in NNX."""
    layer = norm.nnx_layer(x.shape[-1], rngs=nnx.Rngs(0))
    y = layer(x)
    if not isinstance(layer, nnx.Module):
        return y, {}, {}
    return y, *(nnx.to_pure_dict(nnx.state(layer, kind)) for kind in (nnx.Param, nnx.BatchStat))


@cache
def results(kind):
    """Return what both make of images and of vectors, compiled together."""
    norm = make(kind, norm_momentum=0.75)
    every = lambda *given: [(run(norm, x), x) for run in (in_linen, in_nnx) for x in given]
    return jax.jit(every)(IMAGES, VECTORS)


def test_the_schema_and_the_table_of_norms_have_the_same_names():
    assert set(NORMS) == set(get_args(NormName)) == set(EXPECTED)


@pytest.mark.parametrize("kind", EXPECTED)
def test_each_kind_normalizes_over_what_it_says_and_has_the_parameters_that_the_table_says(kind):
    for (y, params, stats), x in results(kind):
        assert_allclose(y, EXPECTED[kind](np.float64(x)), atol=1e-4)
        shapes = jax.tree.map(jnp.shape, params)
        assert shapes == ({} if kind == "none" else {"scale": (6,), "bias": (6,)})
        assert NORMS[kind].has_bias == ("bias" in shapes) and NORMS[kind].over_batch == bool(stats)


@pytest.mark.parametrize("kind, weight", [("batch", 1), ("renorm", 1), ("ghost", 1), ("flax", 0.25)])
def test_running_statistics_are_those_of_the_whole_batch_by_the_rule_or_by_the_momentum(kind, weight):
    for (_, _, stats), x in results(kind):
        over = np.float64(x).reshape(-1, 6)
        assert_allclose(stats["mean"], weight * over.mean(0), rtol=1e-5, atol=1e-6)
        assert_allclose(stats["var"], 1 - weight + weight * over.var(0), rtol=1e-5)
        more = {"flax": set(), "renorm": {"count", "num_updates"}}.get(kind, {"count"})
        assert stats.keys() == {"mean", "var"} | more and stats.get("num_updates", 1) == 1
        assert_allclose(stats.get("count", 0.25), 0.25)


def test_inputs_go_through_a_layer_of_their_own_where_a_config_asks_for_it():
    for kind in ("batch", "ghost", "flax"):
        asked = make(kind, norm_inputs=True)
        for train in (True, False):
            layer = asked.linen_input_layer(train=train)
            assert layer == asked.linen_layer(train=train) and layer.use_running_average != train
        layers = [make(6, rngs=nnx.Rngs(0)) for make in (asked.nnx_input_layer, asked.nnx_layer)]
        assert type(layers[0]) is type(layers[1]) and str(layers[0]) == str(layers[1])
        for layer in (
            make(kind).linen_input_layer(train=True),
            make(kind).nnx_input_layer(6, rngs=nnx.Rngs(0)),
        ):
            assert layer(VECTORS) is VECTORS


def test_limits_of_renorm_are_the_papers_in_proportion_to_the_job():
    limits = Norm(Model(norm="renorm"), RULE, steps=1000).limits
    assert limits == jbn.renorm_limits(r_max=3.0, d_max=5.0, plain=40, r_steps=270, d_steps=154)
    at_once = Norm(Model(norm_ramp=0.0, norm_plain=0.0, norm_r_max=2.0), RULE, steps=10).limits
    assert at_once == jbn.renorm_limits(r_max=2.0, plain=1, r_steps=0, d_steps=0)


def test_running_rule_is_a_moving_average_with_the_configs_momentum_debiased_or_not():
    moments = lambda mean, var, count: jbn.Moments(*(jnp.full(2, value) for value in (mean, var, count)))
    batches = (2.0, 5.0), (-3.0, 7.0)
    for momentum, debias in (0.0, True), (0.0, False), (0.75, True), (0.75, False):
        rule = jax.jit(running_rule(Model(norm_momentum=momentum, norm_debias=debias)))
        running = moments(0.0, 1.0, 0.0)
        mean, var, weight = 0.0, 1.0, 0.0
        for batch_mean, batch_var in batches:
            running = rule(running, moments(batch_mean, batch_var, 64.0))
            mean = momentum * mean + (1 - momentum) * batch_mean
            var = momentum * var + (1 - momentum) * batch_var
            weight = momentum * weight + 1 - momentum
            # What is left of the initial mean 0 and variance 1 has the weight 1 - weight.
            expected = mean / weight if debias else mean
            assert_allclose(running.mean, np.full(2, expected), rtol=1e-5, err_msg=f"{momentum} {debias}")
            expected = (var - (1 - weight)) / weight if debias else var
            assert_allclose(running.var, np.full(2, expected), rtol=1e-5, err_msg=f"{momentum} {debias}")


def test_bfloat16_is_for_outputs_alone():
    x = jnp.asarray(VECTORS, jnp.bfloat16)
    for kind in NORMS:
        for run in (in_linen, in_nnx):
            y, *variables = jax.eval_shape(partial(run, make(kind, dtype="bfloat16")), x)
            assert y.dtype == jnp.bfloat16, kind
            dtypes = {leaf.dtype for leaf in jax.tree.leaves(variables)} - {jnp.dtype("int32")}  # of counters
            assert dtypes <= {jnp.dtype("float32")}, kind


def test_only_what_normalizes_over_the_batch_does_something_else_in_inference():
    for kind in NORMS:
        training, inference = (make(kind).linen_layer(train=train) for train in (True, False))
        assert (training != inference) == NORMS[kind].over_batch, kind


def test_norms_of_the_same_options_are_equal_and_hash_alike():
    assert make("batch") == make("batch") and hash(make("batch")) == hash(make("batch"))
    others = {make("batch", norm_momentum=0.5), make("batch", norm_inputs=True)}
    assert len({make(kind) for kind in NORMS} | others) == len(NORMS) + 2


@pytest.mark.parametrize(
    "name, widths", [("mlp", (6, 4)), ("nnx_mlp", (6, 4)), ("cnn", (6, 4)), ("resnet20", (4, 6, 6))]
)
def test_a_further_norm_keeps_the_bias_of_the_layers_before_it_unless_it_says_that_it_has_one(
    name, widths, monkeypatch
):
    x = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)

    def names_of_parameters():
        network = build(Model(name=name, norm="rms", widths=widths), x.shape[1:], classes=3)
        variables = jax.eval_shape(network.init, jax.random.key(0), x)
        _, stats = jax.eval_shape(partial(network.apply, train=True), variables, x)
        assert stats == variables.batch_stats == {}
        return [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(variables.params)]

    monkeypatch.setitem(NORMS, "rms", NormKind(nn.RMSNorm, nnx.RMSNorm))
    names = names_of_parameters()
    assert names.count("bias") == names.count("kernel") == 1 + names.count("scale")
    monkeypatch.setitem(NORMS, "rms", NormKind(nn.RMSNorm, nnx.RMSNorm, has_bias=True))
    assert names_of_parameters().count("bias") == 1  # of the head
