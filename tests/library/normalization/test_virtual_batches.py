"""Virtual batches: each part of a batch by its own moments, the running moments by those of all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from tests.helpers import reference

EXAMPLES = 10
MASKS = {
    "no mask": None,
    "rows": np.array([1, 1, 1, 0, 1, 0, 1, 1, 0, 1], bool)[:, None, None],
    "weights": np.random.RandomState(4).gamma(1.0, size=(EXAMPLES, 5, 3)),
    "features": np.array([1, 0, 2.0]),
}
SIZES = {1: [1] * 10, 3: [3, 3, 2, 2], 4: [4, 3, 3], 5: [5, 5], 9: [5, 5], 10: [10], 99: [10]}
SCALE, BIAS = (np.random.RandomState(seed).normal(1, 0.3, 3) for seed in (1, 2))
RUNNING = jbn.Moments(*np.float64([[0] * 3, [1] * 3, [0] * 3]))


def random(shape, mean=3.0, sd=2.0, seed=0):
    return np.random.RandomState(seed).normal(mean, sd, shape)


def in_float32(*trees):
    return jax.tree.map(np.float32, trees)


def parts_of(x, mask, size):
    """Splits as the sizes say, which differ by one at most."""
    cuts = np.cumsum(SIZES[size])[:-1]
    mask = np.broadcast_to(1 if mask is None else mask, x.shape)
    return list(zip(np.split(x, cuts), np.split(mask, cuts)))


def at_once(x, mask, params, running, size, rule=lambda running, batch: batch):
    return jbn.batch_norm(x, params, running, train=True, mask=mask, update=rule, virtual_batch_size=size)


def one_after_the_other(x, mask, params, running, size):
    batches = [jbn.moments(part, mask=weights) for part, weights in parts_of(x, mask, size)]
    y = [jbn.normalize(part, m, params) for (part, _), m in zip(parts_of(x, mask, size), batches)]
    return jnp.concatenate(y), jbn.merge(*batches)


@partial(jax.jit, static_argnums=4)
def gradients(x, mask, params, target, size):
    """Returns those of sum(y * target), and y with the batch's moments."""

    def loss(x, params):
        y, batch = at_once(x, mask, params, RUNNING, size)
        return jnp.sum(y * target), (y, batch)

    return jax.grad(loss, (0, 1), has_aux=True)(x, params)


def assert_close(actual, expected, tolerance):
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


@pytest.mark.parametrize(
    "size, mask",
    [
        (3, "no mask"),
        *(pytest.param(3, mask, marks=pytest.mark.slow) for mask in ("weights", "features")),
        pytest.param(5, "rows", marks=pytest.mark.slow),
    ],
)
def test_each_part_is_normalized_by_its_own_moments(x64, size, mask):
    x, mask, params = random((EXAMPLES, 5, 3)), MASKS[mask], jbn.Params(SCALE, BIAS)
    target = random(x.shape, 0, 1, 5)
    (dx, dparams), (y, batch) = gradients(x, mask, params, target, size)
    parts = [(*part, dy) for part, (dy, _) in zip(parts_of(x, mask, size), parts_of(target, None, size))]
    expected = np.concatenate([reference.batch_norm(part, *params, mask=m) for part, m, _ in parts])
    assert_close(y, expected, 1e-11)
    of_parts = [reference.gradients(part, dy, SCALE, mask=m) for part, m, dy in parts]
    expected_dx, *expected = zip(*of_parts)
    assert_close(dx, np.concatenate(expected_dx), 1e-11)
    assert_close(tuple(dparams), tuple(map(sum, expected)), 1e-11)
    mean, var, count = reference.moments(x, mask=mask)  # with the spread between the parts
    var = np.where(count > 0, var, RUNNING.var)
    assert_close(tuple(batch), (mean, var, count), 1e-11)


def test_sizes_differ_by_one_at_most_and_padding_counts_for_nothing():
    x, params = in_float32(random((EXAMPLES, 3)), jbn.Params(SCALE, BIAS))
    for size in 4, 9, 10:
        y, batch = jax.jit(partial(at_once, size=size))(x, None, params, jbn.init(3)[1])
        expected = [reference.batch_norm(part, *params) for part, _ in parts_of(x, None, size)]
        assert_allclose(y, np.concatenate(expected), atol=2e-5, err_msg=size)
        assert_array_equal(batch.count, EXAMPLES)
        assert_allclose(batch.var, np.var(x, 0), rtol=1e-5, err_msg=size)


