"""`renorm=` in the modules: limits and schedules, the number of updates, and what else keeps it."""

import pickle
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
import jbn.nnx
from tests.helpers import reference
from tests.helpers.flax_layers import NNX, Linen, X, both, make

pytestmark = pytest.mark.usefixtures("standard_promotion")
ONE, ZERO = np.ones(3), np.zeros(3)


def growing(num_updates):
    """Allows more correction with each update."""
    return 1 + num_updates / 4, num_updates / 2


def expected(r_max, d_max, mean=ZERO, var=ONE):
    return reference.batch_renorm(X, mean, var, r_max, d_max, ONE, ZERO)


@both
def test_limits_are_pairs_of_numbers_of_any_type_or_traced(flavour):
    wanted = expected(1.5, 0.5)
    for pair in (1.5, 0.5), [1.5, 0.5], (np.float32(1.5), jnp.float32(0.5)):
        layer = flavour(flavour.ours, X, renorm=pair)
        assert layer.layer.renorm == (1.5, 0.5) and hash(layer.layer.renorm)
        assert "num_updates" not in layer.stats

    @jax.jit
    def calls(*pair):
        call = lambda layer, train: layer.call(layer.params, layer.stats, X, train)
        return call(layer, True), call(flavour(flavour.ours, X, renorm=pair), True)[0], call(layer, False)[0]

    (y, stats), of_traced, inference = calls(1.5, 0.5)
    for outputs in y, of_traced:
        assert_allclose(outputs, wanted, rtol=1e-5, atol=1e-5)
    assert_allclose(stats["mean"], 0.01 * reference.moments(X)[0], rtol=1e-5)
    assert_allclose(inference, reference.normalize(X, ZERO, ONE), rtol=1e-5)


@both
def test_schedule_gets_the_number_of_updates_in_training(flavour):
    layer = make(flavour, renorm=growing, momentum=0.5)
    assert layer.stats["num_updates"] == 0 and layer.stats["num_updates"].dtype == np.int32
    mean, var, _ = reference.moments(X)
    running = ZERO, ONE
    for n in range(3):
        y = layer.train(X)
        assert_allclose(y, expected(*growing(n), *running), rtol=1e-5, atol=1e-5)
        running = (running[0] + mean) / 2, (running[1] + var) / 2
        layer.infer(X)
        assert layer.stats["num_updates"] == n + 1
    count = lambda layer, train: layer.call(layer.params, layer.stats, X, train)[1]["num_updates"]
    assert_array_equal(jax.jit(jax.vmap(partial(count, layer)))(np.array([True, False])), [4, 3])
    frozen = make(flavour, renorm=growing, frozen=True)
    frozen.train(X)
    assert frozen.stats["num_updates"] == 0


@both
def test_layer_that_keeps_its_running_statistics_counts_nothing(flavour):
    layer = make(flavour, renorm=growing, update=jbn.keep())
    assert "num_updates" not in layer.stats
    assert_allclose(layer.train(X), expected(*growing(0)), rtol=1e-5, atol=1e-5)
    trained = make(flavour, renorm=growing, momentum=1.0)
    trained.train(X)
    if flavour is NNX:
        layer.layer = jbn.nnx.convert(trained.layer, update=jbn.keep())
    layer.variables = trained.variables if flavour is Linen else None
    assert_allclose(layer.train(X), expected(*growing(1)), rtol=1e-5, atol=1e-5)
    assert layer.stats["num_updates"] == 1


@both
def test_schedules_of_optax_and_of_the_library(flavour):
    r_max, d_max = optax.linear_schedule(1, 3, 4), optax.constant_schedule(0.5)
    for schedule in lambda n: (r_max(n), d_max(n)), lambda n: [1.0, jnp.float32(0.5)]:
        layer = make(flavour, renorm=schedule)
        assert_allclose(layer.train(X), expected(1, 0.5), rtol=1e-5, atol=1e-5)
    crossq = jbn.renorm_limits(r_max=1.5, d_max=0.5, plain=1, r_steps=0, d_steps=0)
    layer = make(flavour, renorm=crossq, momentum=1.0)
    for limits in (1, 0), (1.5, 0.5):
        assert_allclose(layer.train(X), expected(*limits), rtol=1e-5, atol=1e-5)


