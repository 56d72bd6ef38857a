"""What all networks have in common: their layers, statistics and dtypes, and what they refuse."""

import math
from functools import partial
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from train.config import Model, NetworkName
from train.models import NORMS, build, check
from train.models.build import NETWORKS

IMAGES = jnp.asarray(np.random.RandomState(0).rand(4, 8, 8, 1), jnp.float32)
# How many layers each has that are normalized, how many activations, and widths that test it fast. A residual
# network has one activation a layer but for its shortcuts, whose sum with the block it is.
LAYERS = {"mlp": 2, "nnx_mlp": 2, "cnn": 4, "resnet20": 19, "resnet56": 55, "resnet18": 20, "resnet50": 53}
ACTIVATIONS = {"mlp": 2, "nnx_mlp": 2, "cnn": 4, "resnet50": 49}
NARROW = {"mlp": (6, 4), "nnx_mlp": (6, 4), "cnn": (6, 4), "resnet20": (4, 6, 6), "resnet56": (4, 4, 4)}
NARROW |= dict.fromkeys(("resnet18", "resnet50"), (4, 6, 8, 10))


def make(name, rule=None, **options):
    options = {"widths": NARROW[name], "norm_groups": 2, "virtual_batch_size": 2} | options
    return build(Model(name=name, **options), IMAGES.shape[1:], classes=3, rule=rule)


def shapes(network):
    return jax.eval_shape(network.init, jax.random.key(0), IMAGES)


def names(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def parents(tree, leaf):
    return {name.rpartition("/")[0] for name in names(tree) if name.rpartition("/")[2] == leaf}


def test_the_schema_and_the_table_of_networks_have_the_same_names():
    assert set(NETWORKS) == set(get_args(NetworkName)) == set(LAYERS)


# The images that each is meant for, the classes, and how many parameters it then has.
USUAL = {
    "mlp": ((8, 8, 1), 10, 64 * 128 + 128**2 + 4 * 128 + 1290),
    "nnx_mlp": ((8, 8, 1), 10, 64 * 128 + 128**2 + 4 * 128 + 1290),
    "cnn": ((8, 8, 1), 10, 9 * (32 + 32 * 32 + 32 * 64 + 64 * 64) + 4 * (32 + 64) + 650),
    "resnet20": ((32, 32, 3), 10, 269_722),  # 0.27 M in table 6 of He et al.
    "resnet56": ((32, 32, 3), 10, 853_018),  # 0.85 M
    "resnet18": ((224, 224, 3), 1000, 11_689_512),  # torchvision's
    "resnet50": ((224, 224, 3), 1000, 25_557_032),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_every_hidden_layer_is_normalized_and_the_parameters_are_as_many_as_published(name):
    image, classes, parameters = USUAL[name]
    network = build(Model(name=name), image, classes)
    params, stats = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, *image), np.float32))
    normalized = parents(stats, "mean")
    assert len(normalized) == LAYERS[name] and len(names(stats)) == 3 * len(normalized)
    assert parents(stats, "var") == parents(stats, "count") == parents(params, "scale") == normalized
    assert len(parents(params, "kernel")) == LAYERS[name] + 1
    (head,) = parents(params, "kernel") & parents(params, "bias")
    assert parents(params, "bias") == normalized | {head}
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("name", ["mlp", "nnx_mlp", "cnn", "resnet20"])
def test_without_norm_every_layer_has_a_bias_and_there_are_no_statistics(name):
    params, stats = shapes(make(name, norm="none"))
    assert stats == {}
    assert parents(params, "kernel") == parents(params, "bias")
    assert len(names(params)) == 2 * (LAYERS[name] + 1)


@pytest.mark.parametrize("name", ["mlp", "nnx_mlp", "cnn", "resnet20"])
def test_every_network_takes_every_norm_and_names_its_parameters_as_optimizers_ask(name):
    for norm in ("group",) if name == "resnet20" else NORMS:
        network = make(name, norm=norm)
        variables = shapes(network)
        logits, stats = jax.eval_shape(partial(network.apply, train=True), variables, IMAGES)
        assert (logits.shape, logits.dtype) == ((4, 3), jnp.float32), norm
        assert stats == variables.batch_stats, norm
        keys = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(variables.params)}
        assert keys == {"kernel", "bias"} | ({"scale"} if norm != "none" else set()), norm
        if norm == "ghost":
            assert shapes(make(name, norm=norm, rule=jbn.pooled())) == variables, norm


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_of_a_network_is_seen_once_in_its_dtype(name):
    for activation in ("relu", "sigmoid", "tanh"):
        assert make(name, activation=activation).activation is getattr(nn, activation)
    network = make(name, dtype="bfloat16", norm="none" if name == "resnet50" else "batch")
    seen = jax.eval_shape(partial(network.activation_inputs, train=True), shapes(network), IMAGES)
    assert [x.dtype for x in seen] == ACTIVATIONS[name] * [jnp.bfloat16]
    assert {x.shape[0] for x in seen} == {4}


