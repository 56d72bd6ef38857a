"""Recalibration of Linen models: lifted transforms, ways to call a model, structures of variables."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from flax.errors import ModifyScopeVariableError
from numpy.testing import assert_allclose, assert_array_equal

import jbn.linen

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = (
    np.random.RandomState(0).normal(2, 3, (3, 8, 5, 4)).astype("float32")
)  # members, rows, positions, features
TWICE = np.stack([X, 2 * X, 3 * X])  # what a layer sees that is called with x, 2 x and 3 x
EACH = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
SHARED = {"variable_axes": {"params": None, "batch_stats": None}, "split_rngs": {"params": False}}
Norm = partial(nn.BatchNorm, use_running_average=True)


def norm(module, x):
    return Norm(name="bn")(x)


def of_class(norm, **options):
    return lambda module, x: norm(use_running_average=True, name="bn", **options)(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, i, x):
        Norm(name="bn")(i * x)
        return i + 1, None


def scan(module, x, **options):
    step = nn.scan(Step, length=3, in_axes=nn.broadcast, **options)
    (Step if module.is_initializing() and "variable_carry" in options else step)(name="step")(1.0, x)


def while_loop(module, x, **options):
    if module.is_initializing():
        return norm(module, x)

    def step(module, i):
        norm(module, i * x)
        return i + 1

    return nn.while_loop(lambda _, i: i < 4, step, module, 1.0, **options)


def switch(module, x):
    if module.is_initializing():
        return norm(module, x)
    return nn.switch(1, [lambda m, x: x, norm], module, x)


# What calls a layer, all that the layer is called with, and the axes of this that its statistics have.
CASES = {
    "remat": (lambda m, x: nn.remat(norm)(m, x), X, (3,)),
    "remat of the layer": (of_class(nn.remat(nn.BatchNorm)), X, (3,)),
    "jit": (lambda m, x: nn.jit(norm)(m, x), X, (3,)),
    "scan, a layer each": (
        partial(scan, variable_axes={"batch_stats": 0, "params": 0}, split_rngs={"params": True}),
        TWICE,
        (0, 4),
    ),
    "scan, one layer": (
        partial(scan, variable_carry="batch_stats", variable_broadcast="params"),
        TWICE,
        (4,),
    ),
    "vmap, a layer each": (of_class(nn.vmap(nn.BatchNorm, **EACH)), X, (0, 3)),
    "vmap, one layer": (of_class(nn.vmap(nn.BatchNorm, **SHARED)), X, (3,)),
    "vmap, one layer, one batch by name": (
        of_class(nn.vmap(nn.BatchNorm, axis_name="i", **SHARED), axis_name="i"),
        X,
        (3,),
    ),
    "vmap of one in vmap of each": (of_class(nn.vmap(nn.vmap(nn.BatchNorm, **SHARED), **EACH)), X, (0, 3)),
    "vmap of each in vmap of one": (of_class(nn.vmap(nn.vmap(nn.BatchNorm, **EACH), **SHARED)), X, (1, 3)),
    "cond": (lambda m, x: nn.cond(x.sum() < 1e9, norm, norm, m, x), X, (3,)),
    "switch": (switch, X, (3,)),
    "while": (partial(while_loop, carry_variables="batch_stats"), TWICE, (4,)),
    "map_variables": (
        lambda m, x: nn.map_variables(norm, "batch_stats", mutable=True, init=m.is_initializing())(m, x),
        X,
        (3,),
    ),
    "grad": (lambda m, x: nn.grad(lambda m, x: norm(m, x).sum(), m, x), X, (3,)),
    "axis": (lambda m, x: Norm(axis=1)(x), X, (1,)),
    "axes": (lambda m, x: Norm(axis=(1, -1))(x), X, (1, 3)),
}


class Case(nn.Module):
    call: object

    @nn.compact
    def __call__(self, x):
        self.call(self, x)


class AllCases(nn.Module):
    @nn.compact
    def __call__(self, x):
        for case, (call, _, _) in CASES.items():
            Case(call, name=case)(x)


@pytest.mark.slow
def test_layers_in_lifted_transforms():
    variables = jax.jit(AllCases().init)(jax.random.key(0), X)
    new = jbn.linen.recalibrate(AllCases().apply, variables, [X])
    for case, (_, samples, kept) in CASES.items():
        mean, var = jax.tree.leaves(new["batch_stats"][case])
        over = tuple(axis for axis in range(samples.ndim) if axis not in kept)
        assert_allclose(mean, samples.mean(over, dtype=float), rtol=1e-5, err_msg=case)
        assert_allclose(var, samples.var(over, dtype=float), rtol=1e-5, err_msg=case)


class Net(nn.Module):
    """Two batch norms, of which the second is called after the first."""

    second: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="first")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "x", x)
        return self.second(use_running_average=not train, name="second")(3 * x)

    def image_of(self, batch):  # needs no variables
        return batch["image"]


class Doubled(nn.BatchNorm):
    """A subclass that calls the layer itself."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x)


