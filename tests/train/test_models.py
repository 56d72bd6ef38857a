"""All networks as pairs of pure functions; the perceptrons, in Linen and NNX, by value."""

import math
from functools import partial
from itertools import product
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import quick_jit
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from train import models, parsing
from train.config import Model
from train.errors import UserError

IMAGES = jnp.asarray(np.random.RandomState(0).rand(4, 8, 8, 1), jnp.float32)
# How many layers each has that are normalized, with the widths that test it fast.
LAYERS = {"mlp": 2, "nnx_mlp": 2, "cnn": 4, "resnet20": 19, "resnet56": 55, "resnet18": 20, "resnet50": 53}
NARROW = {"mlp": (6, 4), "nnx_mlp": (6, 4), "cnn": (6, 4), "resnet20": (4, 6, 6), "resnet56": (4, 4, 4)}
NARROW |= dict.fromkeys(("resnet18", "resnet50"), (4, 6, 8, 10))
FAST = ("mlp", "nnx_mlp", "cnn")
NORMS = ("batch", "none", "ghost", "layer", "group", "flax")


def build(name, rule=None, **options):
    options = {"widths": NARROW[name], "norm_groups": 2, "virtual_batch_size": 2} | options
    return models.build(Model(name=name, **options), IMAGES.shape[1:], classes=3, rule=rule)


def shapes(network):
    return jax.eval_shape(network.init, jax.random.key(0), IMAGES)


def initial(network):
    """Returns variables of which no leaf is as it starts."""
    random = np.random.RandomState(0)
    return jax.tree.map(lambda s: jnp.asarray(random.uniform(0.5, 1.5, s.shape), s.dtype), shapes(network))


