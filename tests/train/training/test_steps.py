"""The training step and evaluation, beside the same network written down in NumPy float64."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from train.config import Data, Model, Optimizer
from train.data import Examples, Labels, Preprocessing, augment
from train.models import Variables
from train.runs import processes
from train.training import job, steps
from train.training.losses import CrossEntropy
from train.training.state import ALL_FINITE, StepConfig, StepInputs
from train.training.trained import evaluation

RNG = np.random.RandomState(0)
DATA = Examples(RNG.randint(0, 256, (40, 4, 4, 1)).astype(np.uint8), RNG.randint(0, 3, 40).astype(np.int32))
ORDER = jnp.asarray(RNG.permutation(40), jnp.int32)
PREPROCESSING = Preprocessing(np.float32(100), np.float32(64))
X = ((DATA.inputs - 100.0) / 64).reshape(40, 16)

one_step = jax.jit(steps.train_step, static_argnums=0)


def step_config(*, devices=1, data=None, optimizer=None, **model):
    """Return the config of a step on a batch of 8."""
    return StepConfig(
        model=Model(**{"widths": (6,), "activation": "sigmoid"} | model),
        optimizer=Optimizer(**{"schedule": "constant"} | (optimizer or {})),
        data=Data(**(data or {})),
        input_shape=(4, 4, 1),
        labels=Labels(counts=(1, 1, 1)),
        batch_size=8,
        total_steps=100,
        mesh=processes.mesh_of(jax.devices()[:devices]),
    )


def setup(**options):
    """Return such a config, the state at step 0, and the inputs: all of the data."""
    config = step_config(**options)
    state = initial(config.model.norm == "none", config.optimizer.average)
    inputs = StepInputs(DATA, PREPROCESSING, np.uint32(0))
    return config, *processes.replicate(config.mesh, (state, inputs))


@functools.cache
def initial(without_norm, average):
    """Return the state at step 0, for all configs alike, which have to compile it once."""
    config = step_config(norm="none" if without_norm else "batch", optimizer={"average": average})
    return jax.device_get(job.create(config, np.uint32(0)))


def take(config, state, inputs, start, count, *, loop=True):
    """Take steps without using up the state."""
    return steps.train_steps(config, jax.tree.map(jnp.copy, state), inputs, ORDER, start, count, loop=loop)


def wide(tree):
    return jax.tree.map(np.float64, tree)


def logits_of(params, x, *, stats=None, ghost=None):
    """Return the logits, with batch statistics, given ones, or those of ghost batches; or without a norm."""
    x = x @ params["Dense_0"]["kernel"]
    if "BatchNorm_0" in params:
        normalized = []
        for part in np.split(x, len(x) // ghost) if ghost else [x]:
            mean, var = (part.mean(0), part.var(0)) if stats is None else (stats["mean"], stats["var"])
            normalized.append((part - mean) / np.sqrt(var + 1e-5))
        norm = params["BatchNorm_0"]
        x = np.concatenate(normalized) * norm["scale"] + norm["bias"]
    else:
        x = x + params["Dense_0"]["bias"]
    head = params["Dense_1"]
    return 1 / (1 + np.exp(-x)) @ head["kernel"] + head["bias"]


def log_probabilities(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def losses(logits, labels, smoothing=0.0):
    targets = (1 - smoothing) * np.eye(3)[labels] + smoothing / 3
    return -(targets * log_probabilities(logits)).sum(-1)


def gradients(loss, params):
    """Return the gradients of a function of parameters, by differences in float64."""
    params = wide(params)

    def gradient(leaf):
        found = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            ends = []
            for distance in (1e-5, -2e-5):
                leaf[index] += distance
                ends.append(loss(params))
            leaf[index] += 1e-5
            found[index] = (ends[0] - ends[1]) / 2e-5
        return found

    return jax.tree.map(gradient, params)


def assert_first_step_goes_down(loss, before, after):
    # The first Nesterov step with momentum 0.9 goes 1.9 times the learning rate.
    expected = jax.tree.map(lambda p, g: p - 0.1 * 1.9 * g, wide(before), gradients(loss, before))
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-6), after, expected)


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(partial(assert_allclose, rtol=rtol, atol=atol), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("norm, smoothing", [("batch", 0.3), ("none", 0.0)])
def test_step_goes_down_the_gradient_of_the_mean_loss_on_its_rows(norm, smoothing):
    config, state, inputs = setup(norm=norm, optimizer={"label_smoothing": smoothing})
    rows = np.asarray(ORDER[16:24])
    new = take(config, state, inputs, 16, 1)
    loss = lambda params: losses(logits_of(params, X[rows]), DATA.labels[rows], smoothing).mean()
    assert_first_step_goes_down(loss, state.variables.params, new.variables.params)
    assert int(new.step) == 1 and int(new.nonfinite_step) == ALL_FINITE
    # Smoothed or not, the loss that is reported is the cross-entropy with the labels.
    logits = logits_of(wide(state.variables.params), X[rows])
    assert_allclose(new.sums["loss"], losses(logits, DATA.labels[rows]).sum(), rtol=1e-5)
    correct = int((logits.argmax(-1) == DATA.labels[rows]).sum())
    assert (int(new.sums["correct"]), int(new.sums["examples"])) == (correct, 8)


@pytest.mark.parametrize(
    "norm, parts, debias", [("batch", 4, True), pytest.param("ghost", 2, False, marks=pytest.mark.slow)]
)
def test_accumulation_normalizes_each_part_and_keeps_the_statistics_of_the_whole_batch(norm, parts, debias):
    model = {"norm": norm, "virtual_batch_size": 2, "norm_debias": debias}
    config, state, inputs = setup(**model, optimizer={"accumulate": parts})
    initial, ghost = state.variables.params, 2 if norm == "ghost" else None

    def loss(params):
        rows = [np.arange(8)[part::parts] for part in range(parts)]  # so that each has rows of every device
        return np.mean([losses(logits_of(params, X[r], ghost=ghost), DATA.labels[r]) for r in rows])

    first = one_step(config, state, inputs, jnp.arange(8))
    assert_first_step_goes_down(loss, initial, first.variables.params)
    assert_allclose(first.sums["loss"], 8 * loss(wide(initial)), rtol=1e-5)

    second = one_step(config, first, inputs, jnp.arange(8, 16))
    stats = {"mean": np.zeros(6), "var": np.ones(6)}
    for step, at in enumerate((initial, first.variables.params)):
        features = X[8 * step : 8 * step + 8] @ wide(at["Dense_0"]["kernel"])
        weight = 0.1 / (1 - 0.9 ** (step + 1)) if debias else 0.1
        for name, value in (("mean", features.mean(0)), ("var", features.var(0))):
            stats[name] = (1 - weight) * stats[name] + weight * value
    found = second.variables.batch_stats["BatchNorm_0"]
    for name, expected in stats.items():
        assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
    assert_allclose(found["count"], 1 - 0.9**2 if debias else 2, rtol=1e-5)


@pytest.mark.slow
def test_number_of_steps_in_a_dispatch_cannot_change_a_bit():
    config, state, inputs = setup(data={"shift": 1}, optimizer={"average": 0.3})
    inside, outside = (take(config, state, inputs, 0, 5, loop=loop) for loop in (True, False))
    assert_close(inside, outside)
    for whole, loop in ((inside, True), (outside, False)):
        parts = state
        for start, count in ((0, 1), (8, 3), (32, 1)):
            parts = take(config, parts, inputs, start, count, loop=loop)
        jax.tree.map(assert_array_equal, whole, parts)


@pytest.mark.slow
def test_average_is_of_weights_and_statistics_and_forgets_the_start_quickly():
    config, state, inputs = setup(data={"shift": 1}, optimizer={"average": 0.3})
    expected = wide(state.variables)
    for step in range(5):
        state = take(config, state, inputs, 8 * step, 1)
        decay = min(0.3, (1 + step) / (10 + step))
        move = lambda a, v, decay=decay: decay * a + (1 - decay) * np.float64(v)
        expected = jax.tree.map(move, expected, state.variables)
    assert_close(state.average, expected)
    assert state.evaluated is state.average and isinstance(state.average, Variables)


@pytest.mark.slow
def test_devices_take_the_same_steps_as_one_and_share_their_statistics():
    one, four = (take(*setup(devices=devices), 0, 5) for devices in (1, 4))
    assert_close(four, one)


def test_batch_is_split_over_the_devices():
    config, state, inputs = setup(devices=4)
    assert "all-reduce" in one_step.lower(config, state, inputs, jnp.arange(8)).compile().as_text()


@pytest.mark.slow
def test_batches_from_the_host_on_several_devices_give_the_same_steps_also_in_parts():
    options = {"optimizer": {"accumulate": 2}, "data": {"flip": True}}
    expected = take(*setup(**options), 0, 5, loop=False)
    config, state, inputs = setup(devices=4, **options)
    for start in range(0, 40, 8):
        rows = ORDER[start : start + 8]
        batch = processes.shard(config.mesh, Examples(*(leaf[rows] for leaf in DATA)))
        state = steps.train_on_batch(config, state, inputs._replace(examples=batch))
    assert_close(state, expected)


@pytest.mark.slow
def test_augmentation_follows_from_seed_and_step_and_reaches_the_network():
    config, state, inputs = setup(data={"shift": 1}, optimizer={"average": 0.3})

    def loss(step, seed):
        at, seeded = processes.replicate(config.mesh, (np.int32(step), np.uint32(seed)))
        state_at, inputs_of = state._replace(step=at), inputs._replace(seed=seeded)
        return float(take(config, state_at, inputs_of, 0, 1, loop=False).sums["loss"])

    rows = np.asarray(ORDER[:8])
    plain = losses(logits_of(wide(state.variables.params), X[rows]), DATA.labels[rows]).sum()
    key = jax.random.fold_in(jax.random.key(0), 0)
    moved = (np.asarray(augment(config.data, key, DATA.inputs[rows])) - 100.0) / 64  # raw pixels: black is 0
    logits = logits_of(wide(state.variables.params), moved.reshape(8, 16))
    assert loss(0, 0) == pytest.approx(losses(logits, DATA.labels[rows]).sum(), rel=1e-5)
    assert loss(0, 0) == loss(0, 0)
    assert abs(np.subtract.outer(*2 * [[loss(0, 0), loss(1, 0), loss(0, 1), plain]]) + np.eye(4)).min() > 1e-3


@pytest.mark.parametrize("frozen, parts", [("statistics", 1), ("norms", 2)])
def test_frozen_statistics_are_what_training_normalizes_with_in_parts_or_not(frozen, parts):
    config, state, inputs = setup(frozen=frozen, optimizer={"accumulate": parts})
    stats = {"mean": jnp.linspace(-1, 1, 6), "var": jnp.linspace(0.5, 2, 6), "count": jnp.ones(6)}
    params = state.variables.params
    state = state._replace(
        variables=Variables(params, {"BatchNorm_0": stats}), opt_state=config.transformation.init(params)
    )
    new = one_step(config, state, inputs, jnp.arange(8)).variables
    jax.tree.map(assert_array_equal, new.batch_stats, {"BatchNorm_0": stats})
    held = {"BatchNorm_0": wide(params["BatchNorm_0"])} if frozen == "norms" else {}

    def loss(params):
        return losses(logits_of(params | held, X[:8], stats=wide(stats)), DATA.labels[:8]).mean()

    assert_first_step_goes_down(loss, params, new.params)


def test_first_step_whose_loss_is_not_finite_is_remembered():
    config, state, inputs = setup(norm="none")
    state = take(config, state, inputs, 0, 2)
    assert int(state.nonfinite_step) == ALL_FINITE
    broken = state._replace(variables=jax.tree.map(lambda leaf: leaf * np.nan, state.variables))
    assert int(take(config, broken, inputs, 16, 3).nonfinite_step) == 3


def test_convolutions_are_not_looped_over_on_a_cpu():
    for name, expected in (("mlp", True), ("cnn", jax.default_backend() != "cpu")):
        assert steps.prefers_device_loop(step_config(name=name, widths=(2,))) == expected, name


def test_evaluation_scores_each_example_to_the_same_bit_on_any_number_of_devices():
    config, state, _ = setup()
    state = state._replace(
        variables=state.variables._replace(
            batch_stats=jax.tree.map(lambda a: a + 0.5, state.variables.batch_stats)
        )
    )
    variables = wide(state.variables)
    logits = logits_of(variables.params, X[:32], stats=variables.batch_stats["BatchNorm_0"])
    scores = {}
    for devices in (1, 4):
        mesh = processes.mesh_of(jax.devices()[:devices])
        # As many on each device, which is how evaluation goes about it.
        examples = processes.shard(mesh, Examples(*(leaf[: 8 * devices] for leaf in DATA)))
        placed = processes.replicate(mesh, (state.variables, PREPROCESSING))
        found = evaluation.eval_step(config.network, CrossEntropy(), mesh, *placed, examples)
        scores[devices] = jax.device_get(found)
        assert_allclose(found["loss"], losses(logits, DATA.labels[:32])[: 8 * devices], rtol=1e-5)
        assert_array_equal(found["correct"], (logits.argmax(-1) == DATA.labels[:32])[: 8 * devices])
    jax.tree.map(lambda one, four: assert_array_equal(one, four[:8]), scores[1], scores[4])
    found = steps.predict(config.network, CrossEntropy(), state.variables, PREPROCESSING, DATA.inputs[:32])
    assert_allclose(found, np.exp(log_probabilities(logits)), rtol=1e-5)