class Own(nn.BatchNorm):
    """A subclass that does not."""

    @nn.compact
    def __call__(self, x):
        self.variable("batch_stats", "mean", jnp.zeros, 4), self.variable("batch_stats", "var", jnp.ones, 4)
        return x


ROWS = X[0, :, 0]
VARIABLES = jax.jit(Net().init)(jax.random.key(0), ROWS)
EXPECTED = {"first": (ROWS.mean(0), ROWS.var(0)), "second": (np.zeros(4), np.full(4, 9))}


def assert_recalibrated(variables, expected=EXPECTED):
    assert variables["batch_stats"].keys() == VARIABLES["batch_stats"].keys()
    for name, (mean, var) in expected.items():
        stats = variables["batch_stats"][name]
        assert stats.keys() == {"mean", "var"}
        assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-5)
        assert_allclose(stats["var"], var, rtol=1e-4)


@pytest.mark.slow
def test_ways_to_call_a_model():
    model, siamese = Net(), {"first": (X[0, :, :2].mean((0, 1)), X[0, :, :2].var((0, 1)))}
    closed_over = jax.tree.map(lambda leaf: leaf + 1, VARIABLES)
    both = lambda v, x: (model.apply(v, x[:, 0]), model.apply(v, x[:, 1]))
    twice = lambda bound, x: (bound(x[:, 0]), bound(x[:, 1]))
    for apply, batch, expected in (
        (model.apply, ROWS, EXPECTED),
        (jax.jit(model.apply), ROWS, EXPECTED),
        (lambda v, x: jax.jit(model.apply)(v, x), ROWS, EXPECTED),
        (lambda v, x: model.bind(v)(x["image"]), {"image": ROWS, "label": np.arange(8)}, EXPECTED),
        (lambda v, x: model.apply(v, x, mutable=["intermediates"]), ROWS, EXPECTED),
        (lambda v, x: nn.apply(lambda m, x: m(x), model)(v, x), ROWS, EXPECTED),
        (lambda v, x: model.apply(closed_over, model.apply(v, x)), ROWS, EXPECTED),
        (
            lambda v, x: model.apply(v, jax.vmap(lambda x: model.apply(closed_over, x))(x) * 0 + x),
            ROWS,
            EXPECTED,
        ),
        (both, X[0, :, :2], siamese),
        (lambda v, x: twice(model.bind(v), x), X[0, :, :2], siamese),
        (lambda v, x: model.apply(v, model.image_of(x)), {"image": ROWS}, EXPECTED),
        # Trained on devices, measured on one.
        (Net(partial(nn.BatchNorm, axis_name="devices")).apply, ROWS, EXPECTED),
    ):
        assert_recalibrated(jbn.linen.recalibrate(apply, VARIABLES, [batch]), expected)
    # A part of the variables belongs to the network that it is given to.
    two = {"batch_stats": {"a": VARIABLES["batch_stats"], "b": VARIABLES["batch_stats"]}}
    part = lambda v, x: model.apply({**VARIABLES, "batch_stats": v["batch_stats"]["b"]}, x)
    new = jbn.linen.recalibrate(part, two, [ROWS])
    assert_recalibrated({"batch_stats": new["batch_stats"]["b"]})
    assert_array_equal(new["batch_stats"]["a"]["first"]["mean"], np.zeros(4))


@pytest.mark.slow
def test_what_nn_jit_has_compiled_in_one_measurement_is_measured_in_others():
    Jitted = nn.jit(Net)
    model = Case(lambda module, x: Jitted(name="net")(x))
    variables = jax.jit(model.init)(jax.random.key(0), ROWS)
    for scale in 1, 2:
        apply = lambda v, x: model.apply(v, x)  # another function
        new = jbn.linen.recalibrate(apply, variables, [scale * ROWS])
        mean, var = EXPECTED["first"]
        net = {"batch_stats": new["batch_stats"]["net"]}
        assert_recalibrated(net, EXPECTED | {"first": (scale * mean, scale**2 * var)})
        assert jbn.linen.diagnose(apply, new, [scale * ROWS]).layers[0].kl < 1e-6


class TrainsWhereMutable(nn.Module):
    """As in jax-resnet, where layers are also made before the model is called."""

    layers: tuple[nn.Module, ...] = ()

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        train = self.is_mutable_collection("batch_stats")
        return nn.BatchNorm(use_running_average=not train, name="second")(3 * x)


