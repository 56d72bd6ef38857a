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
from train import parsing
from train.config import Model
from train.errors import UserError
from train.models import network as models

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


FUNCTIONS = {"relu": lambda x: np.maximum(x, 0), "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh}


def mlp(variables, inputs, *, train, activation="relu"):
    """Computes the Linen MLP: its logits, and what each activation gets."""
    params, stats = variables
    x, seen = np.float64(inputs).reshape(len(inputs), -1), []

    def normalized(x, layer):
        moments = reference.moments(x)[:2] if train else (stats[layer]["mean"], stats[layer]["var"])
        return reference.normalize(x, *moments, params[layer]["scale"], params[layer]["bias"])

    norms = sorted(name for name in params if name.startswith("BatchNorm"))
    if len(norms) == 3:
        x = normalized(x, norms.pop(0))  # of the inputs
    for i, norm in enumerate(norms):
        seen.append(normalized(x @ params[f"Dense_{i}"]["kernel"], norm))
        x = FUNCTIONS[activation](seen[-1])
    return x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"], seen


@pytest.mark.parametrize(
    "options",
    [{"activation": "relu"}, {"activation": "sigmoid"}, {"activation": "tanh"}, {"norm_inputs": True}],
    ids=str,
)
@pytest.mark.parametrize("name", ["mlp", "nnx_mlp"])
def test_mlp_and_its_activation_inputs_are_linear_maps_normalization_and_the_activation(name, options):
    linen, network = build("mlp", **options), build(name, **options)
    variables = initial(linen)
    given = models.Variables(*map(as_nnx, variables)) if name == "nnx_mlp" else variables

    @quick_jit
    def run(variables):
        first = [network.apply(variables, IMAGES, train=train) for train in (True, False)]
        seen = [network.activation_inputs(variables, IMAGES, train=train) for train in (True, False)]
        again = [network.apply(variables, IMAGES, train=train) for train in (True, False)]
        return first, seen, again

    kept = jax.tree.map(np.array, given)
    first, seen, again = run(given)
    jax.tree.map(assert_array_equal, first, again)
    jax.tree.map(assert_array_equal, given, kept)
    assert network == build(name, **options)
    for train, (logits, _), inputs in zip((True, False), first, seen):
        wanted, wanted_inputs = mlp(
            variables, IMAGES, train=train, activation=options.get("activation", "relu")
        )
        assert_allclose(logits, wanted, rtol=2e-4)
        for ours, theirs in zip(inputs, wanted_inputs, strict=True):
            assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["mlp", "nnx_mlp"])
def test_activation_inputs_are_arrays_outside_jit_too_and_the_variables_are_untouched(name):
    network = build(name, norm="none")
    variables = initial(network)
    kept = jax.tree.map(np.array, variables)
    seen = network.activation_inputs(variables, IMAGES, train=True)
    jax.tree.map(assert_array_equal, variables, kept)
    inside = quick_jit(partial(network.activation_inputs, train=True))(variables, IMAGES)
    assert [x.shape for x in seen] == [(4, 6), (4, 4)]
    close(seen, inside)


@pytest.mark.parametrize("name", LAYERS)
def test_networks_tell_their_activation(name):
    for activation in FUNCTIONS:
        assert build(name, activation=activation).activation is getattr(nn, activation)


# A residual network has one activation a layer but for its shortcuts, whose sum with the block it is.
@pytest.mark.parametrize("name, count", [("cnn", 4), ("resnet20", 19), ("resnet18", 17), ("resnet50", 49)])
@pytest.mark.parametrize("train", [True, False])
def test_each_activation_of_a_network_is_seen_once_in_its_dtype(name, count, train):
    network = build(name, dtype="bfloat16")
    seen = jax.eval_shape(partial(network.activation_inputs, train=train), shapes(network), IMAGES)
    assert [x.dtype for x in seen] == count * [jnp.bfloat16]
    assert {x.shape[0] for x in seen} == {4}


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_activation_inputs_of_an_example_depend_on_the_others_in_training_alone(name):
    network = build(name)
    variables = initial(network)

    @quick_jit
    def run(inputs):
        return [network.activation_inputs(variables, inputs, train=train) for train in (True, False)]

    (training, inference), (other_training, other_inference) = run(IMAGES), run(IMAGES.at[1:].multiply(0.5))
    for ours, theirs in zip(inference, other_inference, strict=True):
        assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6 * np.abs(ours).max())
        assert (ours[1:] != theirs[1:]).any()
    for ours, theirs in zip(training, other_training, strict=True):
        assert np.abs(ours[0] - theirs[0]).max() > 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_normalized_inputs_are_one_layer_more_of_which_each_feature_has_a_mean(name):
    network = build(name, norm_inputs=True)
    params, stats = shapes(network)
    assert len(parents(stats, "mean")) == LAYERS[name] + 1
    assert len(parents(params, "kernel")) == LAYERS[name] + 1
    first = "norm_of_inputs" if name == "nnx_mlp" else "BatchNorm_0"
    features = 64 if "mlp" in name else 1
    assert params[first]["scale"].shape == stats[first]["mean"].shape == (features,)


@pytest.mark.parametrize("debias, weight, count", [(True, 1, 0.25), (False, 0.25, 1)])
@pytest.mark.parametrize("norm", ["batch", "ghost"])
def test_running_statistics_after_a_step_are_the_batchs_or_a_quarter_of_them(norm, debias, weight, count):
    network = build("mlp", norm=norm, norm_momentum=0.75, norm_debias=debias)
    params, _ = initial(network)
    _, stats = network.init(jax.random.key(0), IMAGES)
    _, stats = quick_jit(partial(network.apply, train=True))(models.Variables(params, stats), IMAGES)
    first = stats["BatchNorm_0"]
    x = np.float64(IMAGES).reshape(4, -1) @ params["Dense_0"]["kernel"]
    assert_allclose(first["mean"], weight * x.mean(0), rtol=1e-4, atol=1e-6)
    assert_allclose(first["var"], 1 - weight + weight * x.var(0), rtol=1e-4)
    assert_allclose(first["count"], count, rtol=1e-5)


def as_nnx(tree):
    """Moves the variables of the Linen MLP to where the NNX one has them."""
    moved = {"hidden": {0: {}, 1: {}}}
    before = 1 if "BatchNorm_2" in tree else 0  # norms, of the inputs
    for layer, leaves in tree.items():
        kind, _, i = layer.partition("_")
        if (kind, i) == ("Dense", "2"):
            moved["head"] = leaves
        elif kind == "Dense":
            moved["hidden"][int(i)]["linear"] = leaves
        elif int(i) < before:
            moved["norm_of_inputs"] = leaves
        else:
            moved["hidden"][int(i) - before]["norm"] = leaves
    return moved if tree else {}


# Not Flax's own layers in bfloat16, which round at other places in NNX than in Linen.
@pytest.mark.parametrize(
    "options",
    [*({"norm": norm} for norm in NORMS), {"dtype": "bfloat16"}, {"rule": jbn.pooled()}]
    + [{"norm": norm, "norm_inputs": True, "norm_debias": False} for norm in ("batch", "ghost", "flax")],
    ids=str,
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

    for options in (
        {},
        {},
        {"norm_debias": False},
        {"rule": jbn.pooled()},
        {"activation": "tanh"},
        {"kernel_std": 0.1},
    ):
        trace(build(name, **options))
    assert len(compiled) == 5
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
    path = Path(__file__).parents[3] / "configs" / f"{config}.toml"
    network = models.build(parsing.load(path, []).model, input_shape, classes=10)
    params, _ = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *input_shape)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters
