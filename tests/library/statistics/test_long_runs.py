"""Running moments after 300,000 batches, and counts beyond 2^24, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn

STEPS, SAMPLES = 300_000, 1000.0
RULES = {  # and their tolerances
    jbn.ema(0.99): 4e-6,
    jbn.ema(0.99999): 3e-5,
    jbn.ema(0.99999, debias=True): 3e-5,
    jbn.cumulative(): 1e-4,
    jbn.pooled(): 1e-4,
}


def batches():
    """Means and variances of the batches of five features."""
    rng = np.random.RandomState(0)
    noise = rng.normal(0, 1, STEPS)
    means = [
        np.full(STEPS, 100.0),
        100 + noise,
        100 + noise / 100,
        100 + rng.exponential(1.0, STEPS),
        np.where(np.arange(STEPS) < STEPS // 2, 100, 101) + noise / 10,
    ]
    variances = [
        np.full(STEPS, 2.0),
        rng.gamma(50, 1 / 25, STEPS),
        2 + noise / 1000,
        rng.exponential(2.0, STEPS),
        np.full(STEPS, 2.0),
    ]
    return np.float32(np.stack(means, 1)), np.float32(np.stack(variances, 1))


def exact(rule, means, variances):
    """Returns mean and variance after all batches, and the count."""
    means, variances = np.float64(means), np.float64(variances)
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


@pytest.mark.slow
def test_300_000_batches_leave_the_average_that_float64_has():
    means, variances = batches()
    for rule, tolerance in RULES.items():

        def step(running, batch, rule=rule):
            return rule(running, jbn.Moments(*batch, jnp.full(5, SAMPLES))), None

        run = jax.jit(lambda *all_batches, step=step: jax.lax.scan(step, jbn.init(5)[1], all_batches)[0])
        running = run(means, variances)
        mean, var, count = exact(rule, means, variances)
        assert_allclose(running.mean, mean, rtol=tolerance, err_msg=rule)
        # The spread between batches has the error of the mean, which is 100 times the standard deviation.
        rtol = 1e-3 if isinstance(rule, jbn.pooled) else tolerance
        assert_allclose(running.var, var, rtol=rtol, err_msg=rule)
        assert_allclose(running.count[1:], count, rtol=1e-3, err_msg=rule)


def test_an_average_near_its_limit_stays_there():
    rules = [jbn.ema(0.99999), jbn.ema(0.99999, debias=True), jbn.cumulative(), jbn.pooled()]

    @jax.jit
    def run(batch):
        def steps(rule):
            start = batch._replace(count=jnp.full(1, 1.0 if getattr(rule, "debias", False) else 1e6))
            return jax.lax.fori_loop(0, 10_000, lambda _, running: rule(running, batch), start)

        return list(map(steps, rules))

    for running in run(jbn.Moments(*np.float32([[100], [2], [8]]))):
        assert_array_equal([running.mean[0], running.var[0]], np.float32([100, 2]))


@pytest.mark.slow
def test_a_pooled_count_keeps_counting():
    features, batches = 4096, 64

    @jax.jit
    def run(power):
        def step(running, mean):
            size = jnp.full(features, 2.0 ** (power - 26))
            return jbn.pooled()(running, jbn.Moments(mean, jnp.ones(features), size)), None

        start = jbn.Moments(jnp.zeros(features), jnp.ones(features), jnp.full(features, 2.0**power))
        means = jax.random.normal(jax.random.key(0), (batches, features))
        return jax.lax.scan(step, start, means)[0].count

    # Each batch is a quarter, to an eighth, of the distance between neighbours: as many features count it.
    for power in 24.0, 25.0, 28.0, 32.0, 36.0, 40.0:
        added = np.float64(run(power)) - 2.0**power
        expected = batches * 2.0 ** (power - 26)
        assert_allclose(added.mean(), expected, rtol=0.05, err_msg=power)
        assert np.all((added >= 0) & (added < 3 * expected + 2.0 ** (power - 22))), power


def test_counts_are_exact_as_far_as_float32_is():
    batch = jbn.Moments(*np.ones((3, 1), np.float32))
    for rule in map(jax.jit, (jbn.pooled(), jbn.cumulative())):
        running = jbn.Moments(*np.float32([[0], [1], [2.0**24 - 3]]))
        for added in (1, 2, 3):
            running = rule(running, batch)
            assert_array_equal(running.count, 2.0**24 - 3 + added)


def test_one_sample_beside_many_weighs_its_share():
    counts = 2.0 ** np.arange(20, 41, 4)
    running = jbn.Moments(*np.float32([0 * counts, 0 * counts + 1, counts]))
    batch = jbn.Moments(*np.float32([0 * counts + 1e4, 0 * counts + 3, 0 * counts + 1]))
    w = 1 / (counts + 1)

    @jax.jit
    def merged(running, batch):
        return jbn.pooled()(running, batch), jbn.merge(running, batch), jbn.merge(batch, running)

    for new in merged(running, batch):
        assert_allclose(new.mean, w * 1e4, rtol=1e-6)
        assert_allclose(new.var, 1 + w * 2 + w * (1 - w) * 1e8, rtol=1e-6)


@pytest.mark.slow
def test_rounding_at_random_is_a_function_of_the_values():
    batch = jbn.Moments(*np.float32([[0.1] * 3, [0.7] * 3, [8] * 3]))
    running = jbn.Moments(*np.float32([[100] * 3, [2] * 3, [3e9] * 3]))
    for rule in (jbn.pooled(), jbn.cumulative(), jbn.ema(0.9999)):
        once, again, otherwise = (f(running, batch) for f in [jax.jit(rule)] * 2 + [jax.jit(rule)])
        jax.tree.map(assert_array_equal, once, again)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=3e-7), once, otherwise)
        for leaf in once:
            assert_array_equal(leaf, leaf[0])  # features alike stay alike


@pytest.mark.slow
def test_complex_means_are_averaged_part_by_part():
    batch = jbn.Moments(np.complex64([100 + 50j]), *np.float32([[2], [8]]))
    start = jbn.init(1, dtype=jnp.complex64)[1]
    step = lambda _, running: jbn.ema(0.9999)(running, batch)
    running = jax.jit(lambda start: jax.lax.fori_loop(0, 200_000, step, start))(start)
    assert_allclose(running.mean, batch.mean, rtol=1e-5)
