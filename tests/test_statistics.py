from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import jbn

SHAPE = (6, 4, 5, 3)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6, "float64": 1e-14, "complex64": 2e-6}


def samples(shape=SHAPE, dtype="float32", mean=3.0, sd=2.0, seed=0):
    rng = np.random.RandomState(seed)
    x = rng.normal(mean, sd, shape)
    if dtype.startswith("complex"):
        x = x + 1j * rng.normal(-mean, sd / 2, shape)
    return jnp.asarray(x, dtype)


def masks(shape=SHAPE):
    rng = np.random.RandomState(1)
    return {
        "no mask": None,
        "rows": jnp.asarray(rng.rand(shape[0], 1, 1, 1) < 0.6),
        "positions, per feature": jnp.asarray(rng.rand(*shape) < 0.6),
        "features": jnp.asarray([True, False, True]),
        "weights": jnp.asarray(rng.gamma(1.0, size=(shape[0], shape[1], 1, 1)), jnp.float32),
        "integers": jnp.asarray(rng.randint(0, 4, shape)),
    }


def assert_moments(actual, expected, tolerance):
    for name, leaf, wanted in zip(("mean", "var", "count"), actual, expected):
        assert_allclose(leaf, wanted, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    "dtype, axis, mask",
    [
        *(("float32", axis, mask) for axis in (-1, 1, (1, -1), (3, 1), ()) for mask in masks()),
        *((dtype, -1, mask) for dtype in ("bfloat16", "float64", "complex64") for mask in masks()),
    ],
)
def test_moments_are_those_of_float64_for_any_axis_mask_and_dtype(dtype, axis, mask):
    with jax.enable_x64(dtype == "float64"):
        x, mask = samples(dtype=dtype), masks()[mask]
        actual = jax.jit(lambda x, mask: jbn.moments(x, axis=axis, mask=mask))(x, mask)
        assert_moments(actual, reference.moments(x, axis, mask), TOLERANCE[dtype])
        real = jnp.float64 if dtype == "float64" else jnp.float32
        assert [leaf.dtype for leaf in actual] == [
            jnp.complex64 if dtype == "complex64" else real,
            real,
            real,
        ]


def test_worked_example_means_and_biased_variances():
    x = jnp.array([[0.23, 1.26, -2.41], [0.56, 0.75, 1.00]])
    mean, var, count = jbn.moments(x)
    assert_allclose(mean, [0.395, 1.005, -0.705], rtol=1e-6)
    assert_allclose(var, [0.027225, 0.065025, 2.907025], rtol=1e-5)
    assert_array_equal(count, [2, 2, 2])


@pytest.mark.parametrize("mean, sd", [(1e4, 1.0), (1e6, 1.0), (100.0, 1e-3)])
def test_large_mean_costs_no_accuracy(mean, sd):
    x = samples((4096, 3), mean=mean, sd=sd)
    actual, expected = jbn.moments(x), reference.moments(x)
    # float32 has steps of this size near the mean, which bounds what any float32 result can do.
    step = np.spacing(np.float32(mean))
    assert_allclose(actual.mean, expected[0], atol=4 * step)
    assert_allclose(actual.var, expected[1], rtol=1e-5, atol=16 * step**2)


def test_uncounted_rows_cost_nothing_where_the_mean_squared_overflows():
    mean, var, _ = jbn.moments(jnp.full((5, 2), 2.0**100), mask=jnp.arange(5)[:, None] < 4)
    assert_array_equal(mean, 2.0**100)
    assert_array_equal(var, 0)


def test_constant_feature_has_variance_zero():
    assert_array_equal(jbn.moments(jnp.full((7, 2), 1234.5)).var, [0, 0])


def test_integer_weights_equal_repeated_rows():
    x, repeats = samples((5, 3)), np.array([2, 0, 1, 3, 1])
    assert_moments(
        jbn.moments(x, mask=jnp.asarray(repeats)[:, None]), jbn.moments(jnp.repeat(x, repeats, axis=0)), 1e-6
    )


