"""The programs in examples/ run, and print what they promise."""

import importlib.util
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.command import ROOT

EXAMPLES = ROOT / "examples"
OPTIONAL = {
    "libraries/with_equinox.py": "equinox",
    "libraries/with_haiku.py": "haiku",
    "libraries/with_keras.py": "keras",
    "batches/padded_graphs.py": "jraph",
}


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Return what imports an example, unless it needs a package that is not there."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # where it writes its configuration when imported

    def load(path):
        if path in OPTIONAL:
            pytest.importorskip(OPTIONAL[path], reason=f"examples/{path} is for {OPTIONAL[path]}")
        spec = importlib.util.spec_from_file_location(path.replace("/", ".")[:-3], EXAMPLES / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def federated(found):
    """Merged statistics are those of all clients, an average of variances is not."""
    assert found["merged"] == pytest.approx(found["true"], rel=1e-5)
    assert found["average of variances"] < found["true"] / 3


def ensemble(found):
    """Members are what they would be alone, and are not alike."""
    assert found["running statistics, difference to members trained alone"] < 1e-3
    assert found["running statistics, difference between members"] > 0.1
    member = found["test accuracy of a member, mean"]
    assert found["test accuracy of the ensemble"] > member > 0.5


def conditional_gan(found):
    """The class that is asked for is the one that is drawn, which chance does a tenth of the time."""
    assert found["drawn digits that are of the class asked for"] > 0.5
    assert found["spread within a class, drawn / real"] > 0.05  # it does not draw one digit a class


def per_example_gradients(found):
    """Frozen norms keep the bound of clipping, statistics of the batch do not."""
    for change, bound in ("another example's gradient", 1e-5), ("the sum of gradients", 2):
        assert found[f"change of {change} / CLIP, frozen"] <= bound
        assert found[f"change of {change} / CLIP, of the batch"] > bound + 0.1
    assert found["test accuracy, frozen"] > 0.6


def quantized(found):
    """8 bits lose nothing, 2 bits do unless trained with."""
    accuracy = {name.removeprefix("test accuracy, "): value for name, value in found.items()}
    assert accuracy["float32"] > 0.85 and abs(accuracy["8 bits"] - accuracy["float32"]) < 0.02
    assert accuracy["2 bits, trained so"] > max(0.8, accuracy["2 bits"] + 0.05)


def padded_graphs(found):
    """Gradients and statistics are those of the graphs without padding."""
    assert found["gradients, NaN, masked"] < 1e-4 and found["statistics, NaN, masked"] < 1e-5
    assert found["gradients, zeros, not masked"] > 0.1 and found["statistics, zeros, not masked"] > 0.1


def padded_sequences(found):
    """Variances are those of the real steps, and outputs do not depend on how long the padding is."""
    ratio, change = "variance / true variance, ", "change of outputs with twice the padding, "
    assert found[ratio + "masked"] == pytest.approx(1, rel=1e-4) and found[change + "masked"] < 1e-5
    assert found[ratio + "not masked"] > 1.5 and found[change + "not masked"] > 0.1


def big_batch(found):
    """Memory is less, gradients are the same, and moments are not measured again."""
    kept, again = found["temporary MB, all kept"], found["temporary MB, moments kept"]
    assert again < 0.6 * kept
    sums = [found[f"sums over the batch, {policy} kept"] for policy in ("all", "moments", "nothing")]
    assert sums[0] == sums[1] < sums[2]
    assert max(found[f"change of gradients, {policy} kept"] for policy in ("moments", "nothing")) < 1e-5


def with_equinox(found):
    assert found["jbn"] > max(0.7, found["equinox, batch"] - 0.03, found["equinox, ema"] - 0.03)


def with_haiku(found):
    assert found["jbn"] < found["always the mean"] / 2 and not found["haiku"] < found["jbn"]


def with_keras(found):
    assert found["jbn"] > max(0.7, found["keras"])


PROGRAMS = {
    "training/federated.py": (federated, {}),
    "training/ensemble.py": (ensemble, {}),
    "training/conditional_gan.py": (conditional_gan, {"steps": 600}),
    "training/per_example_gradients.py": (per_example_gradients, {"steps": 60}),
    "deployment/quantized.py": (quantized, {}),
    "batches/padded_graphs.py": (padded_graphs, {}),
    "batches/padded_sequences.py": (padded_sequences, {}),
    "batches/big_batch.py": (big_batch, {"blocks": 2}),
    "libraries/with_equinox.py": (with_equinox, {}),
    "libraries/with_haiku.py": (with_haiku, {}),
    "libraries/with_keras.py": (with_keras, {}),
}


@pytest.mark.parametrize("path", PROGRAMS)
def test_what_is_printed_shows_the_point(path, load, capsys):
    check, arguments = PROGRAMS[path]
    found = load(path).main(**arguments)
    check(found)
    assert all(isinstance(value, int | float) for value in found.values())
    printed = capsys.readouterr().out
    assert [name for name in found if f"{name}: " not in printed] == []


def call_equinox(module, x):
    """Return outputs in training, running mean and variance after it, and outputs in inference."""
    import equinox as eqx

    layer, state = eqx.nn.make_with_state(module.BatchNorm)(x.shape[-1], "batch")
    y, state = module.over_batch(layer)(x, state)
    running = state.get(layer.running)
    return y, running.mean, running.var, module.over_batch(eqx.nn.inference_mode(layer))(x, state)[0]


def call_haiku(module, x):
    import haiku as hk

    layer = hk.transform_with_state(lambda x, is_training: module.BatchNorm()(x, is_training))
    params, state = layer.init(None, x, True)
    y, state = layer.apply(params, state, None, x, True)
    running = state["batch_norm"]["running"]
    return y, running.mean, running.var, layer.apply(params, state, None, x, False)[0]


def call_keras(module, x):
    layer = module.BatchNorm(epsilon=1e-5)
    y = layer(x, training=True)
    mean, var, _ = (weight.value for weight in layer.running)
    return y, mean, var, layer(x, training=False)


@pytest.mark.parametrize("call", [call_equinox, call_haiku, call_keras])
def test_layers_for_other_libraries_are_batch_norm(call, load):
    """Their rules are debiased: after one batch the running moments are those of the batch."""
    module = load(f"libraries/{call.__name__.replace('call', 'with')}.py")
    x = np.random.default_rng(0).normal([-3, 0, 5], [0.1, 1, 20], (64, 3))
    mean, var = x.mean(0), x.var(0)
    expected = (x - mean) / np.sqrt(var + 1e-5)
    for found, value in zip(call(module, jnp.asarray(x, jnp.float32)), (expected, mean, var, expected)):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4)


def test_every_example_is_tested_and_listed():
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("*/*.py")}
    table = re.findall(r"\]\((.+?\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(files) == sorted(PROGRAMS) == sorted(table)
