"""The update rules, against NumPy in float64 and against PyTorch."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference

RULES = [jbn.ema(0.9), jbn.ema(0.9, debias=True), jbn.cumulative(), jbn.pooled()]
UNBIASED = [
    jbn.ema(0.9, unbiased=True),
    jbn.ema(0.9, unbiased=True, debias=True),
    jbn.cumulative(unbiased=True),
]
N, K, DECAY = 8.0, 5, 0.9
RNG = np.random.RandomState(0)
BATCHES = [jbn.Moments(*map(np.float32, (RNG.randn(3), RNG.rand(3) + 0.5, np.full(3, N)))) for _ in range(K)]
MEANS, VARIANCES = (np.stack([np.float64(batch[i]) for batch in BATCHES]) for i in range(2))
START = jbn.Moments(*np.float32([[0] * 3, [1] * 3, [0] * 3]))
PYTORCH = json.loads((Path(__file__).parents[2] / "data/torch_batch_norm.json").read_text())["runs"]

step = jax.jit(lambda rule, running, batch: rule(running, batch), static_argnums=0)


@cache
def after(rule, batches=K):
    running = START
    for batch in BATCHES[:batches]:
        running = step(rule, running, batch)
    return running


@pytest.mark.parametrize("unbiased", [False, True])
def test_rules_are_the_averages_that_they_say(unbiased):
    weights = (1 - DECAY) * DECAY ** np.arange(K)[::-1]
    variances = VARIANCES * (N / (N - 1) if unbiased else 1)
    for rule, mean, var, count in (
        (jbn.ema(DECAY, unbiased=unbiased), weights @ MEANS, DECAY**K + weights @ variances, K),
        (
            jbn.ema(DECAY, unbiased=unbiased, debias=True),  # the initial values are divided out
            weights @ MEANS / weights.sum(),
            weights @ variances / weights.sum(),
            1 - DECAY**K,
        ),
        (jbn.cumulative(unbiased=unbiased), MEANS.mean(0), variances.mean(0), K),
    ):
        for leaf, expected in zip(after(rule), (mean, var, np.full(3, count))):
            assert_allclose(leaf, expected, rtol=1e-5, err_msg=rule)


def test_pooled_is_the_moments_of_all_samples_of_unequal_batches():
    x = np.random.RandomState(1).randn(20, 3) * 3 + 5
    running = START
    for part in x[:3], x[3:4], x[4:]:
        running = step(jbn.pooled(), running, jbn.Moments(*map(np.float32, reference.moments(part))))
    for leaf, wanted in zip(running, (x.mean(0), x.var(0), np.full(3, 20))):
        assert_allclose(leaf, wanted, rtol=1e-5)


def test_debiased_ema_is_exactly_the_first_batch_after_one_step():
    assert_array_equal(after(jbn.ema(0.99, debias=True), 1)[:2], BATCHES[0][:2])


def test_extreme_decays_are_the_last_batch_and_the_first_value():
    for debias in False, True:
        assert_array_equal(after(jbn.ema(0.0, debias=debias))[:2], BATCHES[-1][:2])
        assert_array_equal(after(jbn.ema(1.0, debias=debias))[:2], START[:2])


def test_weight_of_the_new_value_is_rounded_once():
    batch = jbn.Moments(*np.float32([[4.5] * 3, [1] * 3, [8] * 3]))
    assert_array_equal(step(jbn.ema(0.99), START, batch).mean, np.float32(0.01) * np.float32(4.5))


def test_unbiased_rules_are_pytorch_step_by_step():
    for run in PYTORCH:
        momentum, running = run["momentum"], START
        rule = jbn.cumulative(unbiased=True) if momentum is None else jbn.ema(1 - momentum, unbiased=True)
        for given in run["steps"]:
            running = step(rule, running, jbn.Moments(*map(np.float32, reference.moments(given["x"]))))
            assert_allclose(running.mean, given["running_mean"], rtol=2e-5, atol=2e-5, err_msg=momentum)
            assert_allclose(running.var, given["running_var"], rtol=2e-5, atol=2e-5, err_msg=momentum)
        params = jbn.Params(*(np.float32(run[name]) for name in ("scale", "bias")))
        y = reference.normalize(run["steps"][0]["x"], *running[:2], *params)
        assert_allclose(y, run["inference"], rtol=2e-5, atol=2e-5)


def test_a_layer_is_pytorchs_in_outputs_gradients_and_state():
    run = PYTORCH[0]
    params = jbn.Params(*(np.float32(run[name]) for name in ("scale", "bias")))
    rule = jbn.ema(1 - run["momentum"], unbiased=True)

    def loss(x, params, running, target):
        y, new = jbn.batch_norm(x, params, running, train=True, update=rule)
        return jnp.sum(jnp.sin(y) * target), (y, new)

    gradients, running = jax.jit(jax.grad(loss, (0, 1), has_aux=True)), START
    for given in run["steps"]:
        given = {name: np.float32(value) for name, value in given.items()}
        (dx, dparams), (y, running) = gradients(given["x"], params, running, given["target"])
        actual = y, dx, *dparams, *running[:2]
        for name, value in zip(("y", "dx", "dscale", "dbias", "running_mean", "running_var"), actual):
            assert_allclose(value, given[name], rtol=2e-5, atol=2e-5, err_msg=name)
    y = jax.jit(jbn.normalize)(np.float32(run["steps"][0]["x"]), running, params)
    assert_allclose(y, run["inference"], rtol=2e-5, atol=2e-5)


def test_a_feature_without_enough_samples_stays_as_it_was():
    for rule in RULES + UNBIASED:
        running = after(rule, 1)
        new = step(rule, running, BATCHES[1]._replace(count=np.float32([8, 1, 0])))
        changed = [True, rule not in UNBIASED, False]  # the variance of one sample has no unbiased estimate
        for name, old_leaf, new_leaf in zip(running._fields, running, new):
            assert_array_equal(old_leaf != new_leaf, changed, err_msg=f"{rule}, {name}")


def test_equal_rules_are_equal_hash_alike_and_compile_once():
    for rule in RULES + UNBIASED + [jbn.keep()]:
        fields = {name: getattr(rule, name) for name in rule.__dataclass_fields__ if name != "_"}
        again = type(rule)(**fields)
        assert again == rule and hash(again) == hash(rule) and again is not rule
        traces = []

        @partial(jax.jit, static_argnums=0)
        def trace(rule, running, traces=traces):
            traces.append(rule)
            return running

        trace(rule, START), trace(again, START)
        assert len(traces) == 1, rule
    for decay in np.float32(0.5), jnp.array(0.5), np.array(0.5):
        assert jbn.ema(decay) == jbn.ema(0.5) and hash(jbn.ema(decay)) == hash(jbn.ema(0.5))


def test_decay_may_be_traced_and_scheduled():
    traced = jax.jit(lambda running, batch, decay: jbn.ema(decay)(running, batch))
    running, expected = START, 0.0
    for decay, batch, mean in zip((0.0, 0.5, 0.25, 0.75, 0.9), BATCHES, MEANS):
        running = traced(running, batch, decay)
        expected = decay * expected + (1 - decay) * mean
    assert_allclose(running.mean, expected, rtol=1e-5)


@pytest.mark.slow
def test_rules_take_moments_of_different_dtypes(x64):
    first, second = BATCHES[:2]
    wide = lambda moments: jax.tree.map(np.float64, moments)
    every = jax.jit(lambda running, batch: [rule(running, batch) for rule in RULES + UNBIASED[:1]])
    expected = every(first, second)
    for running, batch in (first, wide(second)), (wide(first), second):
        for leaf, wanted in zip(jax.tree.leaves(every(running, batch)), jax.tree.leaves(expected)):
            assert leaf.dtype == jnp.float64
            assert_allclose(leaf, wanted, rtol=1e-6)


@pytest.mark.slow
def test_what_a_subclass_of_a_rule_holds_counts():
    class Moved(jbn.ema):
        def __init__(self, by):
            super().__init__(0.5)
            object.__setattr__(self, "by", by)

        def __call__(self, running, batch):
            return running._replace(mean=running.mean + self.by)

    x = np.ones((4, 3), np.float32)
    for by in 1.0, 2.0:  # equal to each other, as far as `ema` knows
        f = jax.jit(lambda x, by=by: jbn.batch_norm(x, None, START, train=True, update=Moved(by))[1].mean)
        assert_array_equal(f(x), by)