def empty(stats):
    """Returns running statistics of no batch, whose variance may be anything."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * (path[-1].key == "var"), stats)


def names(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def parents(tree, leaf):
    return {name.rpartition("/")[0] for name in names(tree) if name.rpartition("/")[2] == leaf}


def inputs_of_norms(network, variables, inputs):
    """Returns what each normalization layer of a Linen network gets, in training."""
    seen = {}

    def remember(call, args, kwargs, context):
        if type(context.module).__name__ == "BatchNorm":
            seen["/".join(context.module.path)] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(remember):
        network.apply(variables, inputs, train=True)
    return seen


def close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", LAYERS)
def test_every_hidden_layer_is_normalized_and_has_no_bias_of_its_own(name):
    network = build(name)
    params, stats = shapes(network)
    normalized = parents(stats, "mean")
    assert len(normalized) == LAYERS[name]
    assert len(names(stats)) == 3 * len(normalized)
    assert parents(stats, "var") == parents(stats, "count") == parents(params, "scale") == normalized
    assert len(parents(params, "kernel")) == LAYERS[name] + 1
    (head,) = parents(params, "kernel") & parents(params, "bias")
    assert parents(params, "bias") == normalized | {head}


@pytest.mark.parametrize("name", [*FAST, "resnet20", "resnet50"])
def test_without_norm_every_layer_has_a_bias_and_there_are_no_statistics(name):
    params, stats = shapes(build(name, norm="none"))
    assert stats == {}
    assert parents(params, "kernel") == parents(params, "bias")
    assert len(names(params)) == 2 * (LAYERS[name] + 1)


@pytest.mark.parametrize("norm", ["none", "layer", "group"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_norms_of_single_examples_do_the_same_in_training_and_inference(name, norm):
    network = build(name, norm=norm)
    (logits, stats), (expected, _) = (
        quick_jit(partial(network.apply, train=train))(initial(network), IMAGES) for train in (True, False)
    )
    assert_allclose(logits, expected, rtol=1e-5)
    assert stats == {}


@pytest.mark.parametrize("name, norm", [*product(FAST, NORMS), ("resnet20", "ghost"), ("resnet20", "group")])
def test_every_network_takes_every_norm_and_names_its_parameters_as_optimizers_ask(name, norm):
    network = build(name, norm=norm)
    variables = shapes(network)
    logits, stats = jax.eval_shape(partial(network.apply, train=True), variables, IMAGES)
    assert (logits.shape, logits.dtype) == ((4, 3), jnp.float32)
    assert stats == variables.batch_stats
    keys = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(variables.params)}
    assert keys == {"kernel", "bias"} | ({"scale"} if norm != "none" else set())


@pytest.mark.parametrize("name", FAST)
def test_inference_leaves_the_statistics_alone_and_takes_each_example_by_itself(name):
    network = build(name)
    variables = initial(network)
    infer = quick_jit(partial(network.apply, train=False))
    logits, stats = infer(variables, IMAGES)
    jax.tree.map(assert_array_equal, stats, variables.batch_stats)
    changed, _ = infer(variables, IMAGES.at[1:].add(1))
    assert_allclose(changed[0], logits[0], rtol=1e-5)
    assert (changed[1:] != logits[1:]).any(-1).all()


@pytest.mark.parametrize("norm", ["batch", "ghost"])
@pytest.mark.parametrize("name", [*FAST, "resnet20"])
def test_statistics_of_both_rules_have_one_structure(name, norm):
    a, b = (shapes(build(name, norm=norm, rule=rule)) for rule in (None, jbn.pooled()))
    assert a == b


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_pooled_statistics_are_those_of_both_halves_each_normalized_by_itself(name):
    network = build(name, rule=jbn.pooled())
    variables = initial(network)
    halves = IMAGES.reshape(2, 2, *IMAGES.shape[1:])

    def step(stats, half):
        logits, stats = network.apply(models.Variables(variables.params, stats), half, train=True)
        return stats, logits

    stats, _ = quick_jit(lambda: jax.lax.scan(step, empty(variables.batch_stats), halves))()
    seen = quick_jit(jax.vmap(partial(inputs_of_norms, network, variables)))(halves)
    assert len(seen) == LAYERS[name]
    for layer, x in seen.items():
        expected = reference.moments(x)
        for leaf, value in zip(jbn.Moments._fields, expected):
            assert_allclose(stats[layer][leaf], value, rtol=2e-4, atol=1e-5, err_msg=layer)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_mlp_is_linear_maps_normalization_and_the_activation_named(activation):
    network = build("mlp", activation=activation)
    params, _ = variables = initial(network)
    logits, stats = quick_jit(partial(network.apply, train=True))(variables, IMAGES)
    f = {"relu": lambda x: np.maximum(x, 0), "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh}
    x = np.float64(IMAGES).reshape(4, -1)
    for i in range(2):
        norm = params[f"BatchNorm_{i}"]
        x = x @ params[f"Dense_{i}"]["kernel"]
        x = f[activation](reference.batch_norm(x, norm["scale"], norm["bias"]))
    assert_allclose(logits, x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"], rtol=2e-4)


def test_running_statistics_are_debiased():
    network = build("mlp", norm_momentum=0.75)
    params, stats = initial(network)
    variables = models.Variables(params, empty(stats))
    _, stats = quick_jit(partial(network.apply, train=True))(variables, IMAGES)
    first = stats["BatchNorm_0"]
    x = np.float64(IMAGES).reshape(4, -1) @ params["Dense_0"]["kernel"]
    assert_allclose(first["mean"], x.mean(0), rtol=1e-4, atol=1e-6)
    assert_allclose(first["var"], x.var(0), rtol=1e-4)
    assert_allclose(first["count"], 0.25, rtol=1e-5)


def as_nnx(tree):
    """Moves the variables of the Linen MLP to where the NNX one has them."""
    moved = {"hidden": {0: {}, 1: {}}}
    for layer, leaves in tree.items():
        kind, _, i = layer.partition("_")
        if (kind, i) == ("Dense", "2"):
            moved["head"] = leaves
        else:
            moved["hidden"][int(i)]["linear" if kind == "Dense" else "norm"] = leaves
    return moved if tree else {}


# Not Flax's own layers in bfloat16, which round at other places in NNX than in Linen.
@pytest.mark.parametrize(
    "options", [*({"norm": norm} for norm in NORMS), {"dtype": "bfloat16"}, {"rule": jbn.pooled()}], ids=str
)
def test_mlp_in_nnx_is_that_in_linen(options):
    linen, nnx = build("mlp", **options), build("nnx_mlp", **options)
    variables = initial(linen)
    moved = models.Variables(*map(as_nnx, variables))
    assert shapes(nnx) == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), moved)

    @partial(quick_jit, static_argnums=0)
    def run(network, variables):
        logits, stats = network.apply(variables, IMAGES, train=True)
        return stats, logits, network.apply(variables, IMAGES, train=False)[0]

    stats, *logits = run(linen, variables)
    close(run(nnx, moved), (as_nnx(stats), *logits))


def test_gradients_of_the_mlp_in_nnx_are_those_in_linen():
    linen, nnx = build("mlp"), build("nnx_mlp")
    params, stats = initial(linen)

    def loss(network, params, stats):
        logits, _ = network.apply(models.Variables(params, stats), IMAGES, train=True)
        return (logits**2).sum()

    gradient = quick_jit(jax.grad(loss, argnums=1), static_argnums=0)
    close(gradient(nnx, as_nnx(params), as_nnx(stats)), as_nnx(gradient(linen, params, stats)))


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_bfloat16_is_for_activations_alone(name, norm):
    network = build(name, norm=norm, dtype="bfloat16")
    module, variables = network.module, shapes(network)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    head = "Dense_2" if name == "mlp" else "Dense_0"
    step = partial(module.apply, train=True, mutable=True, capture_intermediates=True)
    _, state = jax.eval_shape(step, variables._asdict(), IMAGES)
    for layer, outputs in state["intermediates"].items():
        wanted = "float32" if layer in (head, "__call__") else "bfloat16"
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(wanted)}, layer


@pytest.mark.parametrize("name", LAYERS)
def test_networks_of_equal_configs_are_compiled_once(name):
    compiled = []

    @partial(jax.jit, static_argnums=0)
    def trace(network):
        compiled.append(network)
        return jnp.zeros(())

    for options in ({}, {}, {"norm_momentum": 0.5}, {"rule": jbn.pooled()}, {"activation": "tanh"}):
        trace(build(name, **options))
    assert len(compiled) == 4
    assert build(name) == build(name) != build(name, norm="none")


@pytest.mark.parametrize("name", [name for name in LAYERS if "mlp" not in name])
def test_convolutions_on_vectors_are_refused(name):
    message = f"model.name = '{name}', but the inputs are vectors of length 7.*'mlp'"
    with pytest.raises(UserError, match=message):
        models.build(Model(name=name), (7,), classes=3)


@pytest.mark.parametrize(
    "name, wanted", [("resnet20", "3 widths.*16, 32, 64"), ("resnet50", "4 widths.*512")]
)
def test_residual_networks_want_a_width_for_each_stage(name, wanted):
    with pytest.raises(
        UserError, match=rf"model.widths = \[8, 8\] and model.name = '{name}'; wanted {wanted}"
    ):
        build(name, widths=(8, 8))


@pytest.mark.parametrize("name", ["mlp", "nnx_mlp", "cnn"])
def test_groups_must_divide_every_width(name):
    message = (
        r"norm_groups = 8, which does not divide 12 of model.widths = \[16, 12\]; wanted one of 1, 2, 4,"
    )
    with pytest.raises(UserError, match=message):
        build(name, widths=(16, 12), norm="group", norm_groups=8)
    build(name, widths=(16, 12), norm="group", norm_groups=4)
    build(name, widths=(16, 12), norm="layer", norm_groups=8)


@pytest.mark.parametrize(
    "config, input_shape, parameters",
    [
        ("digits_mlp_nnx", (8, 8, 1), 64 * 128 + 128**2 + 4 * 128 + 1290),
        ("cifar10_resnet20", (32, 32, 3), 269722),
    ],
)
def test_config_names_a_network_of_the_usual_size(config, input_shape, parameters):
    path = Path(__file__).parents[2] / "configs" / f"{config}.toml"
    network = models.build(parsing.load(path, []).model, input_shape, classes=10)
    params, _ = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *input_shape)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters
