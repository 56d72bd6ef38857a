import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn

RULES = [jbn.ema(0.9), jbn.ema(0.9, debias=True), jbn.cumulative(), jbn.pooled()]
UNBIASED = [
    jbn.ema(0.9, unbiased=True),
    jbn.ema(0.9, unbiased=True, debias=True),
    jbn.cumulative(unbiased=True),
]
N = 8.0


PYTORCH = json.loads((Path(__file__).parent / "data/torch_batch_norm.json").read_text())


def batches(k=5):
    rng = np.random.RandomState(0)
    return [
        jbn.Moments(
            *(jnp.asarray(leaf, jnp.float32) for leaf in (rng.randn(3), rng.rand(3) + 0.5, np.full(3, N)))
        )
        for _ in range(k)
    ]


def after(rule, parts):
    _, running = jbn.init(3)
    for batch in parts:
        running = rule(running, batch)
    return running


def stacked(parts):
    return (np.stack([np.float64(leaf) for leaf in leaves]) for leaves in zip(*parts))


@pytest.mark.parametrize("unbiased", [False, True])
def test_ema_after_k_batches_is_the_geometric_sum(unbiased):
    decay, parts = 0.9, batches()
    k, (means, variances, _) = len(parts), stacked(parts)
    weights = (1 - decay) * decay ** np.arange(k)[::-1]
    running = after(jbn.ema(decay, unbiased=unbiased), parts)
    assert_allclose(running.mean, weights @ means, rtol=1e-5)
    bessel = N / (N - 1) if unbiased else 1
    assert_allclose(running.var, decay**k * 1 + weights @ variances * bessel, rtol=1e-5)
    assert_array_equal(running.count, k)


@pytest.mark.parametrize("unbiased", [False, True])
def test_debiased_ema_divides_out_the_initial_values(unbiased):
    decay, parts = 0.9, batches()
    k, (means, variances, _) = len(parts), stacked(parts)
    weights = (1 - decay) * decay ** np.arange(k)[::-1]
    running = after(jbn.ema(decay, unbiased=unbiased, debias=True), parts)
    assert_allclose(running.count, 1 - decay**k, rtol=1e-5)
    assert_allclose(running.mean, weights @ means / weights.sum(), rtol=1e-5)
    bessel = N / (N - 1) if unbiased else 1
    assert_allclose(running.var, weights @ variances / weights.sum() * bessel, rtol=1e-5)


def test_debiased_ema_is_exactly_the_first_batch_after_one_step():
    first = batches()[0]
    running = after(jbn.ema(0.99, debias=True), [first])
    assert_array_equal(running.mean, first.mean)
    assert_array_equal(running.var, first.var)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cumulative_is_the_plain_average(unbiased):
    parts = batches()
    means, variances, _ = stacked(parts)
    running = after(jbn.cumulative(unbiased=unbiased), parts)
    assert_allclose(running.mean, means.mean(0), rtol=1e-5)
    assert_allclose(running.var, variances.mean(0) * (N / (N - 1) if unbiased else 1), rtol=1e-5)
    assert_array_equal(running.count, len(parts))


def test_pooled_is_the_moments_of_all_samples_of_unequal_batches():
    x = jnp.asarray(np.random.RandomState(1).randn(20, 3) * 3 + 5, jnp.float32)
    running = after(jbn.pooled(), [jbn.moments(part) for part in (x[:3], x[3:4], x[4:])])
    for leaf, wanted in zip(running, (np.mean(x, 0), np.var(x, 0), np.full(3, 20))):
        assert_allclose(leaf, wanted, rtol=1e-5)


@pytest.mark.parametrize("decay, debias", [(0.0, False), (0.0, True), (1.0, False), (1.0, True)])
def test_extreme_decays_are_the_last_batch_and_the_first_value(decay, debias):
    parts = batches()
    running = after(jbn.ema(decay, debias=debias), parts)
    wanted = parts[-1] if decay == 0 else jbn.init(3)[1]
    assert_array_equal(running.mean, wanted.mean)
    assert_array_equal(running.var, wanted.var)