@pytest.mark.parametrize("held", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mask", [np.array([1, 1, 0, 1, 1], bool), np.array([1, 1, 0, 2, 1], np.float32)])
def test_uncounted_rows_may_hold_anything_in_value_and_gradient(mask, held):
    x, mask = samples((5, 3)), mask[:, None]
    poisoned = x.at[2].set(held)

    def loss(x):
        mean, var, _ = jbn.moments(x, mask=mask)
        return jnp.sum(jnp.sin(mean) + var**2)

    gradient = jax.jit(jax.grad(loss))
    assert_moments(jbn.moments(poisoned, mask=mask), reference.moments(x, mask=mask), 1e-6)
    # The two ways to measure, in one pass and in two, lose some roundings each.
    assert_allclose(gradient(poisoned), gradient(x), rtol=1e-5)
    assert_array_equal(gradient(poisoned)[2], 0)


@pytest.mark.parametrize("x, mask", [(jnp.ones((4, 3)), jnp.zeros((4, 1), bool)), (jnp.ones((0, 3)), None)])
def test_no_samples_give_the_identity_of_merge(x, mask):
    empty, other = jbn.moments(x, mask=mask), jbn.moments(samples((5, 3)))
    assert_moments(empty, [np.zeros(3)] * 3, 0)
    for merged in jbn.merge(empty, other), jbn.merge(other, empty):
        assert_moments(merged, other, 0)


def test_gradient_of_moments_is_that_of_the_plain_formula(x64):
    x, w = samples((7, 3), "float64"), jnp.asarray(np.random.RandomState(2).rand(7, 3))

    def plain(x):
        mean = jnp.sum(w * x, 0) / jnp.sum(w, 0)
        return jnp.sum(jnp.sin(mean) + jnp.sum(w * (x - mean[None]) ** 2, 0) / jnp.sum(w, 0))

    def ours(x):
        mean, var, _ = jbn.moments(x, mask=w)
        return jnp.sum(jnp.sin(mean) + var)

    for derive, atol in (jax.grad, 0), (jax.hessian, 1e-15):
        assert_allclose(jax.jit(derive(ours))(x), jax.jit(derive(plain))(x), rtol=1e-11, atol=atol)


def test_mask_carries_no_gradient():
    x, w = samples((5, 3)), jnp.full((5, 3), 0.5)
    assert_array_equal(jax.grad(lambda w: jnp.sum(jbn.moments(x, mask=w).var))(w), 0)


# The algebra of merge, for any moments whatever.

floats = partial(st.floats, width=32, allow_subnormal=False)  # XLA takes subnormal numbers for 0
counts = st.one_of(st.just(0.0), floats(0.5, 1e4))
one_feature = st.tuples(floats(-100, 100), floats(0, 100), counts)
any_moments = st.lists(one_feature, min_size=2, max_size=2).map(
    lambda rows: jbn.Moments(*(jnp.asarray(column, jnp.float32) for column in zip(*rows)))
)


merge = jax.jit(jbn.merge)


def assert_same_where_counted(a, b):
    assert_allclose(a.count, b.count, rtol=1e-5)
    some = np.asarray(a.count) > 0
    assert_allclose(np.asarray(a.mean)[some], np.asarray(b.mean)[some], rtol=1e-4, atol=1e-2)
    assert_allclose(np.asarray(a.var)[some], np.asarray(b.var)[some], rtol=1e-3, atol=1e-1)


@settings(deadline=None)
@given(any_moments, any_moments, any_moments)
def test_merge_is_associative(a, b, c):
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert_same_where_counted(left, right)
    assert_same_where_counted(left, merge(a, b, c))


@settings(deadline=None)
@given(any_moments, any_moments)
def test_merge_is_commutative(a, b):
    assert_same_where_counted(merge(a, b), merge(b, a))


@settings(deadline=None)
@given(any_moments, any_moments)
def test_merge_has_an_identity_whatever_the_empty_part_holds(a, b):
    for garbage in b.mean, jnp.full(2, np.nan), jnp.full(2, np.inf):
        empty = jbn.Moments(garbage, b.var, jnp.zeros(2))
        for merged in merge(a, empty), merge(empty, a):
            some = np.asarray(a.count) > 0
            for new, old in zip(merged, a):
                assert_array_equal(np.asarray(new)[some], np.asarray(old)[some])
            assert_array_equal(merged.count, a.count)


@settings(deadline=None, max_examples=50)
@given(
    part_of_row=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    kind=st.sampled_from(["no mask", "mask", "weights", "weights per feature"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_parts_merged_in_any_order_give_the_moments_of_the_whole(part_of_row, kind, seed, data):
    rng, part_of_row = np.random.RandomState(seed), np.array(part_of_row)
    weights = {
        "no mask": np.ones((len(part_of_row), 1)),
        "mask": rng.rand(len(part_of_row), 1) < 0.7,
        "weights": rng.gamma(1.0, size=(len(part_of_row), 1)),
        "weights per feature": rng.randint(0, 3, (len(part_of_row), 2)) * rng.rand(1, 2),
    }[kind].astype(np.float32)
    clean = samples((len(part_of_row), 2), seed=seed)
    x = jnp.where(weights > 0, clean, np.nan)
    measure = jax.jit(lambda x, mask: jbn.moments(x, mask=mask))
    parts = [measure(x, weights * (part_of_row == part)[:, None]) for part in range(5)]
    while len(parts) > 1:
        order = data.draw(st.permutations(range(len(parts))))
        together = data.draw(st.integers(2, len(parts)))
        merged = merge(*(parts[i] for i in order[:together]))
        parts = [merged, *(parts[i] for i in order[together:])]
    assert_moments(parts[0], reference.moments(clean, mask=weights), 1e-5)


def test_merge_takes_a_scalar_count_for_every_feature():
    x = samples((8, 3))
    parts = [jbn.moments(part)._replace(count=4.0) for part in (x[:4], x[4:])]
    assert_moments(jbn.merge(*parts), jbn.moments(x), 1e-6)


def test_merge_computes_in_floating_point_whatever_it_is_given():
    halves = [jbn.Moments(np.array([value]), np.array([1]), np.array([2])) for value in (0, 1)]
    mean, var, count = jbn.merge(*halves)
    assert (mean, var, count) == (0.5, 1.25, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: jbn.moments(x, axis=2), ValueError, r"axis=2 is out of range for x with 2 dim.*-2 to 1"),
        (lambda x: jbn.moments(x, axis=(1, -1)), ValueError, r"axis=\(1, -1\) names a feature axis twice"),
        (lambda x: jbn.moments(x, axis=0.5), TypeError, "axis=0.5; wanted an integer"),
        (lambda x: jbn.moments(x.astype(int)), TypeError, r"x has dtype int32; wanted a floating.*astype"),
        (
            lambda x: jbn.moments(x, mask=jnp.ones(4)),
            ValueError,
            r"mask of shape \(4,\) does not broadcast to x",
        ),
        (
            lambda x: jbn.moments(x, mask=jnp.ones((1, 4, 3))),
            ValueError,
            r"mask of shape \(1, 4, 3\) does not",
        ),
        (
            lambda x: jbn.moments(x, mask=-jnp.ones((4, 3))),
            ValueError,
            "mask holds a weight that is negative",
        ),
        (
            lambda x: jbn.moments(x, mask=jnp.full((4, 1), np.nan)),
            ValueError,
            "mask holds a weight .* not finite",
        ),
        (lambda x: jbn.moments(x, mask=x.astype(jnp.complex64)), TypeError, "mask has dtype complex64"),
        (lambda x: jbn.merge(), ValueError, "merge got no moments"),
        (lambda x: jbn.merge([jbn.moments(x)]), TypeError, "merge got a list; wanted jbn.Moments"),
        (
            lambda x: jbn.merge(jbn.moments(x), jbn.moments(x[:, :2])),
            ValueError,
            r"merge got means of shapes \(3,\) and \(2,\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((4, 3)))
