"""The running moments of a layer: what protects them, and training steps that are compiled."""

from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference
from tests.helpers.layers import layer, random

X = random((7, 3))
RULES = [
    jbn.ema(0.9),
    jbn.cumulative(),
    jbn.pooled(),
    lambda running, batch: batch,
    lambda running, batch: running._replace(mean=running.mean + 1),  # finite, whatever the batch is
]


def test_batch_that_is_not_finite_spares_the_running_moments_feature_by_feature():
    _, running = layer(3)
    news = jax.jit(lambda x: [jbn.batch_norm(x, None, running, train=True, update=rule)[1] for rule in RULES])
    clean = news(X)
    # NaN; infinity; a finite mean and a variance that overflows.
    for poison in ({2: np.nan}, {2: np.inf}, {2: 1e30, 3: -1e30}):
        x = np.array(X)
        for row, value in poison.items():
            x[row, :2] = value
        for new, expected in zip(news(x), clean):
            for leaf, old, wanted in zip(new, running, expected):
                assert_array_equal(leaf, [old[0], old[1], wanted[2]], err_msg=poison)


def test_running_moments_stay_finite_when_the_new_ones_would_not_be():
    # A variance of 1.6e5 is finite, and too large for a running variance in float16.
    running = jbn.Moments(*np.float16([[0, 0], [1, 1], [0, 0]]))
    update = jax.jit(lambda x: jbn.batch_norm(x, None, running, train=True, update=jbn.ema(0.5))[1])
    new = update(np.float32([[-400, 1], [400, 3]]))
    assert_allclose(new.mean, [0, 1])
    assert_allclose(new.var, [1, 1])
    assert_array_equal(new.count, [0, 1])


def test_count_keeps_its_own_dtype():
    running = jbn.Moments(jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16), np.full(3, 256, np.float32))
    new = jax.jit(lambda x: jbn.batch_norm(x, None, running, train=True)[1])(X)
    assert new.count.dtype == jnp.float32
    assert_array_equal(new.count, 257)


def test_update_may_be_any_function():
    _, running = layer(3)
    rule = lambda running, batch: batch._replace(var=batch.var + running.var)
    new = jax.jit(lambda x: jbn.batch_norm(x, None, running, train=True, update=rule)[1])(X)
    mean, var, count = reference.moments(X)
    for leaf, wanted in zip(new, (mean, var + 1, count)):
        assert_allclose(leaf, wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_scan_over_steps_keeps_the_dtypes_of_the_state(dtype):
    x, running = np.asarray(random((5, 16, 3))), jbn.Moments(*np.array([[0] * 3, [1] * 3, [0] * 3], dtype))

    @jax.jit
    def train(running, x, decays):
        def step(running, batch_and_decay):  # which may come from a schedule
            batch, decay = batch_and_decay
            y, running = jbn.batch_norm(batch, None, running, train=True, update=jbn.ema(decay))
            return running, y

        return jax.lax.scan(step, running, (x, decays))[0]

    new = train(running, x, np.full(5, 0.5, np.float32))
    weights = 0.5 * 0.5 ** np.arange(5)[::-1]
    assert_allclose(np.float32(new.mean), weights @ np.mean(x, 1), rtol=2e-2 if dtype == "float16" else 1e-5)
    assert [leaf.dtype for leaf in new] == [dtype] * 3
    new, mean = train(running, x, np.float32([0, 0.5, 0.9, 1, 1])), np.mean(x, 1)
    expected = 0.9 * (0.5 * mean[0] + 0.5 * mean[1]) + 0.1 * mean[2]
    assert_allclose(new.mean, expected, rtol=2e-2 if dtype == "float16" else 1e-5)


def test_traced_train_flag_is_the_static_one_and_compiles_once():
    params, running = layer(3)
    running = running._replace(mean=running.mean + 0.5)
    traces = []

    @jax.jit
    def step(train):
        traces.append(train)
        return jbn.batch_norm(X, params, running, train=train, update=jbn.ema(0.75))

    y, new = step(True)
    mean, var, _ = reference.moments(X)
    assert_allclose(y, reference.batch_norm(X, *params), atol=5e-6)
    assert_allclose(new.mean, 0.75 * 0.5 + 0.25 * mean, rtol=1e-5)
    assert_allclose(new.var, 0.75 + 0.25 * var, rtol=1e-5)
    y, new = step(False)
    assert_allclose(y, reference.normalize(X, *running[:2], *params), atol=5e-6)
    jax.tree.map(assert_array_equal, new, running)
    assert len(traces) == 1


def test_traced_inference_keeps_what_is_not_finite_to_its_own_sample():
    params, running = layer(3)
    x = np.array(X)
    x[2, 0], x[3, 1] = np.nan, np.inf
    f = jax.jit(jax.grad(lambda x, train: jnp.sum(jbn.batch_norm(x, params, running, train=train)[0] ** 2)))
    finite = np.isfinite(x)
    dy = 2 * reference.normalize(X, *running[:2], *params)
    expected = dy * np.float64(params.scale) / np.sqrt(np.float64(running.var) + 1e-5)
    assert_allclose(np.asarray(f(x, False))[finite], expected[finite], rtol=1e-5)


def test_steps_with_equal_options_trace_once():
    x, (params, running) = random((2, 7, 3)), layer(3)
    for options in (
        lambda: {},
        lambda: {"virtual_batch_size": 3},
        lambda: {"axis_name": "i", "axis_index_groups": [[0], [1]]},
    ):
        traces = []

        @partial(jax.jit, static_argnames="update")
        def step(x, mask, update, options=options, traces=traces):
            traces.append(update)
            rest = {"train": True, "update": update, **options()}
            f = lambda x, mask: jbn.batch_norm(x, params, running, mask=mask, **rest)
            return jax.vmap(f, axis_name="i")(x, mask)

        for i in range(3):
            step.trace(np.asarray(x) + i, np.arange(14).reshape(2, 7, 1) > i, update=jbn.ema(0.9))
        assert len(traces) == 1


def test_vmap_trains_an_ensemble_in_which_each_member_has_its_own_state():
    x = np.arange(1, 5, dtype=np.float32)[:, None, None] * np.asarray(random((4, 16, 3), seed=7))
    members = jax.tree.map(lambda leaf: np.stack([leaf + i for i in range(4)]), layer(3))
    step = jax.jit(jax.vmap(partial(jbn.batch_norm, train=True, update=jbn.ema(0.75))))
    y, running = jax.device_get(step(x, *members))
    for i in range(4):
        new, (params, old) = jax.tree.map(itemgetter(i), (running, members))
        mean, var, _ = reference.moments(x[i])
        assert_allclose(y[i], reference.batch_norm(x[i], *params), rtol=1e-5, atol=1e-5)
        assert_allclose(new.mean, 0.75 * old.mean + 0.25 * mean, rtol=1e-5)
        assert_allclose(new.var, 0.75 * old.var + 0.25 * var, rtol=1e-5)
        assert_array_equal(new.count, old.count + 1)
