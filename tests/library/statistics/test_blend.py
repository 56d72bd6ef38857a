"""Running moments blended with a batch's, against the formula in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers.layers import random

RUNNING = jbn.Moments(*np.float32([[0, 1, 2], [1, 2, 3], [5, 5, 5]]))
BATCH = jbn.Moments(*np.float32([[4, 5, 6], [3, 2, 1], [16, 8, 0]]))


def formula(running, batch, prior, between=True):
    n, prior = (np.broadcast_to(np.float64(value), 3) for value in (batch.count, prior))
    w, d = n / (prior + n), np.float64(batch.mean) - running.mean
    spread = w * (1 - w) * d**2 if between else 0
    return running.mean + w * d, (1 - w) * running.var + w * batch.var + spread, prior + n


@pytest.mark.parametrize("prior", [16, 0.5, 1e-30, 1e38, np.float32([1, 2, 3])], ids=str)
def test_a_batch_counts_for_its_samples_and_the_running_moments_for_the_prior(prior):
    for between in True, False:
        wanted = formula(RUNNING, BATCH, prior, between)
        blend = partial(jbn.blend, RUNNING, BATCH, between=between)
        for blended in blend(prior=prior), jax.jit(lambda prior, f=blend: f(prior=prior))(prior):
            for leaf, expected in zip(blended, wanted):
                assert leaf.dtype == jnp.float32
                assert_allclose(leaf, expected, rtol=1e-5)
            assert [leaf[2] for leaf in blended[:2]] == [2, 3]  # of no samples


def test_without_a_prior_it_is_the_batch_where_that_has_samples():
    for between in True, False:
        blended = jbn.blend(RUNNING, BATCH, prior=0, between=between)
        assert_array_equal(blended.mean, [4, 5, 2])
        assert_array_equal(blended.var, [3, 2, 3])


def test_what_a_batch_without_samples_holds_does_not_count():
    empty = BATCH._replace(mean=np.float32([4, 5, np.nan]), var=np.float32([3, 2, np.nan]))
    for between in True, False:
        expected = jbn.blend(RUNNING, BATCH, prior=16, between=between)
        jax.tree.map(assert_array_equal, jbn.blend(RUNNING, empty, prior=16, between=between), expected)


def test_counts_whose_sum_overflows_keep_their_ratio():
    one, three = (jbn.Moments(*np.float32([[4] * 3, [var] * 3, [3e38] * 3])) for var in (1, 3))
    for between in True, False:
        assert_allclose(jbn.blend(one, three, prior=3e38, between=between).var, 2, rtol=1e-6)


def test_one_count_is_that_of_every_feature_and_that_of_the_running_moments_is_not_used():
    for count in np.float32(7), np.full(3, np.nan, np.float32):
        blended = jbn.blend(RUNNING._replace(count=count), BATCH._replace(count=16), prior=16)
        assert_array_equal(blended.mean, [2, 3, 4])


def test_it_is_the_moments_of_both_sets_of_samples_where_the_prior_is_a_number_of_them():
    x = random((40, 3), mean=5)
    whole = jbn.moments(x)
    blended = jbn.blend(jbn.moments(x[:10]), jbn.moments(x[10:]), prior=10)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), blended, whole)


def test_complex_moments_and_float64(x64):
    running = jbn.Moments(np.complex128([1j, 2, 3]), np.float64([1, 2, 3]))
    batch = BATCH._replace(mean=np.complex128([1, 2j, 3]))
    blended = jax.jit(partial(jbn.blend, prior=np.float64(4)))(running, batch)
    n = np.float64(batch.count)
    w, d = n / (4 + n), batch.mean - running.mean
    assert_allclose(blended.mean, running.mean + w * d, rtol=1e-12)
    var = (1 - w) * running.var + w * batch.var + w * (1 - w) * np.abs(d) ** 2
    assert_allclose(blended.var, var, rtol=1e-12)


@pytest.mark.slow
def test_gradients_flow_to_both_and_to_the_prior(x64):
    running, batch = jax.tree.map(np.float64, (RUNNING, BATCH))
    for between in True, False:

        def loss(mean, var, batch_mean, batch_var, prior, blend, between=between):
            ours, theirs = jbn.Moments(mean, var), jbn.Moments(batch_mean, batch_var, batch.count)
            blended = blend(ours, theirs, prior, between)
            return jnp.sum(blended[0] ** 3 + jnp.sin(blended[1]))

        def plain(running, batch, prior, between):
            w, d = batch.count / (prior + batch.count), batch.mean - running.mean
            spread = w * (1 - w) * d**2 if between else 0.0
            return running.mean + w * d, (1 - w) * running.var + w * batch.var + spread

        ours = lambda running, batch, prior, between: jbn.blend(running, batch, prior=prior, between=between)
        arguments = running.mean, running.var, batch.mean, batch.var, np.float64(3)
        derive = jax.jit(jax.grad(loss, range(5)), static_argnums=5)
        actual, wanted = derive(*arguments, ours), derive(*arguments, plain)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-9, atol=1e-12), actual, wanted)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(prior=-1), ValueError, "prior=-1; expected a finite number of samples >= 0"),
        (dict(prior=np.inf), ValueError, "prior=inf; expected a finite"),
        (dict(prior=np.nan), ValueError, "prior=nan; expected a finite"),
        (dict(prior="16"), TypeError, "prior='16'; expected a number of samples"),
        (dict(prior=None), TypeError, "prior=None; expected a number of samples"),
        (dict(prior=np.ones(5)), ValueError, r"prior has shape \(5,\); expected \(3,\) or a number"),
        (dict(batch=BATCH._replace(mean=np.ones(2))), ValueError, r"batch.mean has shape \(2,\); expected"),
        (dict(batch=tuple(BATCH)), TypeError, "batch is a tuple; expected jbn.Moments"),
        (dict(running=(0, 1)), TypeError, "running is a tuple; expected jbn.Moments"),
    ],
)
def test_errors_name_what_was_given_and_what_was_expected(changes, error, message):
    given = dict(running=RUNNING, batch=BATCH, prior=16) | changes
    with pytest.raises(error, match=message):
        jbn.blend(given["running"], given["batch"], prior=given["prior"])
