"""Linen networks give the same outputs without their norms: which norms are found, folded, and left out."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from numpy.testing import assert_allclose

import jbn
import jbn.linen
from tests.helpers.resnet import ResNet

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.RandomState(0)


def draw(*shape):
    return RNG.normal(0.3, 1, shape).astype(np.float32)


X = draw(5, 4)


def drawn(model, x, **options):
    """Draw trained variables of a model, all of them other than those that it starts from."""

    def values(path, leaf):
        name = getattr(path[-1], "key", None)
        value = np.exp(draw(*leaf.shape)) if name == "var" else draw(*leaf.shape)
        return jnp.asarray(
            value / np.sqrt(np.prod(leaf.shape[:-1])) if name == "kernel" else value, leaf.dtype
        )

    shapes = jax.eval_shape(partial(model.init, **options), jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(values, shapes)


def outputs(models, **options):
    """Return the pairs of each model, and what it puts out with its norms and without them."""
    found, variables, inputs = {}, {}, {}
    for name, (model, x) in models.items():
        variables[name], inputs[name] = drawn(model, x, **options), x
        found[name] = jbn.linen.find_pairs(partial(model.apply, **options), variables[name], x, strict=True)

    @jax.jit
    def run(variables, inputs):
        both = {}
        for name, (model, _) in models.items():
            folded = jbn.linen.fold(variables[name], found[name])
            with jbn.linen.without_norms(found[name]):
                y = model.apply(folded, inputs[name], **options)
            both[name] = model.apply(variables[name], inputs[name], **options), y
        return both

    return found, run(variables, inputs)


def agree(both):
    for name, (whole, folded) in both.items():
        assert whole.dtype == folded.dtype and np.std(whole) > 0.05, name
        assert_allclose(folded, whole, rtol=0, atol=1e-5 * max(1, np.max(np.abs(whole))), err_msg=name)


def norm(layer=nn.BatchNorm, **options):
    return layer(use_running_average=True, **options)


@pytest.mark.slow
def test_every_kind_of_layer_folds_with_and_without_bias_and_scale():
    image = draw(2, 6, 5, 4)
    layers = {
        "dense": (nn.Dense, (6,), {}, X),
        "dense, no bias": (nn.Dense, (6,), {"use_bias": False}, X),
        "1-d, causal": (nn.Conv, (6, 3), {"padding": "CAUSAL"}, draw(2, 7, 4)),
        "strided": (nn.Conv, (6, (3, 3), 2), {"use_bias": False}, image),
        "dilated, circular": (nn.Conv, (6, (3, 3)), {"kernel_dilation": 2, "padding": "CIRCULAR"}, image),
        "grouped": (nn.Conv, (6, (3, 3)), {"feature_group_count": 2}, image),
        "depthwise": (nn.Conv, (4, (3, 3)), {"feature_group_count": 4, "use_bias": False}, image),
        "masked": (nn.Conv, (6, (2, 2)), {"mask": np.tril(np.ones((2, 2, 4, 6)))}, image),
        "3-d": (nn.Conv, (3, (2, 3, 1)), {"use_bias": False}, draw(2, 3, 3, 3, 4)),
        "transposed": (nn.ConvTranspose, (4, (3, 3), (2, 1)), {"use_bias": False}, image),
        "transposed, its kernel too": (
            nn.ConvTranspose,
            (4, (3, 3), (2, 2)),
            {"transpose_kernel": True},
            image,
        ),
    }
    ways = [
        dict(epsilon=1e-3),
        dict(use_scale=False, layer=jbn.linen.BatchNorm),
        dict(use_bias=False, axis=(-1,)),
        dict(use_scale=False, use_bias=False, layer=jbn.linen.BatchNorm, update=jbn.pooled()),
    ]
    models = {
        name: (nn.Sequential([kind(*arguments, **options), norm(**ways[i % 4]), nn.relu]), x)
        for i, (name, (kind, arguments, options, x)) in enumerate(layers.items())
    }
    found, both = outputs(models)
    agree(both)
    assert list(found.values()) == [{"layers_0": "layers_1"}] * len(layers)


@pytest.mark.slow
def test_residual_network_of_the_imagenet_example_folds_whole():
    x = draw(2, 16, 16, 3)
    models = {kind.__module__: (ResNet(kind, blocks=2), x) for kind in (nn.BatchNorm, jbn.linen.BatchNorm)}
    found, both = outputs(models, train=False)
    agree(both)
    for pairs in found.values():
        assert len(pairs) == 8 and pairs["Bottleneck_0/conv_proj"] == "Bottleneck_0/norm_proj"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(norm()(nn.Dense(x.shape[-1], use_bias=False)(x)))


class Blocks(nn.Module):
    """Blocks in every lifted transform, of which each folds."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(Block)(name="remat")(x)
        x = nn.jit(Block)(name="jit")(x)
        shared = Block(name="shared")
        x = shared(shared(x))
        stacked = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        x, _ = nn.scan(lambda block, x, _: (block(x), None), **stacked, length=3)(Block(name="scan"), x, None)
        return nn.vmap(Block, **stacked, in_axes=None, axis_size=2)(name="vmap")(x)


