"""Running moments after a million batches, and counts beyond 2^24, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn

STEPS, SAMPLES = 1_000_000, 1000.0
RNG = np.random.RandomState(0)
NOISE = RNG.normal(0, 1, STEPS)
# Means and variances of the batches of five features.
MEANS = np.stack(
    [
        np.full(STEPS, 100.0),
        100 + NOISE,
        100 + NOISE / 100,
        100 + RNG.exponential(1.0, STEPS),
        np.where(np.arange(STEPS) < STEPS // 2, 100, 101) + NOISE / 10,
    ],
    axis=1,
).astype(np.float32)
VARIANCES = np.stack(
    [
        np.full(STEPS, 2.0),
        RNG.gamma(50, 1 / 25, STEPS),
        2 + NOISE / 1000,
        RNG.exponential(2.0, STEPS),
        np.full(STEPS, 2.0),
    ],
    axis=1,
).astype(np.float32)


def exact(rule):
    """Returns mean and variance after all batches, and the count."""
    means, variances = np.float64(MEANS), np.float64(VARIANCES)
    if isinstance(rule, jbn.ema):
        weights = (1 - rule.decay) * rule.decay ** np.arange(STEPS)[::-1]
        total = weights.sum() if rule.debias else 1
        initial = 0 if rule.debias else rule.decay**STEPS
        return (
            weights @ means / total,
            weights @ variances / total + initial,
            weights.sum() if rule.debias else STEPS,
        )
    if isinstance(rule, jbn.cumulative):
        return means.mean(0), variances.mean(0), STEPS
    return means.mean(0), variances.mean(0) + means.var(0), STEPS * SAMPLES


@pytest.mark.parametrize(
    "rule, tolerance",
    [
        (jbn.ema(0.9), 4e-7),
        (jbn.ema(0.99), 4e-6),
        (jbn.ema(0.999), 4e-5),
        (jbn.ema(0.99999), 3e-5),
        (jbn.ema(0.99999, debias=True), 3e-5),
        (jbn.cumulative(), 1e-4),
        (jbn.pooled(), 1e-4),
    ],
    ids=str,
)
def test_a_million_batches_leave_the_average_that_float64_has(rule, tolerance):
    def step(running, batch):
        return rule(running, jbn.Moments(*batch, jnp.full(5, SAMPLES))), None

    run = jax.jit(lambda *batches: jax.lax.scan(step, jbn.init(5)[1], batches)[0])
    running = run(MEANS, VARIANCES)
    mean, var, count = exact(rule)
    assert_allclose(running.mean, mean, rtol=tolerance)
    # The spread between batches has the error of the mean, which is 100 times the standard deviation.
    assert_allclose(running.var, var, rtol=1e-3 if isinstance(rule, jbn.pooled) else tolerance)
    assert_allclose(running.count[1:], count, rtol=1e-3)


def test_an_average_near_its_limit_stays_there():
    batch = jbn.Moments(jnp.full(1, 100.0), jnp.full(1, 2.0), jnp.full(1, 8.0))
    for rule in (jbn.ema(0.99999), jbn.ema(0.99999, debias=True), jbn.cumulative(), jbn.pooled()):
        start = batch._replace(count=jnp.full(1, 1.0 if getattr(rule, "debias", False) else 1e6))
        run = jax.jit(
            lambda start, rule=rule: jax.lax.fori_loop(0, 10_000, lambda _, r: rule(r, batch), start)
        )
        running = run(start)
        assert_array_equal([running.mean[0], running.var[0]], np.float32([100, 2]))


@pytest.mark.parametrize("power", [24, 25, 28, 32, 36, 40])
def test_a_pooled_count_keeps_counting(power):
    features, batches, size = 4096, 64, 2.0 ** (power - 26)
    keys = jax.random.split(jax.random.key(power), batches)

    @jax.jit
    def run(keys):
        def step(running, key):
            mean = jax.random.normal(key, (features,))
            return jbn.pooled()(
                running, jbn.Moments(mean, jnp.ones(features), jnp.full(features, size))
            ), None

        start = jbn.Moments(jnp.zeros(features), jnp.ones(features), jnp.full(features, 2.0**power))
        return jax.lax.scan(step, start, keys)[0].count

    # Each batch is a quarter, to an eighth, of the distance between neighbours: as many features count it.
    added = np.float64(run(keys)) - 2.0**power
    expected = batches * size
    assert_allclose(added.mean(), expected, rtol=0.05)
    assert np.all((added >= 0) & (added < 3 * expected + 2.0 ** (power - 22)))


@pytest.mark.parametrize("rule", [jbn.pooled(), jbn.cumulative()])
def test_counts_are_exact_as_far_as_float32_is(rule):
    start = jbn.Moments(jnp.zeros(1), jnp.ones(1), jnp.full(1, 2.0**24 - 3))
    batch = jbn.Moments(jnp.ones(1), jnp.ones(1), jnp.ones(1))
    for added in (1, 2, 3):
        start = rule(start, batch)
        assert_array_equal(start.count, 2.0**24 - 3 + added)


def test_one_sample_beside_many_weighs_its_share():
    for power in range(20, 41, 4):
        running = jbn.Moments(jnp.zeros(1), jnp.ones(1), jnp.full(1, 2.0**power))
        batch = jbn.Moments(jnp.full(1, 1e4), jnp.full(1, 3.0), jnp.ones(1))
        w = 1 / (2.0**power + 1)
        for new in (jbn.pooled()(running, batch), jbn.merge(running, batch), jbn.merge(batch, running)):
            assert_allclose(new.mean, w * 1e4, rtol=1e-6)
            assert_allclose(new.var, 1 + w * 2 + w * (1 - w) * 1e8, rtol=1e-6)


def test_rounding_at_random_is_a_function_of_the_values():
    batch = jbn.Moments(jnp.full(3, 0.1), jnp.full(3, 0.7), jnp.full(3, 8.0))
    running = jbn.Moments(jnp.full(3, 100.0), jnp.full(3, 2.0), jnp.full(3, 3e9))
    for rule in (jbn.pooled(), jbn.cumulative(), jbn.ema(0.9999)):
        eager, compiled, again = rule(running, batch), jax.jit(rule)(running, batch), rule(running, batch)
        jax.tree.map(assert_array_equal, eager, again)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=3e-7), eager, compiled)
        for leaf in eager:
            assert_array_equal(leaf, leaf[0])  # features alike stay alike


def test_complex_means_are_averaged_part_by_part():
    mean = jnp.array([100.0 + 50.0j], jnp.complex64)
    batch = jbn.Moments(mean, jnp.full(1, 2.0), jnp.full(1, 8.0))

    @jax.jit
    def run():
        start = jbn.init(1, dtype=jnp.complex64)[1]
        return jax.lax.fori_loop(0, 200_000, lambda _, running: jbn.ema(0.9999)(running, batch), start)

    assert_allclose(run().mean, mean, rtol=1e-5)
