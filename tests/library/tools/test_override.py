"""`jbn.linen.override` gives any model's batch norms other options, and leaves nothing behind."""

import threading
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen
from tests.library.tools.test_recalibrate_linen import EACH, Doubled, Own

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = np.random.RandomState(0).normal(2, 3, (8, 4)).astype("float32")
WEIGHT = np.random.RandomState(1).normal(size=(8, 4)).astype("float32")


class Net(nn.Module):
    """As somebody else has written it."""

    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, name="dense")(x)
        return self.norm(use_running_average=not train, momentum=0.9, name="norm")(x)


NET = Net()
VARIABLES = jax.jit(NET.init)(jax.random.key(0), X)


def train(variables, x, model=NET):
    """Returns outputs, new statistics and gradients."""

    def loss(params):
        y, updated = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return (y * WEIGHT).sum(), (y, updated)

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return out, grads


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_array_equal, actual, expected)


def by_hand(**options):
    """The network with the options where the layer is made."""
    return Net(lambda **made: jbn.linen.BatchNorm(**made | options))


@pytest.mark.slow
def test_layers_are_those_made_with_the_options_bit_for_bit():
    """Also compiled, and while variables are made; without a rule that counts these stay as they are."""
    for options in (
        {},
        {"frozen": True},
        {"momentum": 0.5, "epsilon": 0.1, "use_running_average": True},
        {"virtual_batch_size": 4, "update": jbn.cumulative()},
        {"use_bias": False, "dtype": jnp.bfloat16},
    ):
        other = by_hand(**options)
        with jbn.linen.override(**options):
            variables = jax.jit(NET.init)(jax.random.key(0), X)
            actual = jax.jit(train)(variables, X)
        assert_equal(variables, jax.jit(other.init)(jax.random.key(0), X))
        assert_equal(actual, jax.jit(lambda v, x, other=other: train(v, x, other))(variables, X))
        if "update" not in options and "use_bias" not in options:
            assert_equal(variables, VARIABLES)


def test_compiled_functions_are_others_inside_and_the_same_again_outside():
    traced = []

    @jax.jit
    def step(x):
        traced.append(1)
        return NET.apply(VARIABLES, x, mutable=["batch_stats"])[1]["batch_stats"]["norm"]["mean"]

    outside = step(X)
    for _ in range(2):
        with jbn.linen.override(momentum=0.0):
            assert_allclose(step(X), 10 * outside, rtol=1e-5)
            with jbn.linen.override(frozen=True):
                assert_array_equal(step(X), np.zeros(4))
            with jbn.linen.override(momentum=0.5, use_bias=True):
                assert_allclose(step(X), 5 * outside, rtol=1e-5)
            with jbn.linen.override(epsilon=1):
                assert_allclose(step(X), 10 * outside, rtol=1e-5)
        assert_array_equal(step(X), outside)
    assert len(traced) == 5
    with pytest.raises(ZeroDivisionError), jbn.linen.override(frozen=True):
        raise ZeroDivisionError
    assert_array_equal(step(X), outside)


@pytest.mark.slow
def test_other_threads_are_not_affected():
    means = []
    step = lambda: means.append(
        NET.apply(VARIABLES, X, mutable=["batch_stats"])[1]["batch_stats"]["norm"]["mean"]
    )
    with jbn.linen.override(frozen=True):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        step()
    assert np.all(means[0] != 0) and np.all(means[1] == 0)


@pytest.mark.slow
def test_layers_in_lifted_transforms():
    for norm, shape in (
        (nn.remat(nn.BatchNorm), (8, 4)),
        (nn.jit(nn.BatchNorm), (8, 4)),
        (nn.vmap(nn.BatchNorm, **EACH), (2, 8, 4)),
    ):
        x, model = np.ones(shape, "float32"), Net(norm)
        variables = jax.jit(model.init)(jax.random.key(0), x)
        step = jax.jit(partial(model.apply, mutable=["batch_stats"]))
        for frozen in False, True, False:
            with jbn.linen.override(frozen=frozen):
                _, updated = step(variables, x)
            assert np.all((updated["batch_stats"]["norm"]["var"] == 1) == frozen)
    Scanned = nn.scan(
        type("Step", (nn.Module,), {"__call__": nn.compact(lambda self, x, _: (Net(name="net")(x), None))}),
        length=2,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )
    variables = jax.jit(Scanned().init)(jax.random.key(0), X, None)
    with jbn.linen.override(frozen=True):
        _, updated = jax.jit(partial(Scanned().apply, mutable=["batch_stats"]))(variables, X, None)
    assert_equal(updated["batch_stats"], variables["batch_stats"])


