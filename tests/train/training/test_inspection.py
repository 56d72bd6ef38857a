"""What a job measures at a step, beside the same network written down in NumPy float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.helpers.jobs import final_state, fit, make_config, results
from train import data
from train.runs import processes
from train.runs.checkpoints import Checkpoints
from train.runs.log import Log, read_inspections
from train.training import inspection, prepare, steps

pytestmark = pytest.mark.slow

KEYS = (
    "units movement histograms slope identity_error loss losses gradient_changes smoothness gradient_shift "
    "gradient_cosine batch_statistics running_statistics"
)
OPEN_EDGES = np.array([-np.inf, *np.arange(-7.75, 8, 0.25), np.inf])
LAYERS = [["Dense_0", "BatchNorm_0"], ["Dense_1", "BatchNorm_1"], ["Dense_2"]]


def make_job(**changes):
    model = {"widths": (6, 5), "activation": "sigmoid"} | changes.pop("model", {})
    return prepare(make_config("unused", model=model, **changes))


def batch_of(job, step):
    """Return the rows of the training split that a step takes, counted from 0."""
    epoch, at = divmod(step, job.steps_per_epoch)
    size = job.config.batch_size
    return data.order(job.config.seed, epoch, len(job.data.train))[at * size : at * size + size]


def take(job, state, count):
    """Take steps as a job does whose data are not on the devices."""
    state = jax.tree.map(jnp.copy, state)
    for _ in range(count):
        batch = job.data.train.take(batch_of(job, int(state.step)))
        batch = processes.shard(job.step_config.mesh, batch)
        state = steps.train_on_batch(job.step_config, state, job.inputs._replace(examples=batch))
    return state


def inspect(job, state):
    return inspection.inspect(job.step_config, job.data, job.inputs, state)


# One job for all that is compared by value. Its learning rate differs from step to step.
OPTIMIZER = {"schedule": "linear", "learning_rate": 0.4, "base_batch_size": 64}


@functools.cache
def sigmoid_job():
    return make_job(optimizer=OPTIMIZER)


@functools.cache
def reached(step):
    """Return the job's state at a step, the one after the next step, and what was measured between them."""
    job = sigmoid_job()
    params = job.initial.variables.params
    # Some inputs leave the histograms' range, so that their outermost bins have something to hold.
    norm = params["BatchNorm_0"] | {"scale": jnp.linspace(1.0, 8.0, 6)}
    variables = job.initial.variables._replace(params=params | {"BatchNorm_0": norm})
    state = take(job, job.initial._replace(variables=variables), step)
    kept = jax.tree.map(np.array, state)
    measured = inspect(job, state)
    jax.tree.map(assert_array_equal, state, kept)
    return jax.device_get(state), jax.device_get(take(job, state, 1)), measured


def forward(params, x, stats=None, xp=np):
    """Return the logits, and what each activation gets."""
    x, seen = x.reshape(len(x), -1), []
    for i in range(2):
        norm = params[f"BatchNorm_{i}"]
        x = x @ params[f"Dense_{i}"]["kernel"]
        mean, var = (
            (x.mean(0), x.var(0)) if stats is None else map(stats[f"BatchNorm_{i}"].get, ("mean", "var"))
        )
        x = (x - mean) / xp.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
        seen.append(x)
        x = 1 / (1 + xp.exp(-x))
    return x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"], seen


def mean_loss(params, x, labels, stats=None, xp=np):
    return cross_entropy(forward(params, x, stats, xp)[0], labels, xp)


def cross_entropy(logits, labels, xp=np):
    return (xp.log(xp.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]).mean()


def wide(tree):
    return jax.tree.map(np.float64, tree)


def examples(rows):
    split = sigmoid_job().data.train
    return np.float64(split.inputs[split.rows[rows]]), split.labels[split.rows[rows]]


def fixed_examples():
    return examples(np.arange(512))


def gradients(params, x, labels):
    """Return gradients in float64 of the function above, and of none of ours."""
    with jax.enable_x64(True):
        return wide(_gradient(params, x, labels))


@jax.jit
def _gradient(params, x, labels):
    return jax.grad(lambda params: mean_loss(params, x, labels, xp=jnp))(params)


def vector(tree):
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def seen_at(state):
    _, seen = forward(wide(state.variables.params), fixed_examples()[0])
    return seen


# In an epoch, and at the end of one (it has 10 steps), from where the next batch is the next epoch's first.
at_each_step = pytest.mark.parametrize("step", [3, 10])


@at_each_step
def test_a_measurement_has_all_that_it_says_in_digits_that_float32_has(step):
    _, _, measured = reached(step)
    assert sorted(measured) == sorted(KEYS.split())
    assert json.loads(json.dumps(measured)) == measured
    leaves = jax.tree.leaves(measured)
    assert len(leaves) == 3 * 3 + 2 + 2 * 64 + 2 + 1 + 1 + 4 + 4 + 1 + 3 + 3 + 2 + 2
    assert all(type(value) is float and value == float(f"{value:.7g}") for value in leaves)


