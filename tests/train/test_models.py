from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from train import models
from train.config import Model, UserError

IMAGES = jnp.asarray(np.random.RandomState(0).rand(4, 8, 8, 1), jnp.float32)


def built(**options):
    config = Model(**{"widths": (6, 5), **options})
    model = models.build(config, IMAGES.shape[1:], classes=3)
    return model, jax.jit(partial(model.init, train=False))(jax.random.key(0), IMAGES)


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("name, layers", [("mlp", 2), ("cnn", 4)])
def test_every_hidden_layer_is_normalized_and_has_no_bias_of_its_own(name, layers):
    model, variables = built(name=name)
    stats = names(variables["batch_stats"])
    assert stats == {f"BatchNorm_{i}/{leaf}" for i in range(layers) for leaf in ("mean", "var", "count")}
    biases = {path.split("/")[0] for path in names(variables["params"]) if path.endswith("bias")}
    assert biases == {f"BatchNorm_{i}" for i in range(layers)} | {"Dense_2" if name == "mlp" else "Dense_0"}
    assert jax.eval_shape(partial(model.apply, train=False), variables, IMAGES).shape == (4, 3)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_without_norm_the_layers_have_biases_and_no_statistics(name):
    model, variables = built(name=name, norm="none")
    assert set(variables) == {"params"}
    assert all({"kernel", "bias"} == set(layer) for layer in variables["params"].values())
    in_training, in_inference = (jax.jit(partial(model.apply, train=train)) for train in (True, False))
    assert_allclose(in_training(variables, IMAGES), in_inference(variables, IMAGES), rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_hidden_units_have_mean_0_and_variance_1_over_a_training_batch(name):
    model, variables = built(name=name)
    is_norm = lambda module, _: type(module).__name__ == "BatchNorm"
    step = partial(
        model.apply, train=True, mutable=["batch_stats", "intermediates"], capture_intermediates=is_norm
    )
    _, state = jax.jit(step)(variables, IMAGES)
    outputs = jax.tree.leaves(state["intermediates"])
    assert len(outputs) == (2 if name == "mlp" else 4)
    if name == "cnn":
        assert [y.shape for y in outputs] == 2 * [(4, 8, 8, 6)] + 2 * [(4, 4, 4, 5)]
    for y in outputs:
        over = tuple(range(y.ndim - 1))
        var = np.var(y, over)
        assert_allclose(np.mean(y, over), 0, atol=1e-5)
        assert_allclose(var[var > 0.1], 1, atol=0.05)  # a unit that is constant stays 0
        assert (var > 0.1).sum() >= var.size - 1


def test_running_statistics_are_debiased():
    model, variables = built(norm_momentum=0.75)
    step = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    _, state = step(variables, IMAGES)
    first = state["batch_stats"]["BatchNorm_0"]
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert_allclose(first["mean"], np.mean(IMAGES.reshape(4, -1) @ kernel, 0), rtol=1e-4, atol=1e-6)
    assert_allclose(first["count"], 0.25, rtol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_bfloat16_is_for_activations_alone(name, norm):
    model, variables = built(name=name, norm=norm, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    step = partial(
        model.apply, train=True, mutable=["batch_stats", "intermediates"], capture_intermediates=True
    )
    _, state = jax.eval_shape(step, variables, IMAGES)
    last = "Dense_2" if name == "mlp" else "Dense_0"
    for layer, outputs in state["intermediates"].items():
        wanted = "float32" if layer in (last, "__call__") else "bfloat16"
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(wanted)}, layer


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_activation_is_the_one_named(activation):
    model, variables = built(activation=activation)
    linear = model.clone(activation=lambda x: x)
    assert (model.apply(variables, IMAGES, train=False) != linear.apply(variables, IMAGES, train=False)).all()
    x = jnp.linspace(-2, 2, 9)
    expected = {"relu": np.maximum(x, 0), "sigmoid": 1 / (1 + np.exp(-x)), "tanh": np.tanh(x)}
    assert_allclose(model.activation(x), expected[activation], rtol=1e-6, atol=1e-6)


def test_convolutions_on_vectors_are_refused():
    with pytest.raises(UserError, match="model.name = 'cnn', but the inputs are vectors of length 7.*'mlp'"):
        models.build(Model(name="cnn"), (7,), classes=3)
