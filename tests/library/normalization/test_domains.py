"""Domains: a batch of several kinds of examples is a batch of each kind, normalized by itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn._domains import as_domain
from tests.helpers import reference
from tests.helpers.layers import random

DOMAINS, FEATURES = 4, 3
INDEX = np.array([0, 2, 0, 0, 2, 3, 3, 0, 2, 2, 3])  # domain 1 is absent
PRESENT = (0, 2, 3)
GAMMA = np.random.RandomState(4).gamma(1.0, size=len(INDEX))
# Shapes and feature axes; the examples' axis is the first that is none of them.
BATCHES = {
    "vectors": ((11, 3), -1),
    "images": ((11, 4, 2, 3), -1),
    "channels first": ((3, 11, 5), 0),
    "two feature axes": ((3, 11, 2, 1), (0, -1)),
}


def state(shape=(FEATURES,), dtype=np.float32, by_domain=False):
    """Return parameters, and running moments that differ from domain to domain."""
    rng = np.random.RandomState(1)
    params = jbn.Params(*rng.gamma(3.0, size=(2, *(DOMAINS,) * by_domain, *shape)).astype(dtype))
    return params, jbn.Moments(*rng.gamma(3.0, size=(3, DOMAINS, *shape)).astype(dtype))


def train(x, params, running, index, f=jbn.batch_norm, **options):
    return f(x, params, running, **dict(train=True, update=jbn.ema(0.5), domain=index) | options)


def examples_of(domain, x, axis=0, index=INDEX):
    return None if x is None else np.compress(np.asarray(index) == domain, x, axis)


def of_domain(domain, params, running):
    own = lambda leaf: leaf[domain] if leaf.ndim == running.mean.ndim else leaf
    return jax.tree.map(own, params), jax.tree.map(lambda leaf: leaf[domain], running)


# Values


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "batch", ["vectors", *(pytest.param(batch, marks=slow) for batch in list(BATCHES)[1:])]
)
def test_each_example_is_normalized_with_the_moments_of_its_domain_and_updates_them(batch):
    shape, axis = BATCHES[batch]
    x = random(shape)
    axes = sorted(a % x.ndim for a in np.atleast_1d(axis))
    examples = next(a for a in range(x.ndim) if a not in axes)
    mask = np.expand_dims(GAMMA, [a for a in range(x.ndim) if a != examples])
    f = jax.jit(partial(train, axis=axis))
    weights_of_any_size = [np.float32(mask * 1e-35), np.float32(mask * 1e37)]
    for by_domain, masks in (False, [None, *weights_of_any_size]), (True, [mask > 0.5]):
        params, running = state(tuple(shape[a] for a in axes), by_domain=by_domain)
        for weights in masks:
            y, new = f(x, params, running, INDEX, mask=weights)
            for domain in PRESENT:
                own = partial(examples_of, domain, axis=examples)
                p, old = of_domain(domain, params, running)
                w = own(None if weights is None else weights if weights.dtype == bool else mask)
                wanted = reference.batch_norm(own(x), *p, axis=axis, mask=w)
                assert_allclose(own(y), wanted, rtol=1e-4, atol=1e-4)
                mean, var, _ = reference.moments(own(x), axis, w)
                assert_allclose(new.mean[domain], (old.mean + mean) / 2, rtol=1e-5)
                assert_allclose(new.var[domain], (old.var + var) / 2, rtol=1e-5)
            jax.tree.map(lambda a, b: assert_array_equal(a[1], b[1]), new, running)


def test_inference_picks_the_moments_by_index_and_changes_nothing():
    x = random((11, 3))
    for by_domain in False, True:
        params, running = state(by_domain=by_domain)
        y, new = jax.jit(partial(train, train=False))(x, params, running, INDEX)
        for domain in PRESENT:
            p, own = of_domain(domain, params, running)
            wanted = reference.normalize(examples_of(domain, x), own.mean, own.var, *p)
            assert_allclose(examples_of(domain, y), wanted, rtol=1e-5, atol=1e-5)
        jax.tree.map(assert_array_equal, new, running)


@pytest.mark.slow
def test_one_index_for_all_is_a_call_of_that_domain():
    x, (params, running) = random((11, 2, 3)), state(by_domain=True)
    f = jax.jit(train)
    for domain in 1, np.uint8(3), jnp.asarray(0, jnp.int32):
        y, new = f(x, params, running, domain)
        own, old = of_domain(int(domain), params, running)
        wanted, updated = jbn.batch_norm(x, own, old, train=True, update=jbn.ema(0.5))
        assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
        for leaf, before, after in zip(new, running, updated):
            assert_allclose(leaf[int(domain)], after, rtol=1e-6)
            assert_array_equal(np.delete(leaf, int(domain), 0), np.delete(before, int(domain), 0))


@slow
def test_moments_are_exact_where_the_mean_is_large():
    for mean in 1e4, 1e6:
        x, (params, running) = random((11, 50, 3), mean=mean), state()
        new = jax.jit(partial(train, update=jbn.ema(0)))(x, params, running, INDEX)[1]
        for domain in PRESENT:
            of_domain = reference.moments(examples_of(domain, x))
            assert_allclose(new.var[domain], of_domain[1], rtol=2e-5)
            assert_allclose(new.mean[domain], of_domain[0], rtol=1e-7)


@slow
@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "float64"])
def test_dtypes(dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    x, (params, running) = (
        random((11, 4, 3), dtype),
        state(dtype=np.float64 if dtype == "float64" else np.float32),
    )
    if dtype == "complex64":
        running = running._replace(mean=running.mean.astype(dtype))
    y, new = jax.jit(train)(x, params, running, INDEX)
    assert (y.dtype, new.mean.dtype) == (x.dtype, running.mean.dtype)
    exact = np.asarray(x, np.complex128 if dtype == "complex64" else np.float64)
    tolerance = 10 * float(jnp.finfo(dtype).eps) if dtype != "float64" else 1e-12
    for domain in PRESENT:
        wanted = reference.batch_norm(examples_of(domain, exact), *params)
        actual = np.asarray(examples_of(domain, np.asarray(y, exact.dtype)))
        assert_allclose(actual, wanted, rtol=max(tolerance, 1e-5 * (dtype != "float64")), atol=10 * tolerance)


@slow
def test_an_index_of_few_bits_reaches_all_that_it_can():
    x, index = random((6, 3)), np.uint8([255, 255, 0, 0, 255, 0])
    for domains in 256, 300:
        assert as_domain(index, x, (1,), domains).dtype == jnp.int32
        running = jbn.init((domains, 3))[1]
        new = jax.jit(partial(train, update=jbn.pooled()))(x, None, running, index)[1]
        assert_array_equal(np.flatnonzero(new.count[:, 0]), [0, 255])
        assert_allclose(new.mean[255], x[index == 255].mean(0), rtol=1e-5)
    running = jbn.init((200, 3))[1]  # 200 is no int8
    y, _ = jax.jit(partial(train, train=False))(x, None, running, np.int8([127, -1, 0, -128, 0, 1]))
    assert_array_equal(np.isnan(y).all(1), [False, True, False, True, False, False])


@slow
def test_what_is_not_finite_stays_in_its_domain_and_feature_and_what_is_masked_reaches_nothing():
    x, (params, running) = np.asarray(random((11, 2, 3))), state()
    f = jax.jit(train)
    y, new = f(x, params, running, INDEX)
    mask = np.arange(11)[:, None, None] != 1
    outputs = lambda x: jnp.where(mask, train(x, params, running, INDEX, mask=mask)[0], 0)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(outputs(x) ** 3)))
    for value in np.nan, np.inf:
        spoilt = x.copy()
        spoilt[1, 0, 1] = value  # domain 2, feature 1
        actual, kept = f(spoilt, params, running, INDEX)
        hit = (INDEX == 2)[:, None, None] & (np.arange(3) == 1)
        assert_allclose(np.where(hit, 0, actual), np.where(hit, 0, y), rtol=1e-5)
        is_hit = (np.arange(4) == 2)[:, None] & (np.arange(3) == 1)
        for after, before, old in zip(kept, new, running):
            assert_allclose(after, np.where(is_hit, old, before), rtol=1e-5)
        assert np.isfinite(gradient(spoilt)).all()
        others = np.delete(np.arange(11), 1)
        assert_allclose(gradient(spoilt)[others], gradient(x)[others], rtol=1e-4, atol=1e-3)


@slow
def test_a_domain_whose_examples_are_all_masked_keeps_its_moments():
    x, (params, running) = random((11, 3)), state()
    y, new = train(x, params, running, INDEX, mask=(INDEX != 2)[:, None])
    assert np.isfinite(y).all()
    jax.tree.map(lambda a, b: assert_array_equal(a[2], b[2]), new, running)


@pytest.mark.parametrize(
    "options",
    [
        dict(update=jbn.ema(0.9, debias=True)),
        dict(update=jbn.ema(0.9, unbiased=True)),
        dict(update=jbn.cumulative()),
        dict(update=jbn.pooled()),
        dict(update=jbn.keep()),
        dict(f=jbn.batch_renorm, r_max=1.5, d_max=0.5),
        dict(f=jbn.batch_renorm, update=jbn.pooled()),
        dict(epsilon=0.1, exact=False),
        dict(dtype=jnp.float16),
    ],
)
def test_options_are_those_of_a_call_for_each_domain(options):
    x, (params, _) = random((11, 2, 3)), state()
    _, running = jbn.init((DOMAINS, FEATURES))
    apply = options.get("f", jbn.batch_norm)
    separate = {name: value for name, value in options.items() if name != "f"}

    def both(x, params, running):
        mixed = running
        for _ in range(2):
            y, mixed = train(x, params, mixed, INDEX, **options)
        alone = {}
        for domain in PRESENT:
            own = jbn.init(FEATURES)[1]
            for _ in range(2):
                rows = x[np.flatnonzero(domain == INDEX)]
                its_y, own = apply(rows, params, own, **dict(train=True, update=jbn.ema(0.5)) | separate)
            alone[domain] = its_y, own
        return y, mixed, alone

    y, mixed, alone = jax.jit(both)(x, params, running)
    tolerance = 2e-3 if y.dtype == jnp.float16 else 2e-5
    for domain, (its_y, own) in alone.items():
        assert_allclose(examples_of(domain, y), its_y, rtol=tolerance, atol=tolerance)
        for leaf, its_own in zip(mixed, own):
            assert_allclose(leaf[domain], its_own, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: assert_array_equal(a[1], b[1]), mixed, running)


@slow
def test_ghost_batches_have_moments_of_their_own_for_each_domain():
    x, (params, running) = random((11, 2, 3)), state()
    for mask in None, np.float32(GAMMA[:, None, None]):
        y, new = jax.jit(partial(train, virtual_batch_size=4))(x, params, running, INDEX, mask=mask)
        for part in np.array_split(np.arange(11), 3):
            for domain in np.unique(INDEX[part]):
                own = part[INDEX[part] == domain]
                w = None if mask is None else mask[own]
                assert_allclose(y[own], reference.batch_norm(x[own], *params, mask=w), atol=1e-4)
        whole = train(x, params, running, INDEX, mask=mask)[1]
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), new, whole)


@slow
def test_ghost_batches_are_cut_along_the_axis_of_the_examples():
    x, running = random((3, 11, 2)), jbn.init((DOMAINS, FEATURES))[1]
    y, _ = jax.jit(partial(train, axis=0, virtual_batch_size=6))(x, None, running, INDEX)
    for part in np.array_split(np.arange(11), 2):
        for domain in np.unique(INDEX[part]):
            own = part[INDEX[part] == domain]
            assert_allclose(y[:, own], reference.batch_norm(x[:, own], axis=0), atol=1e-4)


def test_traced_mode_and_conditional_scale():
    x, (params, running) = random((11, 2, 3)), state()
    scales = np.float32(1 + np.arange(11)[:, None, None] * np.ones(3))
    given = params._replace(scale=scales)
    f = jax.jit(lambda flag: train(x, given, running, INDEX, train=flag))
    for flag in True, False:
        y, new = f(flag)
        plain = jbn.Params(None, None)
        wanted, wanted_new = train(x, plain, running, INDEX, train=flag)
        assert_allclose(y, np.asarray(wanted) * scales + params.bias, rtol=1e-5, atol=1e-5)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6), new, wanted_new)


def test_scale_of_as_many_rows_as_domains_is_by_domain_even_if_there_are_as_many_examples():
    x, index = random((4, 2, 3))[:, 0], np.array([3, 2, 1, 0])
    params, running = state(by_domain=True)
    y, _ = train(x, params, running, index, train=False)
    wanted = np.zeros(x.shape)
    for row, domain in enumerate(index):
        (scale, bias), own = of_domain(domain, params, running)
        wanted[row] = reference.normalize(x[row : row + 1], own.mean, own.var, scale, bias)[0]
    assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


# Derivatives


@pytest.mark.parametrize("batch", ["vectors", "images"])
def test_gradients_are_those_of_float64_and_of_a_shared_scale_the_sum_over_domains(batch):
    x = random(BATCHES[batch][0])
    target = np.float32(np.random.RandomState(5).normal(0, 1, x.shape))
    zeros = jax.tree.map(np.zeros_like, state()[1])
    mask = np.expand_dims(np.float32(GAMMA), tuple(range(1, x.ndim)))
    for by_domain, weights in (False, None), (True, mask):
        params, running = state(by_domain=by_domain)
        given = None if weights is None else weights * np.float32(1e35)
        f = partial(train, running=running, index=INDEX, mask=given)
        dx, dparams = jax.jit(lambda *args, f=f: jax.vjp(f, *args)[1]((target, zeros)))(x, params)
        sums = [np.zeros(running.mean.shape) for _ in params]
        for domain in PRESENT:
            own = partial(examples_of, domain)
            (scale, _), _ = of_domain(domain, params, running)
            wanted = reference.gradients(own(x), own(target), scale, mask=own(weights))
            assert_allclose(own(dx), wanted[0], rtol=1e-4, atol=1e-5)
            for total, part in zip(sums, wanted[1:]):
                total[domain] = part
        for leaf, total in zip(dparams, sums):
            assert_allclose(leaf, total if by_domain else total.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_derivative_is_that_of_a_call_for_each_domain(x64):
    x, v = np.float64(random((11, 3))), np.random.RandomState(6).normal(size=(11, 3))
    params, running = state(dtype=np.float64)
    sets = [np.flatnonzero(domain == INDEX) for domain in PRESENT]

    def mixed(x):
        return jnp.sum(train(x, params, running, INDEX)[0] ** 3)

    def separate(x):
        alone = lambda rows: jbn.batch_norm(x[rows], params, jbn.init(3)[1], train=True)[0]
        return sum(jnp.sum(alone(rows) ** 3) for rows in sets)

    def derivatives(f):
        gradient = jax.grad(jax.checkpoint(f))
        return jax.jvp(f, (x,), (v,)), jax.jvp(gradient, (x,), (v,)), jax.vmap(gradient)(np.stack([x, v]))

    actual, wanted = jax.jit(lambda: (derivatives(mixed), derivatives(separate)))()
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-8, atol=1e-8), actual, wanted)


@slow
def test_members_of_a_vmap_have_indices_of_their_own_and_scan_carries_the_state():
    x, (params, running) = random((2, 11, 3)), state()
    indices = np.stack([INDEX, INDEX[::-1]])
    y, new = jax.jit(jax.vmap(train, (0, None, None, 0)))(x, params, running, indices)
    for i in range(2):
        wanted_y, wanted = train(x[i], params, running, indices[i])
        assert_allclose(y[i], wanted_y, rtol=1e-5, atol=1e-5)
        for leaf, own in zip(new, wanted):
            assert_allclose(leaf[i], own, rtol=1e-5)

    def step(running, batch):
        y, running = train(batch[0], params, running, batch[1])
        return running, y

    last, _ = jax.jit(lambda *batches: jax.lax.scan(step, running, batches))(x, indices)
    wanted = train(x[1], params, train(x[0], params, running, indices[0])[1], indices[1])[1]
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), last, wanted)


@slow
def test_members_of_nested_vmaps_differ():
    x, (params, running) = random((2, 2, 11, 5, 3)), state()
    indices = np.stack([np.roll(INDEX, shift) for shift in range(4)]).reshape(2, 2, 11)
    both = jax.jit(jax.vmap(jax.vmap(train, (0, None, None, 0)), (0, None, None, 0)))
    y, _ = both(x, params, running, indices)
    for i in np.ndindex(2, 2):
        assert_allclose(y[i], train(x[i], params, running, indices[i])[0], rtol=1e-5, atol=1e-5)


# Errors


def test_an_index_out_of_range_is_an_error_or_if_traced_makes_nan_of_its_examples_alone():
    x, (params, running) = random((11, 3)), state()
    y, new = jax.jit(train)(x, params, running, INDEX)
    for wrong in -1, DOMAINS:
        index = np.where(np.arange(11) == 5, wrong, INDEX)
        with pytest.raises(
            ValueError, match=rf"domain holds indices from {index.min()} to {index.max()}; expected 0 to 3"
        ):
            train(x, params, running, index)
        actual, kept = jax.jit(train)(x, params, running, index)
        assert_array_equal(np.isnan(actual).all(1), np.arange(11) == 5)
        others = (INDEX != 3)[:, None]
        assert_array_equal(np.where(others, actual, 0), np.where(others, y, 0))
        jax.tree.map(lambda a, b: assert_array_equal(a[:3], b[:3]), kept, new)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(index=INDEX * 1.0), TypeError, "domain has dtype float64; expected integers from 0 to 3"),
        (dict(index=INDEX > 1), TypeError, "domain has dtype bool; expected integers"),
        (dict(index=INDEX[:5]), ValueError, r"domain has shape \(5,\); expected \(\) or \(11,\)"),
        (
            dict(x=random((11, 5, 3)), index=INDEX[:5]),  # of positions
            ValueError,
            r"domain has shape \(5,\); expected \(\) or \(11,\)",
        ),
        (
            dict(running=jbn.init(3)[1]),
            ValueError,
            r"running.mean has shape \(3,\); expected a leading axis of",
        ),
        (dict(running="none"), TypeError, "running is a str; expected jbn.Moments"),
        (dict(index=None), ValueError, r"running.mean has shape \(4, 3\); expected \(3,\)"),
        (
            dict(running=jbn.init((4, 5))[1]),
            ValueError,
            r"running.mean has shape \(4, 5\); expected \(4, 3\)",
        ),
        (dict(params=jbn.init((2, 3))[0]), ValueError, r"params.scale has shape \(2, 3\); expected \(4, 3\)"),
    ],
    ids=str,
)
def test_errors_name_what_was_given_and_what_was_expected(changes, error, message):
    params, running = state()
    with pytest.raises(error, match=message):
        train(**dict(x=random((11, 3)), params=params, running=running, index=INDEX) | changes)