def test_blocks_in_lifted_transforms_fold_and_layers_that_are_called_twice():
    found, both = outputs({"blocks": (Blocks(), X)})
    agree(both)
    names = ("remat", "jit", "shared", "scan", "vmap")
    assert found["blocks"] == {f"{name}/Dense_0": f"{name}/BatchNorm_0" for name in names}


class Net(nn.Module):
    """A network of one function of its own."""

    call: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        return self.call(x)


class Scaled(nn.Dense):
    def param(self, name, *arguments, **options):
        return 2 * super().param(name, *arguments, **options)


class FromOne(nn.BatchNorm):
    def param(self, name, *arguments, **options):
        return 1 + super().param(name, *arguments, **options)


def residual(x):
    y = nn.Dense(4)(x)
    return norm()(y) + y


def other_layer(x):
    y = nn.Dense(4)(x)
    return norm()(y) + nn.Dense(4)(y)


def tied(x):
    layer = nn.Dense(4)
    y = norm()(layer(x))
    return y @ layer.variables["params"]["kernel"].T


def penalized(x):
    layer = norm()
    return layer(nn.Dense(4, use_bias=False)(x)), jnp.sum(jnp.abs(layer.variables["params"]["scale"]))


def also_without_layer(x):
    shared = norm()
    return shared(nn.Dense(4)(x)) + shared(x)


def two_sources(x):
    shared = norm()
    return shared(nn.Dense(4)(x)) + shared(nn.Dense(4)(x))


def two_norms(x):
    layer = nn.Dense(4)
    return norm()(layer(x)) + norm(epsilon=1e-3)(layer(x + 1))


def stacked(x, params, batch_stats, **options):
    return nn.vmap(
        Block,
        variable_axes={"params": params, "batch_stats": batch_stats},
        split_rngs={"params": params is not None},
        axis_size=5,
        **options,
    )()(x)


def shared_jit(x):
    block = nn.jit(Block)
    return block(name="a")(block(name="b")(x))