@pytest.mark.parametrize("run", PYTORCH["runs"], ids=lambda run: f"momentum={run['momentum']}")
def test_unbiased_rules_are_pytorch_step_by_step(run):
    momentum = run["momentum"]
    rule = jbn.cumulative(unbiased=True) if momentum is None else jbn.ema(1 - momentum, unbiased=True)
    params, (_, running) = jbn.Params(jnp.array(run["scale"]), jnp.array(run["bias"])), jbn.init(3)

    def loss(x, params, running, target):
        y, new = jbn.batch_norm(x, params, running, train=True, update=rule)
        return jnp.sum(jnp.sin(y) * target), (y, new)

    grads = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    for step in run["steps"]:
        wanted = {name: np.float32(value) for name, value in step.items()}
        (dx, dparams), (y, running) = grads(wanted["x"], params, running, wanted["target"])
        actual = {
            "y": y,
            "dx": dx,
            "dscale": dparams.scale,
            "dbias": dparams.bias,
            "running_mean": running.mean,
            "running_var": running.var,
        }
        for name, value in actual.items():
            assert_allclose(value, wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)
    y = jbn.normalize(np.float32(run["steps"][0]["x"]), running, params)
    assert_allclose(y, run["inference"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rule", UNBIASED)
def test_unbiased_rules_leave_a_feature_with_one_sample_unchanged(rule):
    first, second = batches(2)
    running = rule(jbn.init(3)[1], first)
    new = rule(running, second._replace(count=jnp.array([8.0, 1.0, 0.0])))
    for old_leaf, new_leaf in zip(running, new):
        assert_array_equal(np.asarray(old_leaf != new_leaf), [True, False, False])


@pytest.mark.parametrize("rule", RULES + UNBIASED)
def test_rules_leave_a_feature_without_samples_unchanged(rule):
    first, second = batches(2)
    running = rule(jbn.init(3)[1], first)
    for old_leaf, new_leaf in zip(running, rule(running, second._replace(count=jnp.zeros(3)))):
        assert_array_equal(old_leaf, new_leaf)


@pytest.mark.parametrize("rule", RULES + UNBIASED)
def test_equal_rules_are_equal_hash_alike_and_compile_once(rule):
    again = type(rule)(**{field: getattr(rule, field) for field in rule.__dataclass_fields__ if field != "_"})
    assert again == rule and hash(again) == hash(rule) and again is not rule
    traces = []

    @partial(jax.jit, static_argnums=0)
    def step(rule, running, batch):
        traces.append(rule)
        return rule(running, batch)

    _, running = jbn.init(3)
    for same_rule in (rule, again):
        running = step(same_rule, running, batches()[0])
    assert len(traces) == 1


def test_decay_may_be_traced_and_scheduled():
    parts = batches()

    @jax.jit
    def step(running, batch, decay):
        return jbn.ema(decay)(running, batch)

    _, running = jbn.init(3)
    expected = 0.0
    for decay, batch in zip((0.0, 0.5, 0.25, 0.75, 0.9), parts):
        running = step(running, batch, decay)
        expected = decay * expected + (1 - decay) * np.float64(batch.mean)
    assert_allclose(running.mean, expected, rtol=1e-5)


@pytest.mark.parametrize("decay", [np.float32(0.5), jnp.array(0.5), np.array(0.5)])
def test_a_rule_with_a_known_decay_is_hashable(decay):
    assert jbn.ema(decay) == jbn.ema(0.5) and hash(jbn.ema(decay)) == hash(jbn.ema(0.5))


@pytest.mark.parametrize(
    "decay, error, message",
    [
        (None, TypeError, "decay=None; expected a number"),
        (np.ones(3), ValueError, r"decay has shape \(3,\); expected one number"),
    ],
)
def test_decay_is_one_number(decay, error, message):
    with pytest.raises(error, match=message):
        jbn.ema(decay)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_outside_the_unit_interval_is_named(decay):
    with pytest.raises(ValueError, match=r"decay=.* is outside \[0, 1\].*PyTorch"):
        jbn.ema(decay)


def test_weight_of_the_new_value_is_rounded_once():
    _, running = jbn.init(1)
    batch = jbn.Moments(jnp.array([4.5]), jnp.array([1.0]), jnp.array([8.0]))
    assert jbn.ema(0.99)(running, batch).mean == np.float32(0.01) * np.float32(4.5)


@pytest.mark.parametrize("rule", RULES + UNBIASED)
def test_rules_take_moments_of_different_dtypes(x64, rule):
    first, second = batches(2)
    wide = jbn.Moments(*(np.float64(leaf) for leaf in second))
    expected = rule(first, second)
    for running, batch in ((first, wide), (jbn.Moments(*(jnp.float64(leaf) for leaf in first)), second)):
        for leaf, wanted in zip(rule(running, batch), expected):
            assert leaf.dtype == jnp.float64
            assert_allclose(leaf, wanted, rtol=1e-6)


def test_what_a_subclass_of_a_rule_holds_counts():
    class Moved(jbn.ema):
        def __init__(self, by):
            super().__init__(0.5)
            object.__setattr__(self, "by", by)

        def __call__(self, running, batch):
            return running._replace(mean=running.mean + self.by)

    x, (params, running) = jnp.ones((4, 3)), jbn.init(3)
    for by in 1.0, 2.0:  # equal to each other, as far as `ema` knows
        _, new = jbn.batch_norm(x, params, running, train=True, update=Moved(by))
        assert_array_equal(new.mean, by)
