"""The NNX module: its signature, its variables, and NNX's transforms beside Flax's own module."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from flax.errors import TraceContextError
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
import jbn.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = jnp.asarray(np.random.RandomState(0).normal(1, 2, (8, 4)), jnp.float32)
BOTH = (jbn.nnx.BatchNorm, nnx.BatchNorm)


class Block(nnx.Module):
    def __init__(self, norm, rngs, **options):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.bn = norm(4, momentum=0.5, rngs=rngs, **options)

    def __call__(self, x):
        return jnp.tanh(self.bn(self.dense(x)))


def close(actual, expected, tolerance=2e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.max(np.abs(b))))


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
    options = {"scale_init": jax.nn.initializers.normal(1.0), "bias_init": jax.nn.initializers.normal(1.0)}
    rngs = nnx.Rngs(0), nnx.Rngs(0)
    for _ in range(2):
        ours, theirs = (state(Block(norm, keys, **options)) for norm, keys in zip(BOTH, rngs))
        jax.tree.map(assert_array_equal, ours, theirs)


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


@pytest.mark.parametrize("features, axis", [(3, -1), (8, -1), (32, (0, 1)), ((4, 8), (0, 1))])
def test_other_features_are_named(features, axis):
    layer = jbn.nnx.BatchNorm(features, axis=axis, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"num_features=.*, but x of shape \(8, 4\) has features of shape"):
        layer(X)


def test_layer_without_initializers_needs_no_key():
    layer = jbn.nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=None)
    assert_allclose(layer(X), reference.batch_norm(X), atol=5e-6)


def test_rule_that_comes_after_construction_is_told_where_it_belongs():
    layer = jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    layer.set_attributes(update=jbn.cumulative())
    with pytest.raises(ValueError, match=r"update=cumulative.* needs a count; give it to the constructor"):
        layer(X)


def test_complex_input_wants_complex_statistics():
    with pytest.raises(ValueError, match="running.mean has dtype float32, but x is complex; .* param_dtype"):
        jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))(X * 1j)


# NNX's transforms. Each step is one that a user would write, compiled.


def train_step(model, x=X):
    """Output, gradients and new state of one step of a model that is an argument."""

    @nnx.jit
    def step(model, x):
        def loss(model):
            y = model(x)
            return jnp.sum(jnp.cos(y + jnp.arange(4.0))), y

        (_, y), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        return y, grads

    y, grads = step(model, x)
    return y, nnx.to_pure_dict(grads), state(model)


class Members(nnx.Module):
    """An ensemble: each member has its own parameters and statistics."""

    def __init__(self, norm, rngs):
        make = nnx.vmap(lambda key: Block(norm, nnx.Rngs(key)))
        self.members = make(jax.random.split(rngs.params(), 3))

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x)


class Parts(nnx.Module):
    """One block for all parts of a batch, which share statistics."""

    def __init__(self, norm, rngs):
        self.block = Block(norm, rngs, axis_name="parts")

    def __call__(self, x):
        apply = nnx.vmap(lambda block, x: block(x), in_axes=(None, 0), axis_name="parts")
        return apply(self.block, x.reshape(4, 2, 4)).reshape(8, 4)


class Layers(nnx.Module):
    """A scan over layers."""

    def __init__(self, norm, rngs):
        make = nnx.vmap(lambda key: Block(norm, nnx.Rngs(key)))
        self.blocks = make(jax.random.split(rngs.params(), 3))

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class Rematerialized(nnx.Module):
    def __init__(self, norm, rngs):
        self.block = Block(norm, rngs)

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x)


class Twice(nnx.Module):
    def __init__(self, norm, rngs):
        self.block = Block(norm, rngs)

    def __call__(self, x):
        return self.block(self.block(x))


class Branches(nnx.Module):
    def __init__(self, norm, rngs):
        self.first, self.second = Block(norm, rngs), Block(norm, rngs)

    def __call__(self, x):
        first, second = (lambda m, x: m.first(x)), (lambda m, x: m.second(x))
        return nnx.cond(x[0, 0] < 1e6, first, second, self, x)


@pytest.mark.parametrize("model", [Block, Members, Parts, Layers, Rematerialized, Twice, Branches])
def test_transform_gives_what_it_gives_with_flax(model):
    ours, theirs = (model(norm, nnx.Rngs(0)) for norm in BOTH)
    jax.tree.map(assert_array_equal, state(ours), state(theirs))
    close(*(train_step(m) for m in (ours, theirs)))


def test_rematerialized_layer_updates_its_statistics_once():
    plain, again = (train_step(model(jbn.nnx.BatchNorm, nnx.Rngs(0)))[2] for model in (Block, Rematerialized))
    assert_array_equal(plain["bn"]["mean"], again["block"]["bn"]["mean"])


def test_parts_with_an_axis_name_are_the_whole_batch():
    whole, parts = Block(jbn.nnx.BatchNorm, nnx.Rngs(0)), Parts(jbn.nnx.BatchNorm, nnx.Rngs(0))
    (y, grads, after), (py, pgrads, pafter) = train_step(whole), train_step(parts)
    close((py, pgrads["block"], pafter["block"]), (y, grads, after))


def test_optimizer_updates_parameters_alone_and_training_is_as_with_flax():
    target = jnp.sin(X)

    def train(norm):
        model = Block(norm, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - target) ** 2))(model)
            optimizer.update(model, grads)
            return loss

        losses = [step(model, optimizer) for _ in range(20)]
        model.eval()
        return np.array(losses), model(X), state(model)

    ours, theirs = (train(norm) for norm in BOTH)
    assert ours[0][-1] < ours[0][0] / 2
    close(ours, theirs, 1e-3)
    moments = jbn.moments(X @ ours[2]["dense"]["kernel"] + ours[2]["dense"]["bias"][None])
    assert np.max(np.abs(ours[2]["bn"]["mean"] - moments.mean)) < 0.5


def test_split_and_merge_carry_the_layer_through_plain_jax():
    model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0), update=jbn.ema(0.9, debias=True))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    assert hash(graphdef) == hash(
        nnx.split(Block(jbn.nnx.BatchNorm, nnx.Rngs(1), update=jbn.ema(0.9, debias=True)))[0]
    )

    @jax.jit
    def step(params, stats, x):
        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            y = model(x)
            return jnp.sum(jnp.cos(y)), nnx.state(model, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    _, updated = step(params, stats, X)
    y = model(X)
    close(nnx.to_pure_dict(updated), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    assert y.shape == X.shape


def test_equal_layers_compile_once():
    traced = []

    @nnx.jit
    def step(model, x):
        traced.append(None)
        return model(x)

    for seed in range(2):
        step(Block(jbn.nnx.BatchNorm, nnx.Rngs(seed), update=jbn.ema(0.9)), X)
    assert len(traced) == 1


def test_shapes_are_known_without_computing():
    model = nnx.eval_shape(lambda: Block(jbn.nnx.BatchNorm, nnx.Rngs(0)))
    shapes = jax.tree.map(lambda leaf: leaf.shape, state(model)["bn"])
    assert shapes == dict.fromkeys(("scale", "bias", "mean", "var"), (4,))
    model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    y = nnx.eval_shape(lambda model, x: model(x), model, X)
    assert (y.shape, y.dtype) == (X.shape, X.dtype)
    assert_array_equal(model.bn.mean[...], 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: nnx.eval_shape(model, X),
        lambda model: nnx.jit(model)(X),
        lambda model: nnx.vmap(model)(X[None]),
        lambda model: jax.jit(model)(X),
    ],
    ids=["eval_shape", "jit", "vmap", "jax.jit"],
)
def test_model_that_a_transform_cannot_update_says_how_to_pass_it(call):
    model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    with pytest.raises(TraceContextError) as raised:
        call(model)
    assert "nnx.jit(lambda model, x: model(x))(model, x)" in raised.value.__notes__[0]
    model.eval()
    call(model)  # which updates nothing


@pytest.mark.skipif(not hasattr(nnx, "var_defaults"), reason="this version of Flax has no references")
def test_model_with_references_is_updated_from_inside_of_any_transform():
    with nnx.var_defaults(ref=True):
        model = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    assert nnx.eval_shape(model, X).shape == X.shape
    assert_array_equal(model.bn.mean[...], 0)
    expected = Block(jbn.nnx.BatchNorm, nnx.Rngs(0))
    close(nnx.jit(model)(X), expected(X))
    close(model.bn.mean[...], expected.bn.mean[...])


def test_bridge_to_nnx_trains_the_linen_module():
    from flax.nnx import bridge

    x = X[:, :3]
    linen = jbn.linen.BatchNorm(use_running_average=False, momentum=0.0)
    model = bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
    y = model(x, mutable=["batch_stats"])
    assert_allclose(y, reference.batch_norm(x), atol=5e-6)
    assert_allclose(model.mean[...], reference.moments(x)[0], rtol=1e-6)


def test_bridge_to_linen_trains_the_nnx_module():
    from flax.nnx import bridge

    layer = bridge.to_linen(jbn.nnx.BatchNorm, 4, momentum=0.0)
    variables = layer.init(jax.random.key(0), X)
    y, updated = layer.apply(variables, X, mutable=["batch_stats"])
    assert_allclose(y, reference.batch_norm(X), atol=5e-6)
    (mean,) = [
        leaf for path, leaf in jax.tree.leaves_with_path(updated["batch_stats"]) if "mean" in str(path)
    ]
    assert_allclose(mean, reference.moments(X)[0], rtol=1e-6)
