import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import quick_jit
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from train.config import Data, Model, Optimizer
from train.data.dataset import Examples, Preprocessing
from train.models import network as models
from train.models.network import Variables
from train.runs import processes as distributed
from train.training import optimizer as optim
from train.training import steps as states
from train.training.steps import Recipe, Source

RNG = np.random.RandomState(0)
DATA = Examples(RNG.randint(0, 256, (40, 4, 4, 1)).astype(np.uint8), RNG.randint(0, 3, 40).astype(np.int32))
ORDER = jnp.asarray(RNG.permutation(40), jnp.int32)
PREPROCESSING = Preprocessing(np.float32(100), np.float32(64))
INPUTS = (DATA.inputs - np.float32(100)) / np.float32(64)


def setup(*, devices=1, seed=0, data=None, options=None, **model):
    """Returns a recipe, a state at step 0, and the source of examples."""
    config = Model(**{"widths": (6,)} | model)
    options = Optimizer(**{"learning_rate": 0.1} | (options or {}))
    build = lambda rule: models.build(config, (4, 4, 1), 3, rule=rule)
    rule = jbn.ema(0.9, debias=True)
    recipe = Recipe(
        network=build(rule),
        pooling=build(jbn.pooled()),
        rule=rule,
        optimizer=optim.build(options, steps=100, batch_size=8),
        data=Data(**(data or {})),
        options=options,
        batch_size=8,
        mesh=distributed.mesh_of(jax.devices()[:devices]),
    )
    source = distributed.replicate(recipe.mesh, Source(DATA, PREPROCESSING, np.uint32(seed)))
    return recipe, states.create(recipe, seed, (4, 4, 1)), source


def take(recipe, state, source, start, steps, loop=True):
    return states.train_steps(recipe, state, source, ORDER, start, steps, loop=loop)


def one_step(recipe, state, source, rows=slice(8)):
    return quick_jit(states.train_step, static_argnums=0)(recipe, state, source, jnp.arange(40)[rows])


def losses(logits, labels):
    logits = np.float64(logits)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(partial(assert_allclose, rtol=rtol, atol=atol), a, b)


def test_create_starts_at_step_0_and_follows_from_the_seed():
    _, state, _ = setup()
    again, other = (setup(seed=seed)[1] for seed in (0, 1))
    assert int(state.step) == 0 and int(state.failed_at) == states.NEVER
    jax.tree.map(assert_array_equal, state, again)
    kernels = [s.variables.params["Dense_0"]["kernel"] for s in (state, other)]
    assert (kernels[0] != kernels[1]).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_train_step_is_one_optimizer_step_down_the_gradient_of_the_mean_loss(norm, smoothing):
    recipe, state, source = setup(norm=norm, options={"label_smoothing": smoothing})
    targets = (1 - smoothing) * np.eye(3, dtype=np.float32)[DATA.labels[:8]] + np.float32(smoothing / 3)

    def mean_loss(params):
        logits, _ = recipe.network.apply(state.variables._replace(params=params), INPUTS[:8], train=True)
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1)), logits

    (_, logits), grads = quick_jit(jax.value_and_grad(mean_loss, has_aux=True))(state.variables.params)
    new = one_step(recipe, state, source)
    # The first Nesterov step with momentum 0.9 goes 1.9 times the learning rate.
    expected = jax.tree.map(lambda p, g: p - 0.1 * 1.9 * g, state.variables.params, grads)
    assert_close(new.variables.params, expected)
    assert int(new.step) == 1
    # Smoothed or not, what is reported is the cross-entropy with the labels.
    assert_allclose(new.sums.loss, losses(logits, DATA.labels[:8]).sum(), rtol=1e-5)
    correct = int((logits.argmax(-1) == DATA.labels[:8]).sum())
    assert (int(new.sums.correct), int(new.sums.examples)) == (correct, 8)


@pytest.mark.parametrize("loop", [True, False])
def test_how_many_steps_are_taken_at_a_time_cannot_change_a_bit(loop):
    recipe, whole, source = setup(data={"shift": 1}, options={"average": 0.9})
    parts = jax.tree.map(jnp.copy, whole)
    whole = take(recipe, whole, source, 0, 5, loop)
    for start, steps in ((0, 1), (8, 3), (32, 1)):
        parts = take(recipe, parts, source, start, steps, loop)
    jax.tree.map(assert_array_equal, whole, parts)


@pytest.mark.parametrize("devices", [1, 4])
def test_loop_in_the_program_and_outside_and_batches_from_the_host_agree(devices):
    recipe, state, source = setup(devices=devices)
    inside, outside = (
        take(recipe, jax.tree.map(jnp.copy, state), source, 0, 5, loop) for loop in (True, False)
    )
    assert_close(inside, outside, rtol=1e-4)
    for start in range(0, 40, 8):
        rows = ORDER[start : start + 8]
        batch = distributed.shard(recipe.mesh, Examples(*(leaf[rows] for leaf in DATA)))
        state = states.train_on_batch(recipe, state, source._replace(examples=batch))
    assert_close(state, outside, rtol=1e-4)


