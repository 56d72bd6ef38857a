from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from train import models, optim
from train import state as states
from train.config import Model, Optimizer
from train.data import Batch, Split

RNG = np.random.RandomState(0)
DATA = Split(RNG.rand(40, 4, 4, 1).astype(np.float32), RNG.randint(0, 3, 40).astype(np.int32))
ORDER = jnp.asarray(RNG.permutation(40), jnp.int32)


def setup(**options):
    model = models.build(Model(widths=(6,), **options), DATA.inputs.shape[1:], classes=3)
    optimizer = optim.build(Optimizer(learning_rate=0.1), steps=100)
    return model, optimizer, states.create(model, optimizer, 0, DATA.inputs[:1])


def take(model, optimizer, state, start, steps, loop=True):
    return states.train_steps(model, optimizer, state, DATA, ORDER, start, steps, batch_size=8, loop=loop)


def softmax_loss(logits, labels):
    logits = np.float64(logits)
    return -(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(labels)), labels]


def test_create_starts_at_step_0_and_follows_from_the_seed():
    model, optimizer, state = setup()
    again, other = (states.create(model, optimizer, seed, DATA.inputs[:1]) for seed in (0, 1))
    assert int(state.step) == 0 and int(state.failed_at) == states.NEVER
    jax.tree.map(assert_array_equal, state, again)
    assert (state.params["Dense_0"]["kernel"] != other.params["Dense_0"]["kernel"]).all()


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_train_step_is_one_optimizer_step_down_the_gradient_of_the_mean_loss(norm):
    model, optimizer, state = setup(norm=norm)
    inputs, labels = jnp.asarray(DATA.inputs[:8]), jnp.asarray(DATA.labels[:8])

    def mean_loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), labels]), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(state.params)
    new = jax.jit(partial(states.train_step, model, optimizer))(state, inputs, labels)
    # The first Nesterov step with momentum 0.9 goes 1.9 times the learning rate.
    expected = jax.tree.map(lambda p, g: p - 0.1 * 1.9 * g, state.params, grads)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.params, expected)
    assert int(new.step) == 1
    assert_allclose(new.sums.loss, 8 * loss, rtol=1e-5)
    assert (int(new.sums.correct), int(new.sums.examples)) == (int((logits.argmax(-1) == labels).sum()), 8)


@pytest.mark.parametrize("loop", [True, False])
def test_how_many_steps_are_taken_at_a_time_cannot_change_a_bit(loop):
    model, optimizer, whole = setup()
    parts = setup()[2]
    whole = take(model, optimizer, whole, 0, 5, loop)
    for start, steps in ((0, 1), (8, 3), (32, 1)):
        parts = take(model, optimizer, parts, start, steps, loop)
    jax.tree.map(assert_array_equal, whole, parts)


def test_loop_in_the_program_and_outside_agree():
    (model, optimizer, inside), outside = setup(), setup()[2]
    inside, outside = (
        take(model, optimizer, s, 0, 5, loop) for s, loop in ((inside, True), (outside, False))
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), inside, outside)


@pytest.mark.parametrize("name, wanted", [("mlp", True), ("cnn", jax.default_backend() != "cpu")])
def test_convolutions_are_not_looped_over_on_a_cpu(name, wanted):
    assert states.loops_well(setup(name=name)[0], DATA.inputs[:1]) == wanted


def test_steps_visit_the_rows_in_their_order():
    model, optimizer, state = setup()
    new = take(model, optimizer, state, 16, 1)
    by_hand = jax.jit(partial(states.train_step, model, optimizer))
    by_hand = by_hand(setup()[2], *(leaf[ORDER[16:24]] for leaf in DATA))
    assert_allclose(new.sums.loss, by_hand.sums.loss, rtol=1e-6)


@pytest.mark.parametrize("padding", [0, 5])
def test_eval_step_counts_each_example_once_and_no_padding(padding):
    model, _, state = setup()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    inputs, labels = DATA.inputs[:8], DATA.labels[:8]
    logits = model.apply(variables, inputs, train=False)
    # Padding that would be answered correctly.
    zero = np.zeros((1, 4, 4, 1), np.float32)
    answer = np.argmax(model.apply(variables, zero, train=False), -1).astype(np.int32)
    batch = Batch(
        np.concatenate([inputs, *padding * [zero]]),
        np.concatenate([labels, *padding * [answer]]),
        np.arange(8 + padding) < 8,
    )
    sums = states.eval_step(model, state.params, state.batch_stats, batch)
    assert_allclose(sums.loss, softmax_loss(logits, labels).sum(), rtol=1e-5)
    assert_array_equal(sums[1:], [(np.argmax(logits, -1) == labels).sum(), 8])
    assert sums.means()["accuracy"] == int(sums.correct) / 8


def test_first_step_whose_loss_is_not_finite_is_remembered():
    model, optimizer, state = setup(norm="none")
    state = take(model, optimizer, state, 0, 2)
    assert int(state.failed_at) == states.NEVER
    broken = state._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
    assert int(take(model, optimizer, broken, 16, 3).failed_at) == 3
