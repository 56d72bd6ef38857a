"""The programs in examples/ run, and print what they promise."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from tests.helpers.command import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
OPTIONAL = {
    "libraries/with_equinox.py": "equinox",
    "libraries/with_haiku.py": "haiku",
    "libraries/with_keras.py": "keras",
    "batches/padded_graphs.py": "jraph",
    "training/crossq.py": "gymnasium",
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


def tent(found):
    """Shifted data need other statistics; TENT changes scale and bias alone, and does no harm."""
    accuracy = {name.removeprefix("test accuracy, "): value for name, value in found.items()}
    usual, lost = accuracy["data as in training"], accuracy["shifted, running statistics"]
    assert usual > 0.9 and lost < usual - 0.3
    batch, blended, adapted = (
        accuracy[f"shifted, {name}"] for name in ("those of the batch", "blended", "TENT")
    )
    assert min(batch, blended) > lost + 0.3 and adapted > batch - 0.02
    assert found["change of kernels by TENT"] == 0


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
    "training/conditional_gan.py": (conditional_gan, {"steps": 400}),
    "training/per_example_gradients.py": (per_example_gradients, {"steps": 60}),
    "deployment/quantized.py": (quantized, {}),
    "deployment/tent.py": (tent, {}),
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


@pytest.fixture
def crossq_module(load, monkeypatch):
    module = load("training/crossq.py")
    monkeypatch.setattr(module, "actor", module.actor.clone(widths=(16,)))
    monkeypatch.setattr(module, "critics", module.critics.clone(widths=(16, 16)))
    return module


def test_critics_of_crossq_have_the_shape_of_those_of_sbx(load):
    state = jax.eval_shape(load("training/crossq.py").init, jax.random.key(0))
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    layers = shapes(state.params["critics"])
    dense = [layers[f"Dense_{i}"]["kernel"] for i in range(3)]
    assert dense == [(2, 4, 1024), (2, 1024, 1024), (2, 1024, 1)]
    norms = [shapes(state.batch_stats["critics"][f"BatchNorm_{i}"]) for i in range(3)]
    assert [stats["var"] for stats in norms] == [(2, 4), (2, 1024), (2, 1024)]
    assert all(stats["num_updates"] == (2,) for stats in norms)


def test_crossq_plays_and_learns_in_small(crossq_module):
    """Returns are between -16.3 a step and 0; that they rise takes more steps than a test has."""
    found = crossq_module.main(steps=104, episodes=1)
    assert list(found) == ["mean return before", "mean return after"]
    assert all(-16.3 * 200 < value < 0 for value in found.values())
    assert found["mean return before"] != found["mean return after"]


def test_crossq_samples_from_the_density_that_it_says_and_its_critics_see_both_steps(crossq_module):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((64, 3), (64, 1), (64,), (64, 3))]
    batch, key = crossq_module.Batch(*arrays), jax.random.key(1)
    state = crossq_module.init(jax.random.key(0))
    act = jax.jit(crossq_module.act)
    action, log_density, _ = act(state.params["actor"], state, batch.next_observation, key)
    variables = {"params": state.params["actor"], "batch_stats": state.batch_stats["actor"]}
    apply = jax.jit(crossq_module.actor.apply, static_argnums=2)
    mean, log_sd = np.asarray(apply(variables, batch.next_observation, False)).T
    action = np.asarray(action, np.float64)
    inner = np.flatnonzero(abs(action[:, 0]) < 0.99)  # elsewhere float32 holds too little of an action
    a, mean, sd = action[inner, 0], mean[inner], np.exp(log_sd[inner].clip(-20, 2))
    expected = norm.logpdf(np.arctanh(a), mean, sd) - np.log1p(-(a**2))
    np.testing.assert_allclose(log_density[inner], expected, atol=1e-4)
    new = jax.jit(crossq_module.update_critics)(state, batch, key)
    seen = np.concatenate([np.c_[batch.observation, batch.action], np.c_[batch.next_observation, action]])
    found = new.batch_stats["critics"]["BatchNorm_0"]
    assert found["num_updates"].tolist() == [1, 1]
    for critic in range(2):
        np.testing.assert_allclose(found["mean"][critic], 0.01 * seen.mean(0), atol=1e-6)
        np.testing.assert_allclose(found["var"][critic], 0.99 + 0.01 * seen.var(0), atol=1e-6)


def test_every_example_is_tested_and_listed():
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("*/*.py")}
    table = re.findall(r"\]\(\./(.+?\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(files) == sorted([*PROGRAMS, "training/crossq.py"]) == sorted(table)