@both
def test_debiased_rule_corrects_from_its_second_batch_on(flavour):
    layer = make(flavour, renorm=(3.0, 5.0), update=jbn.ema(0.5, debias=True))
    assert_allclose(layer.train(X + 1), reference.batch_norm(X), rtol=1e-4, atol=1e-5)
    mean, var, _ = reference.moments(X)
    assert_allclose(layer.train(2 * X), reference.normalize(2 * X, mean + 1, var), rtol=1e-4, atol=1e-5)


@both
def test_what_is_no_limits_is_refused(flavour):
    pair = r"expected a pair of limits \(r_max, d_max\), such as \(3.0, 5.0\), or a function of the number"
    for renorm in True, 3.0, (3.0,), "3", np.array([3.0, 5.0]), {"r_max": 3}, jbn.renorm_limits:
        with pytest.raises(TypeError, match=pair):
            flavour(flavour.ours, X, renorm=renorm)
    with pytest.raises(ValueError, match="r_max=0.5; expected a number >= 1"):
        flavour(flavour.ours, X, renorm=(0.5, 5))
    layer = flavour(flavour.ours, X, renorm=lambda n: 3.0)
    with pytest.raises(TypeError, match=r"renorm=<function.* returned 3.0; expected a pair"):
        layer.train(X)
    jax.eval_shape(lambda: layer.infer(X))  # asks for no limits
    with pytest.raises(TypeError, match=r"another library's name; expected renorm=\(rmax, dmax\)"):
        flavour(flavour.ours, X, renorm_clipping={})


def test_schedule_that_is_set_later_is_refused_for_want_of_a_number_of_updates():
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer.set_attributes(renorm=growing)
    with pytest.raises(
        ValueError, match="renorm=<function.* was set later; expected a function in the const"
    ):
        layer(X)
    assert jbn.nnx.convert(layer)(X).shape == X.shape
    assert jbn.nnx.convert(layer, renorm=[3, 5]).renorm == (3, 5)  # a list has no hash
    layer(X)
    assert layer.num_updates[...] == 1  # limits that are not a schedule count nothing


def test_traced_options_of_nnx_are_data_however_they_are_set():
    """A program that is found again is compared with its static attributes, and tracers have no equality."""
    made = lambda **options: jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)

    def layers(r_max):
        later = made()
        later.set_attributes(renorm=[r_max, 0.5])
        options = dict(renorm=(r_max, 0.5), momentum=r_max / 2, initial_count=np.ones(()), blend=2 * r_max)
        converted = jbn.nnx.convert(jbn.nnx.convert(nnx.BatchNorm(3, rngs=nnx.Rngs(0))), **options)
        back = jbn.nnx.convert(made(renorm=(r_max, 0.5)), renorm=lambda num_updates: (1.5, 0.5))
        return made(renorm=(r_max, 0.5)), later, converted, back

    @jax.jit
    def outputs(r_max):
        call = nnx.jit(lambda layer: layer(X))
        return [call(layer) for layer in layers(r_max) + layers(r_max)]

    assert_allclose(outputs(1.5), [expected(1.5, 0.5)] * 8, rtol=1e-5, atol=1e-5)


# Transforms


@pytest.mark.slow
def test_lifted_transforms_of_linen_count_each_layers_updates():
    options = {"use_running_average": False, "renorm": growing}
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return jbn.linen.BatchNorm(**options)(x), None

    for model, number in (
        (nn.scan(Step, length=2, **axes)(), [2, 2]),
        (nn.vmap(Step, **axes)(), [2] * len(X)),
        (nn.remat(Step)(), 2),
    ):

        def step(variables, model=model):
            def loss(params):
                (y, _), updated = model.apply(
                    {**variables, "params": params}, X, None, mutable=["batch_stats"]
                )
                return jnp.sum(y**2), updated

            return variables | jax.grad(loss, has_aux=True)(variables["params"])[1]

        @jax.jit
        def trained(key, model=model, step=step):
            return step(step(model.init(key, X, None)))["batch_stats"]["BatchNorm_0"]

        assert_array_equal(trained(jax.random.key(0))["num_updates"], number)