@at_each_step
def test_units_are_percentiles_of_what_the_first_ones_of_the_last_hidden_layer_get(step):
    state, _, measured = reached(step)
    expected = np.percentile(seen_at(state)[-1][:, :3], [15, 50, 85], axis=0).T
    assert_allclose(measured["units"], expected, rtol=1e-4, atol=1e-5)


@at_each_step
def test_movement_is_how_far_a_typical_unit_goes_in_the_step_that_training_takes_next(step):
    state, following, measured = reached(step)
    assert int(following.step) == step + 1
    distances = [
        np.sqrt(((np.sort(new, 0) - np.sort(old, 0)) ** 2).mean(0)) / old.std(0)
        for old, new in zip(seen_at(state), seen_at(following))
    ]
    assert min(map(np.min, distances)) > 1e-4
    assert_allclose(measured["movement"], [np.median(layer) for layer in distances], rtol=1e-3)


@at_each_step
def test_histograms_are_shares_of_all_inputs_in_bins_of_which_the_outermost_are_open(step):
    state, _, measured = reached(step)
    first, *_ = layers = seen_at(state)
    assert (first < -8).any() and (first > 8).any()
    for histogram, x in zip(measured["histograms"], layers, strict=True):
        assert_allclose(sum(histogram), 1, rtol=1e-6)
        # One input may lie so close to an edge that rounding takes it over.
        assert_allclose(histogram, np.histogram(x, OPEN_EDGES)[0] / x.size, atol=1.1 / x.size)


@at_each_step
def test_slope_is_the_mean_derivative_of_the_activation(step):
    state, _, measured = reached(step)
    outputs = [1 / (1 + np.exp(-x)) for x in seen_at(state)]
    assert_allclose(measured["slope"], [(y * (1 - y)).mean() for y in outputs], rtol=1e-5)
    assert measured["slope"][0] < measured["slope"][1]


@at_each_step
def test_landscape_is_that_of_the_next_batch_along_its_gradient_in_learning_rates(step):
    state, following, measured = reached(step)
    params, batch = wide(state.variables.params), examples(batch_of(sigmoid_job(), step))
    rate = 2 * 0.4 * (1 - step / 30)  # twice the batch size that the learning rate is meant for
    gradient = gradients(params, *batch)
    assert_allclose(measured["loss"], mean_loss(params, *batch), rtol=1e-5)
    # It is the loss that training sees.
    assert_allclose(measured["loss"], float(following.sums["loss"] - state.sums["loss"]) / 128, rtol=1e-4)
    changes = []
    for factor, loss, change in zip(
        (0.5, 1, 2, 4), measured["losses"], measured["gradient_changes"], strict=True
    ):
        point = jax.tree.map(lambda p, g, factor=factor: p - factor * rate * g, params, gradient)
        assert_allclose(loss, mean_loss(point, *batch), rtol=1e-5)
        changes.append(np.linalg.norm(vector(gradients(point, *batch)) - vector(gradient)))
        assert_allclose(change, changes[-1], rtol=1e-3)
    distances = rate * np.array([0.5, 1, 2, 4]) * np.linalg.norm(vector(gradient))
    assert_allclose(measured["smoothness"], (changes / distances).max(), rtol=1e-3)


@at_each_step
def test_gradient_shift_is_what_the_next_step_of_the_layers_before_does_to_a_gradient(step):
    state, following, measured = reached(step)
    before, after = wide(state.variables.params), wide(following.variables.params)
    batch = examples(batch_of(sigmoid_job(), step))
    assert (measured["gradient_shift"][0], measured["gradient_cosine"][0]) == (0, 1)
    for i in (1, 2):
        moved = {name for layer in LAYERS[:i] for name in layer}
        mixed = {name: (after if name in moved else before)[name] for name in before}
        ours, theirs = (
            vector({name: gradients(params, *batch)[name] for name in LAYERS[i]})
            for params in (before, mixed)
        )
        lengths = np.linalg.norm(ours) * np.linalg.norm(theirs)
        assert_allclose(measured["gradient_shift"][i], np.linalg.norm(ours - theirs), rtol=2e-3)
        assert_allclose(1 - measured["gradient_cosine"][i], 1 - ours @ theirs / lengths, rtol=0.02, atol=5e-7)


@at_each_step
def test_loss_and_accuracy_are_with_the_fixed_examples_statistics_and_with_the_running_ones(step):
    state, _, measured = reached(step)
    params, (x, labels) = wide(state.variables.params), fixed_examples()
    given = {"batch_statistics": None, "running_statistics": wide(state.variables.batch_stats)}
    for name, stats in given.items():
        answers = forward(params, x, stats)[0].argmax(-1)
        expected = {"loss": mean_loss(params, x, labels, stats), "accuracy": (answers == labels).mean()}
        assert measured[name] == pytest.approx(expected, rel=1e-5)
    assert measured["batch_statistics"]["loss"] != measured["running_statistics"]["loss"]


