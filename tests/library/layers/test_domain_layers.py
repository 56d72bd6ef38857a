"""Layers that keep domains apart, or blend in evaluation: the pure functions with the layer's variables."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jbn.linen
import jbn.nnx
from tests.helpers import reference
from tests.helpers.flax_layers import Linen, X, both, make, quick_init
from tests.helpers.layers import random

INDEX = np.array([0, 2, 2, 0, 0, 2, 0, 2])  # domain 1 is absent
BATCH = np.asarray(random((8, 4), mean=2))
assert_close = partial(assert_allclose, rtol=1e-5, atol=2e-5)


class Net(nn.Module):
    affine_by_domain: bool = False

    @nn.compact
    def __call__(self, batch, train=False):
        x, domain = batch
        x = nn.Dense(4, kernel_init=quick_init)(x)
        norm = jbn.linen.BatchNorm(
            use_running_average=not train, momentum=0.5, domains=3, affine_by_domain=self.affine_by_domain
        )
        return nn.relu(norm(x, domain=domain))


class NNXNet(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(4, 4, kernel_init=quick_init, rngs=nnx.Rngs(0))
        self.norm = jbn.nnx.BatchNorm(4, momentum=0.5, domains=3, rngs=nnx.Rngs(0))

    def __call__(self, batch):
        x, domain = batch
        return self.norm(self.dense(x), domain=domain)


def assert_measured_by_domain(mean, var, inputs):
    for domain in 0, 2:
        found = reference.moments(inputs[domain == INDEX])
        assert_close(mean[domain], found[0])
        assert_close(var[domain], found[1])
    assert_array_equal((mean[1], var[1]), (np.zeros(4), np.ones(4)))


def normalize_blended(x, running=(np.zeros(4), np.ones(4)), mask=None, prior=16):
    """Normalize with running mean and variance that count for `prior` samples, and with those of `x`."""
    (mean, var), (of_x, var_of_x, n) = running, reference.moments(x, mask=mask)
    w, d = n / (prior + n), of_x - mean
    return reference.normalize(x, mean + w * d, (1 - w) * var + w * var_of_x + w * (1 - w) * d**2)


# Domains.


@both
@pytest.mark.parametrize("affine_by_domain", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_layer_with_domains_is_the_pure_function(flavour, affine_by_domain):
    make_layer = partial(flavour, flavour.ours, X, domains=3, affine_by_domain=affine_by_domain, momentum=0.5)
    if flavour is Linen:  # whose init is a call
        with pytest.raises(ValueError, match="no domain was given in the call of a BatchNorm with domains=3"):
            make_layer()
        layer = Linen.__new__(Linen)
        layer.layer = jbn.linen.BatchNorm(domains=3, affine_by_domain=affine_by_domain, momentum=0.5)
        init = jax.jit(layer.layer.init, static_argnames="use_running_average")
        key = jax.random.key(0)
        shapes = [init(key, X, use_running_average=mode, domain=INDEX) for mode in (True, False)]
        jax.tree.map(assert_array_equal, *shapes)
        layer.variables = shapes[0]
    else:
        layer = make_layer()
    assert {leaf.shape for leaf in layer.stats.values()} == {(3, 3)}
    affine = (3, 3) if affine_by_domain else (3,)
    assert {leaf.shape for leaf in layer.params.values()} == {affine}
    params = {name: 1 + np.asarray(random(affine, seed=i)) for i, name in enumerate(("bias", "scale"))}
    y, stats = jax.jit(partial(layer.call, train=True))(params, layer.stats, X, domain=INDEX)
    pure = partial(jbn.batch_norm, X, jbn.Params(**params), domain=INDEX, update=jbn.ema(0.5))
    wanted, new = jax.jit(partial(pure, train=True))(jbn.Moments(**layer.stats))
    assert_close(y, wanted)
    assert_close(stats["var"], new.var)
    y, kept = jax.jit(partial(layer.call, train=False))(params, stats, X, domain=INDEX)
    assert_close(y, jax.jit(partial(pure, train=False))(new)[0])
    jax.tree.map(assert_array_equal, kept, stats)


def test_a_scale_from_outside_may_be_by_domain():
    layer = jbn.nnx.BatchNorm(3, use_scale=False, domains=3, use_running_average=True, rngs=nnx.Rngs(0))
    scales = np.arange(9, dtype=np.float32).reshape(3, 3)
    y = nnx.jit(lambda layer, x: layer(x, scale=scales, domain=INDEX))(layer, X)
    assert_close(y, X * scales[INDEX][:, None] / np.sqrt(1 + 1e-5))


@pytest.mark.slow
def test_options_that_make_no_sense_are_named():
    for options, error, message in [
        (dict(domains=0), ValueError, "domains=0; expected a number of domains >= 1"),
        (dict(domains=2.5), ValueError, "domains=2.5; expected a number"),
        (dict(domains=True), ValueError, "domains=True; expected a number"),
        (dict(affine_by_domain=True), ValueError, "affine_by_domain=True needs domains"),
        (dict(affine_by_domain=1), TypeError, "affine_by_domain=1; expected True or False"),
        (dict(blend=-1), ValueError, "blend=-1; expected a finite number of samples >= 0"),
        (dict(blend="all"), TypeError, "blend='all'; expected a number of samples"),
    ]:
        for layer in jbn.linen.BatchNorm, partial(jbn.nnx.BatchNorm, 3, rngs=nnx.Rngs(0)):
            with pytest.raises(error, match=message):
                layer(**options)
    options = dict(epsilon=0, blend=16, use_running_average=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"epsilon=0\.0; expected a number from"):
        jbn.nnx.BatchNorm(3, **options)(X)
    layer = jbn.linen.BatchNorm(use_running_average=False)
    for call in partial(layer.init, jax.random.key(0)), jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)):
        with pytest.raises(ValueError, match="a domain was given in the call of a BatchNorm with"):
            call(X, domain=INDEX)


@pytest.mark.slow
def test_statistics_without_an_axis_of_domains_are_refused():
    variables = jax.jit(Net().init)(jax.random.key(0), (BATCH, INDEX))
    stats = {"BatchNorm_0": {"mean": np.zeros(4), "var": np.ones(4)}}
    with pytest.raises(ValueError, match=r'"batch_stats" has shape \(4,\); expected \(3, 4\)'):
        Net().apply(variables | {"batch_stats": stats}, (BATCH, INDEX))
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    variables = model.init(jax.random.key(0), BATCH)
    with jbn.linen.override(domains=2), pytest.raises(ValueError, match="no domain was given in the call"):
        model.apply(variables, BATCH)  # which gives none


def test_linen_transforms_carry_domains(standard_promotion):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, domain):
            options = dict(use_running_average=False, momentum=0.0, domains=3)
            return nn.remat(jbn.linen.BatchNorm)(**options)(x, domain=domain)

    axes = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    mapped = nn.vmap(Layer, **axes)()
    arguments = np.stack([BATCH, 2 * BATCH]), np.stack([INDEX, INDEX[::-1]])
    variables = jax.jit(mapped.init)(jax.random.key(0), *arguments)
    y, updated = jax.jit(partial(mapped.apply, mutable=["batch_stats"]))(variables, *arguments)
    assert updated["batch_stats"]["CheckpointBatchNorm_0"]["mean"].shape == (2, 3, 4)
    for member in range(2):
        x, index = (leaf[member] for leaf in arguments)
        for domain in 0, 2:
            assert_close(y[member][domain == index], reference.batch_norm(x[domain == index]))


@pytest.mark.slow
def test_nnx_transforms_carry_domains():
    layers = nnx.vmap(lambda key: jbn.nnx.BatchNorm(4, domains=3, momentum=0.0, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 2)
    )
    layers = nnx.merge(*nnx.split(layers))
    indices = np.stack([INDEX, INDEX[::-1]])
    call = nnx.jit(nnx.vmap(lambda layer, x, domain: layer(x, domain=domain), in_axes=(0, None, 0)))
    y = call(layers, BATCH, indices)
    for member, index in enumerate(indices):
        for domain in 0, 2:
            wanted = reference.batch_norm(BATCH[domain == index])
            assert_close(y[member][domain == index], wanted)
            mean = reference.moments(BATCH[domain == index])[0]
            assert_close(layers.mean[...][member, domain], mean)


# The tools.


@pytest.mark.slow
def test_recalibration_and_diagnosis_measure_by_domain():
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), (BATCH, INDEX))
    batches = [(BATCH[:3], INDEX[:3]), (BATCH[3:], INDEX[3:])]
    new = jbn.linen.recalibrate(model.apply, variables, batches)["batch_stats"]["BatchNorm_0"]
    inputs = BATCH @ variables["params"]["Dense_0"]["kernel"]
    assert_measured_by_domain(new["mean"], new["var"], inputs)
    diagnosis = jbn.linen.diagnose(model.apply, variables, batches)
    assert "never updated" in str(diagnosis)

    model = NNXNet()
    jbn.nnx.recalibrate(model, batches)
    assert_measured_by_domain(model.norm.mean[...], model.norm.var[...], model.dense(BATCH))
    assert "0,1" not in str(jbn.nnx.diagnose(model, batches))


def test_norms_with_domains_are_not_folded():
    variables = jax.jit(Net(affine_by_domain=True).init)(jax.random.key(0), (BATCH, INDEX))
    apply = Net(affine_by_domain=True).apply
    assert jbn.linen.find_pairs(apply, variables, (BATCH, INDEX)) == {}
    with pytest.raises(ValueError, match="'BatchNorm_0': it has domains; fold a model without, with one's"):
        jbn.linen.find_pairs(apply, variables, (BATCH, INDEX), strict=True)
    with pytest.raises(ValueError, match=r"mean \(3, 4\)"):
        jbn.linen.fold(variables, {"Dense_0": "BatchNorm_0"}, epsilon=1e-5)


def test_trees_of_domains_are_merged_masked_and_converted():
    model = NNXNet()
    jbn.nnx.convert(model, frozen=True)
    assert (model.norm.domains, model.norm.frozen) == (3, True)
    with pytest.raises(TypeError, match="'domains'"):
        jbn.nnx.convert(model, domains=2)
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    other = jax.tree.map(lambda leaf: leaf + 1, stats)
    merged = jbn.merge_trees(stats, other, counts=[1, 3])["norm"]
    assert_close(merged["mean"], np.full((3, 4), 0.75))
    assert_close(merged["var"], np.full((3, 4), 1.75 + 3 / 16))
    params = jax.jit(Net(affine_by_domain=True).init)(jax.random.key(0), (BATCH, INDEX))["params"]
    assert jbn.linen.batch_norm_mask(params)["BatchNorm_0"] == {"scale": True, "bias": True}


# Blended.


@both
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (dict(frozen=True), dict(virtual_batch_size=4), dict(renorm=(3.0, 5.0)))
        ),
    ],
)
def test_a_layer_that_blends_normalizes_with_running_and_batch(flavour, options):
    layer = make(flavour, blend=16, momentum=0.5, **options)
    stats = {name: leaf + np.float32([0, 1, 2]) for name, leaf in layer.stats.items()}
    for mask in None, np.arange(8)[:, None, None] > 2:
        y, kept = layer.step(layer.params, stats, X, False, mask=mask)
        assert_close(y, normalize_blended(X, (stats["mean"], stats["var"]), mask))
        jax.tree.map(assert_array_equal, kept, stats)
    call = jax.jit(lambda train: layer.call(layer.params, stats, X, train))
    for train in True, False:
        actual, expected = call(train), layer.step(layer.params, stats, X, train)
        jax.tree.map(assert_close, actual, expected)


@pytest.mark.slow
@both
def test_blending_leaves_training_as_it_is_and_takes_what_the_call_gives(flavour):
    plain, blending = make(flavour), make(flavour, blend=16)
    steps = [layer.step(layer.params, layer.stats, X, True) for layer in (plain, blending)]
    jax.tree.map(assert_array_equal, *steps)
    program = jax.make_jaxpr(lambda x: blending.call(blending.params, blending.stats, x, True))(X)
    assert str(program).count("measure_on[") == 1
    outputs = lambda stats: jnp.sum(blending.call(blending.params, stats, X, False)[0] ** 2)
    jax.tree.map(lambda leaf: assert_array_equal(leaf, 0), jax.jit(jax.grad(outputs))(blending.stats))
    wanted = normalize_blended(X, (np.zeros(3), np.ones(3)))
    narrow = make(flavour, blend=16, dtype=jnp.bfloat16).infer(X)
    assert narrow.dtype == jnp.bfloat16
    assert_allclose(np.float32(narrow), wanted, rtol=2**-7, atol=2**-7)
    one = make(flavour, blend=16, axis_name="i")
    call = jax.vmap(lambda x: one.call(one.params, one.stats, x, False)[0], axis_name="i")
    assert_close(jax.jit(call)(X), wanted)


@both
def test_a_batch_that_is_not_finite_or_empty_is_normalized_with_the_running_statistics(flavour):
    layer = make(flavour, blend=16)
    clean, spoilt = layer.infer(X), X.copy()
    spoilt[1, 1, 0], spoilt[2, 2, 1] = np.nan, 1e25  # whose square is infinite
    y = np.asarray(layer.infer(spoilt))
    assert_array_equal(np.isnan(y), np.isnan(spoilt))
    assert_close(y[..., 2], clean[..., 2])
    assert_close(y[..., :2], spoilt[..., :2] / np.sqrt(1 + 1e-5))
    hidden = layer.infer(spoilt, mask=np.abs(spoilt) < 1e25)  # acts as the mean
    assert np.isfinite(hidden).all() and abs(hidden[1, 1, 0]) < 1e-6
    assert layer.infer(X[:0]).shape == (0, 4, 3)
    for prior in 0, 16:
        y = make(flavour, blend=prior).infer(X, mask=np.zeros((8, 1, 1), bool))
        assert_close(y, X / np.sqrt(1 + 1e-5))


def test_evaluation_normalizes_once_and_has_no_gradient_to_the_running_statistics():
    layer = Linen(jbn.linen.BatchNorm, X, jit=jax.jit, blend=16)
    infer = partial(layer.call, layer.params, x=X, train=False)
    assert str(jax.make_jaxpr(infer)(layer.stats)).count(" rsqrt") == 1
    gradient = jax.jit(jax.grad(lambda stats: jnp.sum(infer(stats)[0] ** 3)))(layer.stats)
    jax.tree.map(lambda leaf: assert_array_equal(leaf, np.zeros(3)), gradient)


def test_domains_are_blended_each_with_its_own_samples():
    layer = jbn.nnx.BatchNorm(4, domains=3, blend=16, use_running_average=True, rngs=nnx.Rngs(0))
    y = np.asarray(nnx.jit(lambda layer, *batch: layer(batch[0], domain=batch[1]))(layer, BATCH, INDEX))
    for domain in 0, 2:
        assert_close(y[domain == INDEX], normalize_blended(BATCH[domain == INDEX]))


@pytest.mark.slow
def test_any_model_blends_in_a_context_or_by_conversion():
    model = nn.Sequential([nn.Dense(4, kernel_init=quick_init), nn.BatchNorm(use_running_average=True)])
    variables = jax.jit(model.init)(jax.random.key(0), BATCH)
    apply = jax.jit(model.apply)
    before = apply(variables, BATCH)
    inputs = BATCH @ variables["params"]["layers_0"]["kernel"]
    with jbn.linen.override(blend=16):
        assert_close(apply(variables, BATCH), normalize_blended(inputs))
        new = jbn.linen.recalibrate(model.apply, variables, [BATCH])
        assert "never updated" in str(jbn.linen.diagnose(model.apply, variables, [BATCH, BATCH]))
    assert_close(new["batch_stats"]["layers_1"]["mean"], inputs.mean(0))
    assert_array_equal(apply(variables, BATCH), before)

    dense = nnx.Linear(4, 4, kernel_init=quick_init, rngs=nnx.Rngs(0))
    model = jbn.nnx.convert(nnx.Sequential(dense, nnx.BatchNorm(4, rngs=nnx.Rngs(0))), blend=16)
    model.eval()
    y = nnx.jit(lambda model, x: model(x))(model, BATCH)
    assert_close(y, normalize_blended(np.asarray(dense(BATCH))))