@pytest.mark.slow
def test_transforms_of_nnx_count_each_layers_updates():
    one = lambda key: jbn.nnx.BatchNorm(3, renorm=growing, rngs=nnx.Rngs(key))
    stack = nnx.vmap(one)(jax.random.split(jax.random.key(0), 2))
    each = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
    after = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    nnx.jit(lambda stack: (each(stack, X), after(X, stack)))(stack)
    assert_array_equal(stack.num_updates[...], [2, 2])
    converted = nnx.vmap(lambda key: nnx.BatchNorm(3, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 2)
    )
    nnx.jit(each)(jbn.nnx.convert(converted, renorm=growing), X)
    assert_array_equal(converted.num_updates[...], [1, 1])
    layer = one(0)
    nnx.jit(nnx.remat(lambda layer: layer(X)))(layer)
    assert layer.num_updates[...] == 1


# Checkpoints and tools


@pytest.mark.slow
@both
def test_number_of_updates_survives_checkpoints(flavour):
    layer, other = (make(flavour, renorm=growing) for _ in range(2))
    other.step = layer.step  # compiled once
    layer.train(X)
    if flavour is NNX:
        nnx.update(other.layer, pickle.loads(pickle.dumps(nnx.state(layer.layer))))
    else:
        other.variables = serialization.from_bytes(other.variables, serialization.to_bytes(layer.variables))
    assert_array_equal(other.train(X), layer.train(X))
    assert other.stats["num_updates"] == 2
    of_flax = flavour(flavour.flax, X)
    if flavour is NNX:
        nnx.update(other.layer, nnx.state(of_flax.layer))
    else:
        other.variables = of_flax.variables  # which has none
    other.train(X)
    assert other.stats["num_updates"] == (3 if flavour is NNX else 1)


@pytest.mark.slow
def test_tools_of_linen_keep_it():
    model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])

    @jax.jit
    def trained(key):
        variables = model.init(key, X)
        with jbn.linen.override(renorm=growing):
            for _ in range(2):
                variables |= model.apply(variables, X, mutable=["batch_stats"])[1]
        return variables

    variables = trained(jax.random.key(0))
    assert variables["batch_stats"]["layers_1"]["num_updates"] == 2
    ours = nn.Sequential([nn.Dense(3), jbn.linen.BatchNorm(use_running_average=True, renorm=growing)])
    again = jbn.linen.recalibrate(ours.apply, variables, [X])
    assert again["batch_stats"]["layers_1"]["num_updates"] == 2
    assert jbn.linen.diagnose(ours.apply, variables, [X]).layers
    again["batch_stats"]["layers_1"]["num_updates"] -= 1
    merged = jbn.merge_trees(variables["batch_stats"], again["batch_stats"], counts=[1, 2])["layers_1"]
    assert (merged["num_updates"], merged["num_updates"].dtype) == (2, np.int32)
    state = {
        name: np.float32([1, 2, 3]) for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var")
    }
    state |= {"0.weight": np.ones((3, 3), np.float32), "0.bias": np.ones(3, np.float32)}
    loaded = jbn.linen.load_torch(variables, state, {"layers_0": "0", "layers_1": "1"})
    assert loaded["batch_stats"]["layers_1"]["num_updates"] == 0
    pairs = jbn.linen.find_pairs(ours.apply, variables, X)
    folded = jbn.linen.fold(variables, pairs, epsilon=1e-5)
    without = nn.Sequential([nn.Dense(3), lambda x: x]).apply(folded, X)
    assert_allclose(without, ours.apply(variables, X), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_tools_of_nnx_keep_it():
    model = nnx.Sequential(
        nnx.Linear(3, 3, rngs=nnx.Rngs(0)), jbn.nnx.BatchNorm(3, renorm=growing, rngs=nnx.Rngs(0))
    )
    nnx.jit(lambda model: model(X))(model)
    jbn.nnx.recalibrate(model, [X])
    assert jbn.nnx.diagnose(model, [X]).layers
    state = nnx.state(model, nnx.BatchStat)
    assert model.layers[1].num_updates[...] == 1
    nnx.update(model, jbn.merge_trees(state, state, counts=[1, 2]))
    assert model.layers[1].num_updates[...] == 1
