"""Recalibration of NNX models: transforms, ways to call a model, and all that it leaves as it was."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jbn.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = (
    np.random.RandomState(0).normal(2, 3, (3, 8, 5, 4)).astype("float32")
)  # members, rows, positions, features
TWICE = np.stack([X, 2 * X, 3 * X])  # what a layer sees that is called with x, 2 x and 3 x


def norm(**options):
    return nnx.BatchNorm(4, rngs=nnx.Rngs(0), **options)


def norms():
    return nnx.vmap(lambda _: norm())(jnp.arange(3))


def call(layer, x):
    return layer(x)


def scan(layer, x, layers_axis):
    def step(i, layer):
        layer(i * x)
        return i + 1

    if layers_axis == 0:
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(1.0, layer)

    def carry(state, _):
        return (step(*state), state[1]), None

    return nnx.scan(carry, in_axes=(nnx.Carry, 0))((1.0, layer), jnp.arange(3))


shared = partial(nnx.vmap, in_axes=(None, 0))
# The layer, what calls it, all that it is called with, and the axes of this that its statistics have.
CASES = {
    "jit": (norm, nnx.jit(call), X, (3,)),
    "remat": (norm, nnx.remat(call), X, (3,)),
    "scan, a layer each": (norms, partial(scan, layers_axis=0), TWICE, (0, 4)),
    "scan, one layer": (norm, partial(scan, layers_axis=None), TWICE, (4,)),
    "vmap, a layer each": (norms, nnx.vmap(call), X, (0, 3)),
    "vmap, one layer": (norm, shared(call), X, (3,)),
    "vmap, one layer, one batch by name": (
        partial(norm, axis_name="i"),
        shared(call, axis_name="i"),
        X,
        (3,),
    ),
    "vmap of one in vmap of each": (norms, nnx.vmap(shared(call)), X, (0, 3)),
    "cond": (norm, lambda layer, x: nnx.cond(x.sum() < 1e9, call, call, layer, x), X, (3,)),
}


class AllCases(nnx.Module):
    def __init__(self):
        for case, (make, _, _, _) in CASES.items():
            setattr(self, case, make())

    def __call__(self, x):
        for case, (_, call, _, _) in CASES.items():
            call(getattr(self, case), x)


@pytest.mark.slow
def test_layers_in_transforms():
    model = AllCases()
    jbn.nnx.recalibrate(model, [X])
    for case, (_, _, samples, kept) in CASES.items():
        layer = getattr(model, case)
        over = tuple(axis for axis in range(samples.ndim) if axis not in kept)
        assert_allclose(layer.mean[...], samples.mean(over, dtype=float), rtol=1e-5, err_msg=case)
        assert_allclose(layer.var[...], samples.var(over, dtype=float), rtol=1e-5, err_msg=case)


class Net(nnx.Module):
    """A network with dropout, a layer in two places, and one that evaluation does not call."""

    def __init__(self, second=nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.first = nnx.BatchNorm(4, rngs=rngs)
        self.second = second(4, rngs=rngs)
        self.layers = nnx.List([self.first, nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])

    def __call__(self, x):
        x = self.layers[1](self.first(x))
        return self.embed(x)

    def embed(self, x):
        return self.second(3 * x)


class Doubled(nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(2 * x)


class Own(nnx.BatchNorm):
    def __call__(self, x):
        return x


ROWS = X[0, :, 0]
FIRST = ROWS.mean(0), ROWS.var(0)


def assert_recalibrated(model, second=9.0):
    assert_allclose(model.first.mean[...], FIRST[0], rtol=1e-5)
    assert_allclose(model.first.var[...], FIRST[1], rtol=1e-5)
    assert_allclose(model.second.var[...], np.full(4, second), rtol=1e-4)


@pytest.mark.slow
def test_all_but_the_statistics_is_left_as_it_was():
    model = Net()
    model.second.mean = nnx.BatchStat(jnp.zeros(4), note="metadata")
    before_graph, before = nnx.split(nnx.clone(model))
    modules = dict(nnx.iter_graph(model))
    assert jbn.nnx.recalibrate(model, [ROWS]) is None
    assert_recalibrated(model)
    assert model.layers[0] is model.first and type(model.first) is nnx.BatchNorm
    assert all(node is modules[path] for path, node in nnx.iter_graph(model) if path)
    assert not model.layers[1].deterministic and not model.first.use_running_average
    graph, after = nnx.split(model)
    assert graph == before_graph
    rest = nnx.Not(nnx.BatchStat)
    pairs = zip(*(jax.tree.leaves(nnx.filter_state(state, rest)) for state in (after, before)))
    assert all(bool((new == old).all()) for new, old in pairs)
    assert_array_equal(model.layers[2].mean[...], np.zeros(4))  # never called
    model(ROWS)  # still trains


@pytest.mark.slow
def test_ways_to_call_a_model():
    for call, batch in (
        (lambda model, x: model(x), ROWS),
        (nnx.jit(lambda model, x: model(x)), ROWS),
        (lambda model, x: call_model(model, x), ROWS),
        (lambda model, x: call_model(model, x["image"]), {"image": ROWS, "label": np.arange(8)}),
        (lambda model, x: model.embed(model.first(x)), ROWS),
        *([(lambda model, x: nnx.view(model, deterministic=True)(x), ROWS)] if hasattr(nnx, "view") else []),
    ):
        model = Net()
        jbn.nnx.recalibrate(model, [batch], call=call)
        assert_recalibrated(model)
    for hold, get in (
        (
            lambda model: nnx.ModelAndOptimizer(model, optax.sgd(0.1), wrt=nnx.Param),
            lambda whole: whole.model,
        ),
        (lambda model: {"model": model}, lambda whole: whole["model"]),
        (lambda model: [model, model], lambda whole: whole[1]),
    ):
        model = Net()
        jbn.nnx.recalibrate(hold(model), [ROWS], call=lambda whole, x, get=get: get(whole)(x))
        assert_recalibrated(model)


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this version of Flax has graphs alone")
def test_trees_in_place_of_graphs():
    """NNX without shared references, as `nnx.set_graph_mode(False)` has it."""
    model = nnx.Sequential(norm(), nnx.Dropout(0.5, rngs=nnx.Rngs(0)), norm())
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        jbn.nnx.recalibrate(model, [ROWS])
    assert_allclose(model.layers[0].mean[...], FIRST[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nnx, "var_defaults"), reason="this version of Flax has no references")
def test_variables_that_are_references():
    for how in {"ref": True}, {"hijax": True}:
        with nnx.var_defaults(**how):
            model = Net()
            jbn.nnx.recalibrate(model, [ROWS])
            assert_recalibrated(model)


@nnx.jit
def call_model(model, x):
    return model(x)


@pytest.mark.slow
def test_what_nnx_jit_has_compiled_in_one_measurement_is_measured_in_others():
    model = Net()
    for scale in 1, 2:
        jbn.nnx.recalibrate(model, [scale * ROWS], call=lambda model, x: call_model(model, x), sweeps=2)
        assert_allclose(model.first.var[...], scale**2 * FIRST[1], rtol=1e-5)
        assert_allclose(model.second.var[...], np.full(4, 9), rtol=1e-4)
        call = lambda model, x: call_model(model, x)
        diagnosis = jbn.nnx.diagnose(model, [scale * ROWS], call=call, loss=lambda y, _: (y**2).mean())
        assert diagnosis.layers[0].kl < 1e-6
        # In training dropout would double it.
        means = diagnosis.losses.means()
        assert_allclose([means["running"], means["recalibrated"]], [1, 1], rtol=1e-4)


def test_layer_that_is_not_called_is_not_diagnosed():
    diagnosis = jbn.nnx.diagnose(Net(), [ROWS], call=lambda model, x: model.first(x))
    assert [layer.name for layer in diagnosis.layers] == ["first"]


def test_subclasses():
    model = Net(Doubled)
    jbn.nnx.recalibrate(model, [ROWS])
    assert_recalibrated(model, second=36)
    with pytest.warns(UserWarning, match="'second' is of class Own, whose running statistics were not"):
        model = Net(Own)
        jbn.nnx.recalibrate(model, [ROWS])
    assert_recalibrated(model, second=1)


def call_copy(model, x):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def test_what_cannot_be_measured_is_an_error():
    model = Net()
    other = Net()
    for call, expected in (
        (lambda model, x: x, "call called no flax.nnx.BatchNorm or jbn.nnx.BatchNorm of the model"),
        (lambda model, x: other.second(x), "call called no flax.nnx.BatchNorm or jbn.nnx.BatchNorm of the"),
        (
            lambda model, x: model.first(x, use_running_average=False),
            "'first' is called with .*=False, as in",
        ),
        (
            call_copy,
            "'first' was called in a copy of the model that call was given, such as nnx.merge makes",
        ),
        (lambda model, x: jax.vmap(model.first)(x), "'first' is called inside a transform of JAX, such as"),
    ):
        other.eval()
        with pytest.raises(ValueError, match=expected):
            jbn.nnx.recalibrate(model, [ROWS], call=call)