ours = partial(norm, jbn.linen.BatchNorm)
NOT_FOUND = {
    "its input is not what a Dense, Conv or ConvTranspose puts out": [
        lambda x: nn.Dense(4)(norm()(x)),
        lambda x: norm()(nn.relu(nn.Dense(4)(x))),
        lambda x: norm()(nn.DenseGeneral(4)(x)),
        also_without_layer,
    ],
    "'Dense_0' puts out is also read by add": [residual],
    "'Dense_0' puts out is also read by dot_general in .*Dense_1": [other_layer],
    "'Dense_0' puts out is also read by 'BatchNorm_1'": [two_norms],
    "'params/Dense_0/kernel' is read by more than its module": [tied],
    "'params/BatchNorm_0/scale' is read by more than its module": [penalized],
    "several layers: 'Dense_0', 'Dense_1'": [two_sources],
    "kernel' is not used as it stands": [
        lambda x: norm()(nn.WeightNorm(nn.Dense(4))(x)),
        lambda x: stacked(x, 1, 0),
        shared_jit,
    ],
    "not stacked over the same axes": [lambda x: stacked(x, None, 0), lambda x: stacked(x, 0, None)],
    "Scaled before it is not a plain Dense": [lambda x: norm()(Scaled(4)(x))],
    "FromOne changes its parameters": [lambda x: norm(FromOne)(nn.Dense(4)(x))],
    "ConvLocal before it": [lambda x: norm()(nn.ConvLocal(4, (2,))(x))],
    "has a dot_general of its own": [
        lambda x: norm()(nn.Dense(4, dot_general=lambda *a, **k: jnp.cbrt(jax.lax.dot_general(*a, **k)))(x))
    ],
    "has a promote_dtype of its own": [
        lambda x: norm()(nn.Dense(4, promote_dtype=lambda *leaves, **_: map(jnp.round, leaves))(x))
    ],
    "expected its axis to be -1, that of the features, got 0": [lambda x: norm(axis=0)(nn.Dense(4)(x))],
    "its call gives mask": [lambda x: ours()(nn.Dense(4)(x), mask=x > 0)],
    "its call gives scale": [lambda x: ours(use_scale=False)(nn.Dense(4)(x), scale=jnp.ones(4))],
}


@pytest.mark.slow
def test_what_may_not_fold_is_not_found_and_an_error_says_why():
    for reason, calls in NOT_FOUND.items():
        for call in calls:
            model = Net(call)
            variables = jax.eval_shape(model.init, jax.random.key(0), X)
            assert jbn.linen.find_pairs(model.apply, variables, X) == {}, reason
            with pytest.raises(ValueError, match=reason):
                jbn.linen.find_pairs(model.apply, variables, X, strict=True)


def test_a_norm_that_trains_or_whose_input_is_put_out_is_not_found():
    train = Net(lambda x: nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x)))
    with pytest.raises(ValueError, match="'BatchNorm_0': it normalizes by the batch"):
        jbn.linen.find_pairs(partial(train.apply, mutable=["batch_stats"]), drawn(train, X), X, strict=True)
    see_all = partial(MODEL.apply, capture_intermediates=True)
    with pytest.raises(ValueError, match="'layers_0' puts out is also read by what the model puts out"):
        jbn.linen.find_pairs(see_all, VARIABLES, X, strict=True)
    other = MODEL.clone(layers=[MODEL.layers[0], norm(epsilon=1.0), *MODEL.layers[2:]])
    with pytest.raises(ValueError, match="'layers_1' has another epsilon in another call"):
        both = lambda variables, x: MODEL.apply(variables, x) + other.apply(variables, x)
        jbn.linen.find_pairs(both, VARIABLES, X, strict=True)
    mapped = Net(lambda x: (y := nn.Dense(4)(x), norm()(y)))
    carried = Net(lambda x: norm()(nn.Dense(4)(x)))
    loop = lambda state, _: ((jax.tree.map(jnp.square, state[0]), carried.apply(*state)), None)
    for model, apply, reason in (
        (mapped, lambda v, x: jax.lax.map(partial(mapped.apply, v), x), "puts out is also read by scan"),
        (carried, lambda v, x: jax.lax.scan(loop, (v, x), length=2)[0][1], "is not used as it stands"),
    ):
        with pytest.raises(ValueError, match=reason):
            jbn.linen.find_pairs(apply, drawn(model, X), X, strict=True)
    trains_nothing = jbn.linen.BatchNorm(use_running_average=False, frozen=True)
    frozen = Net(lambda x: trains_nothing.copy(name="BatchNorm_0")(nn.Dense(4)(x)))
    apply = partial(frozen.apply, mutable=["batch_stats"])
    assert jbn.linen.find_pairs(apply, drawn(frozen, X), X) == {"Dense_0": "BatchNorm_0"}