@pytest.mark.parametrize("name", ["mlp", "cnn", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_bfloat16_is_for_activations_alone(name):
    head = "Dense_2" if name == "mlp" else "Dense_0"
    found = {}

    def remember(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if len(context.module.path) == 1 and context.method_name == "__call__":
            found[context.module.path[0]] = (args[0].dtype.name, result.dtype.name)
        return result

    for norm in ("batch",) if name == "resnet20" else ("batch", "none"):
        network = make(name, norm=norm, dtype="bfloat16")
        variables = shapes(network)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
        with nn.intercept_methods(remember):
            jax.eval_shape(partial(network.apply, train=True), variables, IMAGES)
        # The mean over positions and the logits are float32.
        assert found.pop(head) == ("float32", "float32")
        assert set(found.values()) == {("bfloat16", "bfloat16")}


def test_running_statistics_follow_the_rule_that_is_given_or_that_of_the_config():
    for name in ("mlp", "cnn", "resnet20"):
        assert make(name, norm_momentum=0.75, norm_debias=False).module.norm.rule == jbn.ema(0.75)
        assert make(name, rule=jbn.pooled()).module.norm.rule == jbn.pooled()


@pytest.mark.parametrize("name", LAYERS)
def test_networks_of_equal_configs_are_compiled_once(name):
    compiled = []

    @partial(jax.jit, static_argnums=0)
    def trace(network):
        compiled.append(network)
        return jnp.zeros(())

    for options in (
        {},
        {"norm": "none"},
        {"norm_momentum": 0.5},
        {"activation": "tanh"},
        {"rule": jbn.pooled()},
    ):
        trace(make(name, **options))
        trace(make(name, **options))
    assert len(compiled) == 5
    assert make(name) == make(name) != make(name, norm="none")


def test_networks_that_do_not_fit_are_refused_with_what_would(refusal):
    for name, kind in NETWORKS.items():
        if kind.for_images:
            assert refusal(build, Model(name=name), (7,), 3) == (
                f"model.name: expected 'mlp' for vectors of length 7, got '{name}', which takes images."
            )
    for name, count, usual in ("resnet20", 3, [16, 32, 64]), ("resnet50", 4, [64, 128, 256, 512]):
        assert refusal(make, name, widths=(8, 8)) == (
            f"model.widths: expected {count} for model.name = '{name}', one for each stage, such as {usual}, "
            "got [8, 8]."
        )
    for norm in ("none", "layer", "group"):
        assert refusal(make, "mlp", norm=norm, norm_inputs=True) == (
            "model.norm: expected one that normalizes each feature by itself with model.norm_inputs = true, "
            f"batch or renorm or ghost or flax, got '{norm}'."
        )
    for norm, kind in NORMS.items():
        if norm == "flax":
            assert refusal(check, Model(norm=norm), accumulate=2) == (
                "optimizer.accumulate: expected 1 with model.norm = 'flax', whose running statistics cannot "
                "pool the parts of a batch, got 2; those of 'batch' and 'renorm' and 'ghost' can."
            )
        else:
            check(Model(norm=norm), accumulate=2)
            assert kind.pools == kind.over_batch
        if not kind.pools:
            assert refusal(make, "mlp", norm=norm, domains=2) == (
                "model.norm: expected 'batch' or 'renorm' or 'ghost' with model.domains = 2, whose "
                f"statistics can be by domain, got '{norm}'."
            )
    for name in ("mlp", "nnx_mlp", "cnn"):
        assert refusal(make, name, widths=(16, 12), norm="group", norm_groups=8) == (
            "model.norm_groups: expected a divisor of all model.widths = [16, 12], that is 1 or 2 or 4, got "
            "8."
        )
        make(name, widths=(16, 12), norm="group", norm_groups=4)
        make(name, widths=(16, 12), norm="layer", norm_groups=8)


@pytest.mark.slow
def test_networks_fold_into_those_without_norms_but_of_their_inputs():
    for name, norm in (("mlp", "renorm"), ("nnx_mlp", "renorm"), ("nnx_mlp", "flax"), ("cnn", "ghost")):
        network = make(name, norm=norm, norm_inputs=True)
        folded, variables = folds(network)
        assert hash(folded) == hash(network.fold(variables, IMAGES)[0])  # it can be a static argument


@pytest.mark.slow
@pytest.mark.parametrize("name, norm", [("resnet20", "batch"), ("resnet50", "flax")])
def test_residual_networks_fold_whole(name, norm):
    folds(make(name, norm=norm, norm_inputs=True))


def folds(network):
    """Check the network without its norms; return it, and the variables of the whole one."""
    draw = lambda leaf: jnp.asarray(np.random.RandomState(leaf.size).uniform(0.2, 1, leaf.shape), leaf.dtype)
    variables = jax.tree.map(draw, shapes(network))
    folded, kept = network.fold(variables, IMAGES)
    assert len(parents(kept.batch_stats, "mean")) == len(parents(kept.params, "scale")) == 1
    whole, _ = jax.jit(partial(network.apply, train=False))(variables, IMAGES)
    actual, _ = jax.jit(partial(folded.apply, train=False))(kept, IMAGES)
    np.testing.assert_allclose(actual, whole, rtol=1e-5, atol=1e-5 * np.max(np.abs(whole)))
    return folded, variables