def test_running_moments_absorb_the_merge_of_all_parts():
    x, running = in_float32(random((EXAMPLES, 3)), RUNNING)
    mean, var, count = reference.moments(x)
    rule = jbn.ema(0.75, unbiased=True)
    _, new = jax.jit(partial(at_once, size=3, rule=rule))(x, None, None, running)
    bessel = EXAMPLES / (EXAMPLES - 1)
    assert_close(tuple(new), (0.25 * mean, 0.75 + 0.25 * var * bessel, count / EXAMPLES), 1e-5)


@pytest.mark.slow
def test_examples_are_counted_by_the_first_axis_that_is_no_feature_axis():
    for axis, shape, batch_axis in ((0, 2), (2, 10, 3, 4), 1), (1, (10, 3, 4), 0):
        x = np.float32(random(shape))
        features = [shape[a] for a in np.atleast_1d(axis)]
        params, running = jbn.init(features)
        f = partial(jbn.batch_norm, train=True, axis=axis, virtual_batch_size=4)
        y, _ = jax.jit(f)(x, params, running)
        parts = np.array_split(x, 3, batch_axis)
        expected = np.concatenate([reference.batch_norm(part, axis=axis) for part in parts], batch_axis)
        assert_allclose(y, expected, atol=2e-5, err_msg=axis)


def test_part_without_samples_and_part_with_nan_harm_nobody_else():
    x, params, running = in_float32(random((EXAMPLES, 3)), jbn.Params(SCALE, BIAS), RUNNING)
    f = jax.jit(partial(at_once, size=5, rule=jbn.ema(0.5)))
    first = np.arange(EXAMPLES)[:, None] < 5
    y, new = f(np.where(first, np.float32(np.nan), x), np.float32(~first), params, running)
    assert np.isfinite(y).all()
    mean, var, _ = reference.moments(x[5:])
    assert_close(tuple(new), (mean / 2, 0.5 + var / 2, np.ones(3)), 1e-5)

    x[0, 0] = np.nan
    y, new = jax.device_get(f(x, np.ones_like(first, np.float32), params, running))
    assert_array_equal(np.isnan(y[:, 0]), [True] * 5 + [False] * 5)
    assert_array_equal(new.mean[0], running.mean[0])
    assert np.all(new.mean[1:] != running.mean[1:])


@pytest.mark.slow
def test_nothing_to_normalize_is_no_error():
    for shape in (4, 0, 3), (0, 3):
        f = lambda x: jbn.batch_norm(x, *jbn.init(x.shape[-1]), train=True, virtual_batch_size=2)
        y, new = jax.jit(f)(np.ones(shape, np.float32))
        assert y.shape == shape
        assert_array_equal(new.count, 0)


def test_no_effect_in_inference():
    x, params, running = in_float32(random((EXAMPLES, 3)), jbn.Params(SCALE, BIAS), RUNNING)
    f = lambda train: jbn.batch_norm(x, params, running, train=train, virtual_batch_size=4)
    for y, new in jax.jit(lambda: f(False))(), jax.jit(f)(False):
        assert_close(y, reference.normalize(x, *running[:2], *params), 1e-5)
        jax.tree.map(assert_array_equal, new, running)


@pytest.mark.slow
def test_derivatives_go_through_parts(x64):
    x, params, target = random((EXAMPLES, 3)), jbn.Params(SCALE, BIAS), random((EXAMPLES, 3), 0, 1, 5)

    def derived(f):
        def loss(scale, shift):
            y, _ = f(x + jnp.sin(x) * shift[None], None, params._replace(scale=scale), RUNNING, 3)
            return jnp.sum(jnp.sin(y) * target)

        return jax.jit(lambda *args: jax.jvp(jax.grad(loss, (0, 1)), args, args))(*params)

    assert_close(derived(at_once), derived(one_after_the_other), 1e-9)


def test_backward_pass_keeps_x_in_its_own_dtype():
    x, (params, running) = jax.ShapeDtypeStruct((250, 4, 3), jnp.bfloat16), jbn.init(3)
    f = lambda x, params: at_once(x, None, params, running, 16)[0]
    kept = jax.tree.leaves(jax.eval_shape(jax.jit(lambda x, params: jax.vjp(f, x, params)[1]), x, params))
    padded = 16 * 16 * 4 * 3 * 2  # 250 examples in 16 parts of 15 or 16
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) <= padded + 16 * 16 + 16 * 8 * 3 * 4