MODEL = nn.Sequential([nn.Dense(4, use_bias=False), norm(epsilon=1e-3), nn.relu, nn.Dense(2)])
VARIABLES = drawn(MODEL, X)
PAIRS = jbn.linen.find_pairs(MODEL.apply, VARIABLES, X)


def test_pairs_are_the_same_however_the_model_is_applied_and_from_shapes_alone():
    jitted, shapes = jax.jit(MODEL.apply), jax.eval_shape(lambda: (VARIABLES, X))
    for apply in (MODEL.apply, jitted, jitted, jax.vmap(MODEL.apply, (None, 0)), jax.checkpoint(MODEL.apply)):
        found = jbn.linen.find_pairs(apply, *shapes)
        assert found == {"layers_0": "layers_1"} and found["layers_0"].epsilon == 1e-3


def test_pairs_by_hand_need_an_epsilon_and_no_norm_is_folded_with_another_than_its_own():
    by_hand = jbn.linen.fold(VARIABLES, {"layers_0": "layers_1"}, epsilon=1e-3)
    found = jbn.linen.fold(VARIABLES, PAIRS, epsilon=1e-3)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, by_hand, found))
    with pytest.raises(ValueError, match="expected epsilon=..., that of the norm"):
        jbn.linen.fold(VARIABLES, dict.fromkeys(["layers_0"], "layers_1"))
    with pytest.raises(ValueError, match="expected epsilon=0.001, that of the norm, got 1e-05"):
        jbn.linen.fold(VARIABLES, PAIRS, epsilon=1e-5)


class Activated(nn.BatchNorm):
    """A norm with a parameter of its own, and a loss beside its output."""

    @nn.compact
    def __call__(self, x):
        y = super().__call__(x, use_running_average=True)
        self.sow("losses", "mean", jnp.mean(y))
        return jnp.where(y > 0, y, self.param("slope", nn.initializers.ones, (4,)) * y)


def test_variables_may_be_in_tuples_and_what_a_subclass_of_the_norm_adds_stays():
    model = nn.Sequential([nn.Dense(4), Activated()])
    variables = drawn(model, X)
    assert isinstance(variables["losses"]["layers_1"]["mean"], tuple)
    pairs = jbn.linen.find_pairs(model.apply, variables, X, strict=True)
    folded = jbn.linen.fold(variables, pairs)
    whole = model.apply(variables, X)
    with jbn.linen.without_norms(pairs):
        assert_allclose(model.apply(folded, X), whole, rtol=0, atol=1e-5)


def test_pairs_are_copied_with_what_they_know():
    for same in (copy.deepcopy(PAIRS), pickle.loads(pickle.dumps(PAIRS))):
        assert same == PAIRS and [(path.epsilon, path.axis) for path in same.values()] == [(1e-3, -1)]


def test_all_faults_of_pairs_are_in_one_message():
    pairs = {
        "layers_0": "layers_1",
        "layers_3": "layers_1",
        "layers_2": "layers_9",
        "layers_9": "layers_1/deeper",
    }
    with pytest.raises(ValueError) as caught:
        jbn.linen.fold(VARIABLES, pairs, epsilon=1e-3)
    for line, part in zip(
        str(caught.value).splitlines(),
        (
            "layers_1: expected one layer before it, got several",
            "layers_3, layers_1: running.mean: expected shape (2,), that of the features, got (4,)",
            "layers_2, layers_9: expected a layer with a kernel and a norm with mean and var, got no kernel",
            "layers_9, layers_1/deeper: expected a layer",
        ),
        strict=True,
    ):
        assert line.startswith(part)
    for use in (partial(jbn.linen.fold, VARIABLES), lambda pairs: jbn.linen.without_norms(pairs).__enter__()):
        for pairs in (None, [("layers_0", "layers_1")], {("layers_0",): "layers_1"}):
            with pytest.raises(TypeError, match="pairs: expected {path of the layer: path of its norm}"):
                use(pairs)
    with pytest.raises(ValueError, match='variables: expected {"params": ...'):
        jbn.linen.fold(VARIABLES["params"], PAIRS)