def test_frozen_norms_of_somebody_elses_model_stay_while_its_other_layers_train():
    optimizer = optax.adam(0.1)
    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, stats, opt_state):
        (_, updated), grads = train({"params": params, "batch_stats": stats}, X)
        steps, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, steps), updated["batch_stats"], opt_state

    with jbn.linen.override(frozen=True):
        for _ in range(2):
            params, stats, opt_state = step(params, stats, opt_state)
    assert_equal(params["norm"], VARIABLES["params"]["norm"])
    assert_equal(stats, VARIABLES["batch_stats"])
    assert np.all(params["dense"]["kernel"] != VARIABLES["params"]["dense"]["kernel"])


@pytest.mark.slow
def test_recalibration_of_an_overridden_model():
    """Each layer is measured once, as what it is; a model without an evaluation mode gets one."""
    expected = X @ VARIABLES["params"]["dense"]["kernel"]
    options = {"use_running_average": True, "update": jbn.pooled(), "initial_count": 0}
    with jbn.linen.override(**options):
        variables = jax.jit(NET.init)(jax.random.key(0), X)
        new = jbn.linen.recalibrate(NET.apply, variables, [X])["batch_stats"]["norm"]
        assert_array_equal(new["count"], np.full(4, 8))
        assert_allclose(new["var"], expected.var(0), rtol=1e-5)

    def apply(variables, x):
        with jbn.linen.override(**options):
            return NET.apply(variables, x)

    assert_equal(jbn.linen.recalibrate(apply, variables, [X])["batch_stats"]["norm"], new)


class Called(nn.Module):
    """Gives the mode in the call, by name or not."""

    by_name: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.BatchNorm(name="norm")
        return layer(x, use_running_average=False) if self.by_name else layer(x, False)


def test_mode_that_is_given_in_the_call_is_overridden():
    for by_name in True, False:
        model = Called(by_name)
        variables = jax.jit(model.init)(jax.random.key(0), X)
        with jbn.linen.override(use_running_average=True):
            assert_allclose(jax.jit(model.apply)(variables, X), X, rtol=1e-4)


@pytest.mark.slow
def test_option_that_has_no_hash_is_an_array_each_time_anew():
    for momentum in 0.5, 0.25:
        with jbn.linen.override(momentum=jnp.float32(momentum)):
            _, updated = NET.apply(VARIABLES, X, mutable=["batch_stats"])
        dense = X @ VARIABLES["params"]["dense"]["kernel"]
        mean = updated["batch_stats"]["norm"]["mean"]
        assert_allclose(mean, (1 - momentum) * dense.mean(0), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused():
    model = Net(lambda **options: Own(name="norm"))
    with pytest.raises(TypeError, match="'norm' is a Own; expected"), jbn.linen.override():
        model.apply(VARIABLES, X, mutable=["batch_stats"])
    model = Net(Doubled)
    for options, error, expected in (
        ({}, TypeError, "'norm' is a Doubled; expected flax.linen.BatchNorm or jbn.linen.BatchNorm itself"),
        ({"momentum": 2}, ValueError, "momentum=2.0 is outside"),
        ({"use_running_average": "no"}, TypeError, "use_running_average='no'; expected True, False"),
        ({"eps": 1}, TypeError, "option 'eps', which a BatchNorm does not have; expected epsilon"),
        ({"decay": 1}, TypeError, "option 'decay', which a BatchNorm does not have; expected momentum"),
        ({"training": True}, TypeError, "option 'training', .* expected use_running_average"),
        ({"name": "x"}, TypeError, "option 'name', which a BatchNorm does not have"),
    ):
        with pytest.raises(error, match=expected), jbn.linen.override(**options):
            model.apply(VARIABLES, X, mutable=["batch_stats"])
