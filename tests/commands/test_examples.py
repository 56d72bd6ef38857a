"""The programs in examples/ run, and print what they promise."""

import importlib.util
import warnings

import jax
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
    another, total = "change of another example's gradient / CLIP, ", "change of the sum of gradients / CLIP, "
    assert found[another + "frozen"] < 1e-5 and found[total + "frozen"] <= 2
    assert found[another + "of the batch"] > 0.1 and found[total + "of the batch"] > 2
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
