"""`jbn.nnx.convert` makes batch norms ours in place, and nothing else changes."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.nnx
from tests.library.tools.test_recalibrate_nnx import Doubled

pytestmark = pytest.mark.usefixtures("standard_promotion")
SAVED = nnx.Any(nnx.Param, nnx.BatchStat)
X = np.random.RandomState(0).normal(2, 3, (8, 4)).astype("float32")


class Net(nnx.Module):
    """Batch norms of Flax in every place that they can be in, one of them in two."""

    def __init__(self, norm=nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        make = lambda **options: norm(4, rngs=rngs, **options)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = make(momentum=0.5, epsilon=0.1, dtype=jnp.float32)
        self.rest = nnx.List(
            [self.norm, nnx.Dict(one=make(use_scale=False), other=nnx.Dropout(0.5, rngs=rngs))]
        )
        self.sequential = nnx.Sequential(self.dense, make())
        self.stacked = nnx.vmap(lambda key: norm(4, rngs=nnx.Rngs(key)))(
            jax.random.split(jax.random.key(0), 2)
        )

    def __call__(self, x):
        x = self.rest[1]["one"](self.rest[0](self.norm(self.dense(x))))
        return nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))(self.stacked, self.sequential(x)).sum(0)


def variables_and_modules(model):
    kinds = (nnx.Variable, nnx.Module)
    return {path: node for path, node in nnx.iter_graph(model) if isinstance(node, kinds)}


def norms(model):
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, (nnx.BatchNorm, jbn.nnx.BatchNorm))]


@nnx.jit
def apply(model, x):
    return model(x)


def trained():
    model = Net()
    apply(model, X)
    return model


@pytest.mark.slow
def test_same_objects_with_the_same_variables_become_ours():
    model = trained()
    nodes, before = variables_and_modules(model), nnx.state(model)
    ours = Net(jbn.nnx.BatchNorm)
    assert jbn.nnx.convert(model) is model
    assert len(norms(model)) == 4 and {type(layer) for layer in norms(model)} == {jbn.nnx.BatchNorm}
    assert all(node is nodes[path] for path, node in variables_and_modules(model).items())
    assert model.rest[0] is model.norm and model.norm.momentum == 0.5 and model.norm.epsilon == 0.1
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before)
    # It does what a model does that was made of ours, also in training.
    nnx.update(ours, nnx.state(model))
    for _ in range(2):
        assert_array_equal(apply(model, X), apply(ours, X))
        assert_array_equal(model.stacked.var[...], ours.stacked.var[...])
        model.eval(), ours.eval()
    root = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    assert jbn.nnx.convert(root) is root and type(root) is jbn.nnx.BatchNorm
    assert [type(layer) for layer in jbn.nnx.convert([nnx.BatchNorm(4, rngs=nnx.Rngs(0))])] == [
        jbn.nnx.BatchNorm
    ]


def test_outputs_are_flax_s_in_inference():
    model = trained()
    model.eval()
    expected = apply(model, X)
    assert_allclose(apply(jbn.nnx.convert(model), X), expected, rtol=3e-7, atol=1e-6)


def test_checkpoints_and_states_of_optimizers_fit(tmp_path):
    model = trained()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "flax", nnx.to_pure_dict(nnx.state(model, SAVED)))
    model = jbn.nnx.convert(Net(), frozen=True)
    state = nnx.state(model, SAVED)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "flax", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(model, state)
    before = nnx.to_pure_dict(nnx.state(model))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: (model(X) ** 2).sum())(model))

    step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model))
    for get in (lambda s: s["norm"], lambda s: s["stacked"], lambda s: s["sequential"]["layers"][1]):
        jax.tree.map(assert_array_equal, get(after), get(before))  # frozen, while the dense layer trains
    assert np.any(after["dense"]["kernel"] != before["dense"]["kernel"])


@pytest.mark.slow
def test_converted_models_are_models_of_ours_in_all_that_nnx_does():
    model = jbn.nnx.convert(trained(), virtual_batch_size=4)
    model.eval()
    expected = apply(model, X)
    for other in (
        nnx.clone(model),
        copy.deepcopy(model),
        nnx.merge(*nnx.split(model)),
        pickle.loads(pickle.dumps(model)),
        jbn.nnx.convert(nnx.clone(model)),
    ):
        assert_array_equal(apply(other, X), expected)
        assert {(type(layer), layer.virtual_batch_size) for layer in norms(other)} == {(jbn.nnx.BatchNorm, 4)}
    jbn.nnx.convert(model, frozen=True)  # again, which keeps what it says nothing of
    assert all(layer.frozen and layer.virtual_batch_size == 4 for layer in norms(model))
    model.set_attributes(jbn.nnx.BatchNorm, frozen=False)
    model.train()
    apply(model, X)
    counting = jbn.nnx.convert(model, update=jbn.ema(0.9, debias=True), initial_count=1)
    assert counting.stacked.count.shape == (2, 4) and np.all(counting.norm.count[...] == 1)
    apply(counting, X)
    jbn.nnx.convert(counting, update=jbn.pooled(), initial_count=0)  # again: it goes on counting
    assert np.all(counting.norm.count[...] == 1)
    assert jbn.nnx.convert(trained(), update=jbn.keep()).norm.count is None


def test_what_cannot_be_is_refused_before_anything_is_changed():
    for norm, options, error, expected in (
        (
            Doubled,
            {},
            TypeError,
            "'norm' is a Doubled; expected flax.nnx.BatchNorm or jbn.nnx.BatchNorm itself",
        ),
        (nnx.BatchNorm, {"momentum": 2}, ValueError, "momentum=2.0 is outside"),
        (nnx.BatchNorm, {"use_running_average": "no"}, TypeError, "use_running_average='no'; expected True"),
        (nnx.BatchNorm, {"frozen": "no"}, TypeError, "frozen='no'; expected True or False"),
        (nnx.BatchNorm, {"eps": 1}, TypeError, "option 'eps', .* does not have; expected epsilon"),
        (nnx.BatchNorm, {"use_bias": False}, TypeError, "option 'use_bias', which is fixed"),
        (nnx.BatchNorm, {"param_dtype": float}, TypeError, "option 'param_dtype', which is fixed"),
    ):
        model = nnx.Dict(first=nnx.BatchNorm(4, rngs=nnx.Rngs(0)), norm=norm(4, rngs=nnx.Rngs(0)))
        before = nnx.graphdef(model)
        with pytest.raises(error, match=expected):
            jbn.nnx.convert(model, **options)
        assert nnx.graphdef(model) == before
    for without in (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.state(model)):
        with pytest.raises(ValueError, match="without batch norms; expected a module that has"):
            jbn.nnx.convert(without, frozen=True)
