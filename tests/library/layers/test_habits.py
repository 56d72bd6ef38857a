"""What people are used to from other libraries, and get an answer to here."""

import pickle
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

import jbn
import jbn.linen
import jbn.nnx
from tests.helpers.flax_layers import NNX, Linen, both
from tests.helpers.layers import layer, random

X = np.asarray(random((8, 3)))


def make(flavour, **options):
    return (
        jbn.linen.BatchNorm(**options)
        if flavour is Linen
        else jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    )


@both
def test_constructors_say_the_name_that_an_argument_has_here(flavour):
    names = {
        "eps": "epsilon",
        "affine": "use_scale and use_bias",
        "track_running_stats": "use_running_average=False",
        "decay_rate": "momentum",
        "center": "use_bias",
        "scale": "use_scale",
        "create_offset": "use_bias",
        "gamma_initializer": "scale_init",
        "moving_variance_initializer": "var_init",
        "cross_replica_axis": "axis_name",
        "data_format": "axis",
        "num_features" if flavour is Linen else "features": "axis" if flavour is Linen else "num_features",
    }
    for name, here in names.items():
        with pytest.raises(TypeError, match=f"got {name}=1, another library's name; expected {here}"):
            make(flavour, **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        make(flavour, colour=1)


@both
def test_calls_say_the_name_that_an_argument_has_here(flavour):
    layer = make(flavour)
    call = partial(layer.init, jax.random.key(0)) if flavour is Linen else layer
    for name, here in {
        "training": "use_running_average=not training",
        "is_training": "use_running_average=not is_training",
        "train": "use_running_average=not train",
        "deterministic": "use_running_average=deterministic",
        "gamma": "scale",
    }.items():
        with pytest.raises(TypeError, match=f"got {name}=True, another library's name; expected {here}"):
            call(X, **{name: True})


def test_functions_say_the_name_that_an_argument_has_here():
    params, running = layer(3)
    for name, here in {
        "eps": "epsilon",
        "momentum": r"update=jbn.ema\(momentum\)",
        "decay_rate": r"update=jbn.ema\(decay_rate\)",
        "training": "train",
        "inference": "train=not inference",
        "use_running_average": "train=not use_running_average",
        "running_mean": r"running=jbn.Moments\(running_mean, running_var\)",
        "weight": r"params=jbn.Params\(weight, bias\)",
    }.items():
        with pytest.raises(TypeError, match=f"got {name}=0.1, another library's name; expected {here}"):
            jbn.batch_norm(X, params, running, **{name: 0.1})
    for call, here in {
        lambda: jbn.ema(momentum=0.9): "decay",
        lambda: jbn.init(3, affine=False): "use_scale and use_bias",
        lambda: jbn.normalize(X, running, eps=1e-3): "epsilon",
    }.items():
        with pytest.raises(TypeError, match=f"another library's name; expected {here}"):
            call()


@both
def test_momentum_is_checked_in_the_constructor_by_its_name(flavour):
    for momentum, error, message in [
        (None, TypeError, r"momentum=None; expected a number in \[0, 1\].*update=jbn.cumulative\(\)"),
        (1.5, ValueError, r"momentum=1.5 is outside \[0, 1\]; .*PyTorch's momentum m is momentum=1 - m here"),
        (-0.1, ValueError, r"momentum=-0.1 is outside"),
        (float("nan"), ValueError, r"momentum=nan is outside"),
        (np.ones(3), ValueError, r"momentum has shape \(3,\); expected one number"),
        ("0.9 or so", TypeError, r"momentum='0.9 or so'; expected a number"),
    ]:
        with pytest.raises(error, match=message):
            make(flavour, momentum=momentum)
    # Another rule needs none.
    assert make(flavour, momentum=None, update=jbn.cumulative()).momentum is None


def test_momentum_that_is_set_later_is_named_too():
    model = make(NNX)
    model.momentum = 2.0
    with pytest.raises(ValueError, match="momentum=2.0 is outside"):
        model(X)


@both
def test_an_array_as_second_argument_is_named(flavour):
    driver = flavour(flavour.ours, X, jit=jax.jit)
    for second in (jnp.asarray(X), np.ones((8, 3)), jnp.ones(()), np.ones(3, bool), jnp.ones((1,), bool)):
        for call in (make(flavour), driver.layer):
            run = call if flavour is NNX else lambda *args, call=call: call.init(jax.random.key(0), *args)
            with pytest.raises(
                TypeError, match="use_running_average is an array of .* It is the second argument of a call"
            ):
                run(X, second)
    with pytest.raises(
        TypeError, match=r"an array of dtype float32 and shape \(8, 3\); expected True, False"
    ):
        driver.layer(X, X) if flavour is NNX else driver.layer.apply(driver.variables, X, X)
    for mode in (True, np.True_, np.array(True), jnp.array(True), 1):
        y = driver.layer(X, mode) if flavour is NNX else driver.layer.apply(driver.variables, X, mode)
        assert_allclose(y, driver.infer(X), rtol=1e-5, atol=1e-6)


@both
def test_the_warning_of_one_value_has_a_class_of_its_own(flavour):
    driver = flavour(flavour.ours, X)
    for call in (
        lambda x: driver.call(driver.params, driver.stats, x, True),
        lambda x: jbn.batch_norm(x, *layer(3), train=True),
    ):
        with pytest.warns(jbn.OneValueWarning, match="one value per feature"):
            jax.eval_shape(call, X[:1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", jbn.OneValueWarning)
            jax.eval_shape(lambda x, call=call: call(x), X[:1])  # traced anew
    assert issubclass(jbn.OneValueWarning, UserWarning)


def test_a_number_of_features_is_no_mode():
    for call in (
        lambda: jbn.linen.BatchNorm(64),
        lambda: jbn.linen.BatchNorm(use_running_average="no"),
        lambda: make(NNX, use_running_average=64),
        lambda: make(NNX)(X, 64),
    ):
        with pytest.raises(
            TypeError, match="use_running_average=.*; expected True, False.*no number of features"
        ):
            call()


@pytest.mark.slow
def test_members_of_a_vmap_that_share_a_layer_are_told_how_to():
    x = random((4, 5, 3))
    model = nnx.Sequential(make(NNX))
    call = lambda model, x: model(x)
    for run in (
        lambda: nnx.vmap(call, in_axes=(None, 1))(make(NNX), x),
        lambda: nnx.vmap(call, in_axes=(None, 0))(model, x),
        lambda: nnx.jit(nnx.vmap(call, in_axes=(None, 0)))(model, x),
    ):
        with pytest.raises(
            ValueError, match='members of this nnx.vmap share one BatchNorm.*axis_name="batch"'
        ):
            run()
    # What may be done is not touched: inference, one batch of all, one model a member, states of one's own.
    model.eval()
    shape = lambda f, *args: nnx.eval_shape(f, *args).shape
    assert shape(nnx.vmap(call, in_axes=(None, 0)), model, x) == x.shape
    of_one_batch = nnx.vmap(call, in_axes=(None, 1), out_axes=1, axis_name="batch")
    assert shape(of_one_batch, make(NNX, axis_name="batch"), x) == x.shape
    members = nnx.eval_shape(lambda: nnx.vmap(lambda _: make(NNX), axis_size=4, in_axes=None)(0))
    assert shape(nnx.vmap(call, in_axes=(0, 0)), members, x) == x.shape
    graph, state = nnx.split(make(NNX))

    def own_state(x):
        layer = nnx.merge(graph, state, copy=True)
        layer(x)
        return nnx.state(layer)["mean"][...]

    assert jax.eval_shape(jax.vmap(own_state), x).shape == (4, 3)


def test_modules_with_explained_names_are_still_dataclasses_that_pickle_and_clone():
    layer = make(Linen, epsilon=1e-3)
    assert layer.clone(momentum=0.5) == make(Linen, epsilon=1e-3, momentum=0.5)
    assert pickle.loads(pickle.dumps(layer)) == layer