@at_each_step
def test_batch_norm_can_give_the_inputs_of_the_last_hidden_layer_back(step):
    _, _, measured = reached(step)
    assert 0 <= measured["identity_error"] < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"name": "nnx_mlp", "norm": "none"}, "optimizer": {"accumulate": 2, "average": 0.9}},
        {"model": {"norm": "ghost", "dtype": "bfloat16"}, "data": {"normalize": True}, "devices": 4},
    ],
    ids=["nnx without norm, accumulated, averaged", "ghost norm, bfloat16, on devices"],
)
def test_every_kind_of_job_is_measured_on_its_next_batch_and_the_fixed_examples(options):
    job = make_job(**options | {"model": options["model"] | {"widths": (4,)}})
    network, variables = job.step_config.network, jax.device_get(job.initial.variables)
    state = job.initial
    if state.average is not None:  # is evaluated, and not what is trained and measured
        state = state._replace(average=jax.tree.map(lambda leaf: leaf + 1, state.average))
    measured = inspect(job, state)
    assert all(np.isfinite(value) for value in jax.tree.leaves(measured))
    assert min(measured["movement"]) > 1e-4

    batch, fixed = (job.data.train.take(rows) for rows in (batch_of(job, 0), np.arange(512)))
    inputs, examples = (job.data.preprocessing(split.inputs) for split in (batch, fixed))

    @jax.jit
    def run(variables):
        logits, _ = network.apply(variables, inputs, train=True)
        evaluated, _ = network.apply(variables, examples, train=False)
        return logits, evaluated, network.activation_inputs(variables, examples, train=True)

    logits, evaluated, layers = jax.tree.map(np.float64, run(variables))
    rounding = 0.05 if job.config.model.dtype == "bfloat16" else 1e-3
    assert_allclose(measured["loss"], cross_entropy(logits, batch.labels), rtol=rounding)
    running = measured["running_statistics"]
    assert_allclose(running["loss"], cross_entropy(evaluated, fixed.labels), rtol=rounding)
    assert_allclose(running["accuracy"], (evaluated.argmax(-1) == fixed.labels).mean(), atol=rounding)
    for layer, histogram in zip(layers, measured["histograms"], strict=True):
        assert_allclose(histogram, np.histogram(layer, OPEN_EDGES)[0] / layer.size, atol=rounding)


def test_where_the_learning_rate_is_0_there_is_no_step_to_measure():
    job = sigmoid_job()
    last = processes.replicate(job.step_config.mesh, np.int32(job.step_config.total_steps))
    end = job.initial._replace(step=last)
    for name, value in inspect(job, end).items():
        no_step = {bool(np.isnan(number)) for number in jax.tree.leaves(value)}
        assert no_step == {name in inspection.OF_THE_STEP}, name


def test_number_that_is_not_finite_becomes_null_and_the_rest_is_written(tmp_path):
    job = sigmoid_job()
    params = job.initial.variables.params
    head = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), params["Dense_2"])
    variables = job.initial.variables._replace(params=params | {"Dense_2": head})
    broken = job.initial._replace(variables=variables, step=np.int32(7))
    with Log(tmp_path, first_step=0, total_steps=30) as log:
        log.inspection(7, inspect(job, broken))
        log.inspection(8, inspect(job, job.initial))
    assert "NaN" not in (tmp_path / "inspection.jsonl").read_text()
    first, second = read_inspections(tmp_path)
    assert (first["step"], second["step"]) == (7, 8)
    assert first["loss"] is first["running_statistics"]["loss"] is None and first["losses"] == 4 * [None]
    # What the broken layer does not reach is measured still.
    assert first["slope"] == second["slope"] and None not in first["histograms"][0]
    assert isinstance(second["loss"], float)


def test_job_is_measured_at_its_start_and_each_evaluation_whatever_interrupts_it_and_does_not_change(
    tmp_path, monkeypatch
):
    model = {"widths": (6, 5), "activation": "sigmoid"}
    configs = {
        name: make_config(tmp_path / name, model=model, optimizer=OPTIMIZER, inspect=name != "plain")
        for name in ("plain", "whole", "parts")
    }
    fit(configs["plain"]), fit(configs["whole"])
    assert [line["step"] for line in read_inspections(tmp_path / "whole")] == [0, 12, 24, 30]
    assert not (tmp_path / "plain" / "inspection.jsonl").exists()
    assert results(tmp_path / "whole") == results(tmp_path / "plain")
    states = (final_state(configs[name]) for name in ("whole", "plain"))
    jax.tree.map(assert_array_equal, *states)

    def killed(*_):
        raise KeyboardInterrupt

    assert fit(configs["parts"], stop_after=1).status == "stopped"
    # After a measurement, before the checkpoint that belongs to it; and then in the middle of the next one.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        fit(configs["parts"])
    path = tmp_path / "parts" / "inspection.jsonl"
    assert [line["step"] for line in read_inspections(path.parent)] == [0, 12]
    with path.open("a") as file:
        file.write('{"step": 24, "units": [[0.')
    while not fit(configs["parts"], stop_after=3).finished:
        pass
    assert path.read_bytes() == (tmp_path / "whole" / "inspection.jsonl").read_bytes()