def test_model_that_trains_where_its_statistics_are_mutable():
    model = TrainsWhereMutable((TrainsWhereMutable(),))
    variables = jax.jit(model.init)(jax.random.key(0), ROWS)
    assert_array_equal(variables["batch_stats"]["second"]["var"], np.ones(4))
    new = jbn.linen.recalibrate(model.apply, variables, [ROWS])
    assert_allclose(new["batch_stats"]["layers_0"]["second"]["var"], 9 * ROWS.var(0), rtol=1e-5)
    assert_allclose(new["batch_stats"]["second"]["var"], np.full(4, 9), rtol=1e-4)
    with pytest.raises(ValueError, match="as in training; expected an apply"):
        train = lambda v, x: model.apply(v, x, mutable=["batch_stats"])
        jbn.linen.recalibrate(train, variables, [ROWS])
    train = lambda v, x: Net().apply(v, x, train=True)
    for tool, batches in ((jbn.linen.recalibrate, [ROWS]), (jbn.linen.find_pairs, ROWS)):
        with pytest.raises(ModifyScopeVariableError) as raised:  # as without jbn
            tool(train, VARIABLES, batches)
        assert any("the model as for evaluation" in note for note in raised.value.__notes__)


@pytest.mark.slow
def test_structure_of_the_variables_is_kept():
    box = lambda value: nn.Partitioned(value, names=("features",))
    boxed = {**VARIABLES, "batch_stats": jax.tree.map(box, VARIABLES["batch_stats"]), "other": {"kept": 1}}
    narrow = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), VARIABLES)
    for variables, apply in (
        (freeze(VARIABLES), Net().apply),
        ({**VARIABLES, "batch_stats": freeze(VARIABLES["batch_stats"])}, Net().apply),
        (boxed, Net().apply),
        (narrow, Net().apply),
    ):
        before = jax.tree.map(np.asarray, variables)
        new = jbn.linen.recalibrate(apply, variables, [ROWS])
        types = [(type(v), type(v["batch_stats"])) for v in (new, variables)]
        assert types[0] == types[1]
        assert jax.tree.structure(new) == jax.tree.structure(variables)
        assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, variables)
        jax.tree.map(assert_array_equal, variables, before)  # what was given is as it was
        jax.tree.map(assert_array_equal, new["params"], variables["params"])
        stats = nn.unbox(new["batch_stats"])["first"]["mean"]
        assert_allclose(np.asarray(stats, float), ROWS.mean(0), rtol=1e-2)
    assert isinstance(jbn.linen.recalibrate(Net().apply, freeze(VARIABLES), [ROWS]), FrozenDict)


def test_subclasses():
    doubled = {"first": EXPECTED["first"], "second": (np.zeros(4), np.full(4, 36))}
    assert_recalibrated(jbn.linen.recalibrate(Net(Doubled).apply, VARIABLES, [ROWS]), doubled)
    own = {"first": EXPECTED["first"], "second": (np.zeros(4), np.ones(4))}
    with pytest.warns(UserWarning, match="'second' is of class Own, whose running statistics were not"):
        assert_recalibrated(jbn.linen.recalibrate(Net(Own).apply, VARIABLES, [ROWS]), own)


def test_what_cannot_be_measured_is_an_error():
    model, key = Net(), jax.random.key(0)
    train = lambda v, x: model.apply(v, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    broadcast = Case(partial(scan, variable_broadcast=("batch_stats", "params"), variable_carry=()))
    in_while = Case(while_loop)
    made = lambda model: jax.jit(model.init)(key, ROWS)
    vmapped = lambda v, x: jax.vmap(lambda x: model.apply(v, x))(x)
    for apply, variables, expected in (
        (train, VARIABLES, "'first' has use_running_average=False, as in training; expected an apply"),
        (vmapped, VARIABLES, "inside a transform of JAX, such as"),
        (nn.remat(Net)().apply, VARIABLES, r"such as nn.remat\(Net\); expected neither"),
        (lambda v, x: x, VARIABLES, "apply called no flax.linen.BatchNorm or jbn.linen.BatchNorm"),
        (model.apply, VARIABLES["params"], "variables is a dict without 'batch_stats'; expected what apply"),
        (nn.Dense(3).apply, made(nn.Dense(3)), "variables is a dict without 'batch_stats'"),
        (broadcast.apply, made(broadcast), "'step/bn' is in a transform that broadcasts"),
        (in_while.apply, made(in_while), "'bn' is in a transform that broadcasts"),
    ):
        with pytest.raises(ValueError, match=expected):
            jbn.linen.recalibrate(apply, variables, [ROWS])