@pytest.mark.parametrize("norm, accumulate", [("batch", 1), ("batch", 2), ("layer", 2)])
def test_devices_take_the_same_steps_as_one_and_share_their_statistics(norm, accumulate):
    options = {"norm": norm, "options": {"accumulate": accumulate}, "data": {"flip": True}}
    one, four = (take(*setup(devices=devices, **options), 0, 3) for devices in (1, 4))
    assert_close(four, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, wanted", [("mlp", True), ("cnn", jax.default_backend() != "cpu")])
def test_convolutions_are_not_looped_over_on_a_cpu(name, wanted):
    assert states.loops_well(setup(name=name)[0].network, (4, 4, 1)) == wanted


def test_steps_visit_the_rows_in_their_order():
    recipe, state, source = setup()
    by_hand = one_step(recipe, state, source, ORDER[16:24])
    assert_allclose(take(recipe, state, source, 16, 1).sums.loss, by_hand.sums.loss, rtol=1e-6)


def test_augmentation_follows_from_seed_and_step_and_reaches_the_network():
    recipe, state, source = setup(data={"shift": 2})
    loss = lambda recipe, step=0, seed=0: float(
        one_step(recipe, state._replace(step=np.int32(step)), source._replace(seed=np.uint32(seed))).sums.loss
    )
    assert loss(recipe) == loss(recipe)
    assert len({loss(recipe), loss(recipe, step=1), loss(recipe, seed=1), loss(setup()[0])}) == 4


@pytest.mark.parametrize("norm", ["batch", "ghost", "none"])
def test_accumulation_takes_the_mean_gradient_of_parts_normalized_each_by_itself(norm):
    recipe, state, source = setup(norm=norm, virtual_batch_size=2, options={"accumulate": 2})
    rows = [np.arange(8)[0::2], np.arange(8)[1::2]]  # so that each part has rows of every device

    def mean_loss(params):
        logits = [
            recipe.network.apply(state.variables._replace(params=params), INPUTS[part], train=True)[0]
            for part in rows
        ]
        targets = [jnp.asarray(DATA.labels[part]) for part in rows]
        values = map(optax.softmax_cross_entropy_with_integer_labels, logits, targets)
        return jnp.mean(jnp.concatenate(list(values)))

    value, grads = quick_jit(jax.value_and_grad(mean_loss))(state.variables.params)
    new = one_step(recipe, state, source)
    expected = jax.tree.map(lambda p, g: p - 0.1 * 1.9 * g, state.variables.params, grads)
    assert_close(new.variables.params, expected)
    assert_allclose(new.sums.loss, 8 * value, rtol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "ghost"])
def test_accumulation_gives_the_first_layer_the_running_statistics_of_the_whole_batch(norm):
    stats = {}
    for parts in (1, 2, 4):
        recipe, state, source = setup(norm=norm, virtual_batch_size=2, options={"accumulate": parts})
        moved = state._replace(
            variables=one_step(recipe, state, source).variables
        )  # from a second step on too
        stats[parts] = one_step(recipe, moved, source, slice(8, 16)).variables.batch_stats["BatchNorm_0"]
        if parts > 1:
            features = (INPUTS[8:16].reshape(8, -1) @ moved.variables.params["Dense_0"]["kernel"]).astype(
                float
            )
            first = moved.variables.batch_stats["BatchNorm_0"]
            weight = 0.1 / (1 - 0.9**2)  # of the second batch in a debiased average
            for name, value in (("mean", features.mean(0)), ("var", features.var(0))):
                expected = (1 - weight) * np.float64(first[name]) + weight * value
                assert_allclose(stats[parts][name], expected, rtol=1e-5, atol=1e-6)
            assert_allclose(stats[parts]["count"], 1 - 0.9**2, rtol=1e-5)


def test_average_is_that_of_weights_and_statistics_and_forgets_the_start_quickly():
    recipe, state, source = setup(options={"average": 0.3})
    expected = jax.tree.map(np.float64, state.variables)
    for step in range(4):
        state = one_step(recipe, state, source, slice(8 * step, 8 * step + 8))
        decay = min(0.3, (1 + step) / (10 + step))
        move = lambda a, v, decay=decay: decay * a + (1 - decay) * np.float64(v)
        expected = jax.tree.map(move, expected, state.variables)
    assert_close(state.average, expected)
    assert state.evaluated is state.average and isinstance(state.average, Variables)
    assert setup()[1].average is None


@pytest.mark.parametrize("devices", [1, 4])
def test_eval_step_scores_each_example_to_the_same_bit_on_any_number_of_devices(devices):
    recipe, state, _ = setup()
    examples = distributed.shard(
        distributed.mesh_of(jax.devices()[:devices]), Examples(*(a[:32] for a in DATA))
    )
    mesh = distributed.mesh_of(jax.devices()[:devices])
    variables, preprocessing = distributed.replicate(mesh, (state.variables, PREPROCESSING))
    loss, correct = states.eval_step(recipe.network, mesh, variables, preprocessing, examples)
    logits, _ = recipe.network.apply(state.variables, INPUTS[:32], train=False)
    assert_allclose(loss, losses(logits, DATA.labels[:32]), rtol=1e-5)
    assert_array_equal(correct, np.argmax(logits, -1) == DATA.labels[:32])
    probabilities = states.probabilities(recipe.network, state.variables, PREPROCESSING, DATA.inputs[:32])
    assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-5)


def test_first_step_whose_loss_is_not_finite_is_remembered():
    recipe, state, source = setup(norm="none")
    state = take(recipe, state, source, 0, 2)
    assert int(state.failed_at) == states.NEVER
    broken = state._replace(variables=jax.tree.map(lambda leaf: leaf * np.nan, state.variables))
    assert int(take(recipe, broken, source, 16, 3).failed_at) == 3


def test_recipe_is_what_a_program_is_compiled_for():
    recipe, state, source = setup()
    assert hash(recipe) == hash(dataclasses.replace(recipe))
    compiled = states._many_steps._cache_size()
    for _ in range(2):
        state = take(dataclasses.replace(recipe), state, source, 0, 1)
    assert states._many_steps._cache_size() == compiled + 1