def test_folded_variables_keep_their_kind_their_metadata_and_their_dtype():
    counted = VARIABLES["batch_stats"]["layers_1"] | {"count": jnp.ones(4)}
    variables = VARIABLES | {"batch_stats": {"layers_1": counted}, "cache": {"a": jnp.zeros(1)}}
    folded = jbn.linen.fold(freeze(variables), PAIRS)
    assert isinstance(folded, FrozenDict) and set(folded) == {"params", "cache"}
    assert jax.tree.map(jnp.shape, folded["params"].unfreeze()) == {
        "layers_0": {"kernel": (4, 4), "bias": (4,)},
        "layers_3": {"kernel": (4, 2), "bias": (2,)},
    }
    kernel = nn.Partitioned(VARIABLES["params"]["layers_0"]["kernel"], names=("in", "out"))
    boxed = VARIABLES | {"params": VARIABLES["params"] | {"layers_0": {"kernel": kernel}}}
    assert jbn.linen.find_pairs(MODEL.apply, boxed, X) == PAIRS
    layer = jbn.linen.fold(boxed, PAIRS)["params"]["layers_0"]
    assert layer["kernel"].names == ("in", "out") and layer["bias"].names == ("out",)
    kernel = nn.Partitioned(jnp.ones((3, 2, 4)), names=("layers", "in", "out"))
    stacked = {"params": {"a": {"kernel": kernel}}, "batch_stats": {"b": {"mean": X[:3], "var": X[:3] ** 2}}}
    assert jbn.linen.fold(stacked, {"a": "b"}, epsilon=1.0)["params"]["a"]["bias"].names == ("layers", "out")
    stacked["params"]["b"] = {"scale": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"stacked over to be the first of all, got .* scale \(4,\)"):
        jbn.linen.fold(stacked, {"a": "b"}, epsilon=1.0)
    narrow = jbn.linen.fold(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), VARIABLES), PAIRS)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow)} == {"bfloat16"}


def test_context_leaves_out_its_norms_only_inside_and_wants_folded_variables():
    folded = jbn.linen.fold(VARIABLES, PAIRS)
    apply = jax.jit(MODEL.apply)
    whole = apply(VARIABLES, X)
    with jbn.linen.without_norms(PAIRS):
        assert_allclose(apply(folded, X), whole, atol=1e-5)
        with pytest.raises(ValueError, match="expected those that fold .* a bias at 'layers_0'"):
            apply(VARIABLES, X)
        half = {"params": folded["params"], "batch_stats": VARIABLES["batch_stats"]}
        with pytest.raises(ValueError, match="no running statistics at 'layers_1'"):
            apply(half, X)
    with jbn.linen.without_norms({"layers_3": "layers_1"}):  # is compiled anew, without the bias
        assert not np.allclose(apply(folded, X), whole, atol=0.1)
    assert jnp.array_equal(apply(VARIABLES, X), whole)


def test_network_without_norms_has_the_dtypes_that_it_had():
    for options in ({}, {"dtype": jnp.bfloat16}, {"use_bias": False, "use_scale": False}):
        first = nn.Dense(4, dtype=jnp.bfloat16, use_bias="dtype" in options)
        model = nn.Sequential([first, norm(**options), nn.Dense(4)])
        variables = jax.eval_shape(model.init, jax.random.key(0), X)
        pairs = jbn.linen.find_pairs(model.apply, variables, X)

        def norms_output(variables, model=model):
            see_norms = lambda module, _: isinstance(module, nn.BatchNorm)
            _, seen = model.apply(variables, X, capture_intermediates=see_norms, mutable=["intermediates"])
            return seen["intermediates"]["layers_1"]["__call__"][0]

        expected = jax.eval_shape(norms_output, variables)
        with jbn.linen.without_norms(pairs):
            folded = jax.eval_shape(partial(jbn.linen.fold, pairs=pairs), variables)
            assert jax.eval_shape(norms_output, folded) == expected
