"""Merging: its algebra, parts of any counts, and what the one formula makes of each kind of part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn._merging import Part, Reduction, Samples, merge_parts, merge_rows
from jbn._weights import ratio, where_counted
from tests.helpers import reference

merge, pool = jax.jit(jbn.merge), jax.jit(jbn.pooled())
measure = jax.jit(lambda x, mask: jbn.moments(x, mask=mask))

# The algebra, for any moments whatever: each feature is a case.

CASES = 10_000


def any_moments(seed):
    rng = np.random.RandomState(seed)
    mean = np.where(rng.rand(CASES) < 0.1, 0, rng.uniform(-100, 100, CASES))
    var = np.where(rng.rand(CASES) < 0.1, 0, rng.uniform(0, 100, CASES))
    count = np.where(rng.rand(CASES) < 0.2, 0, 10 ** rng.uniform(-0.3, 4, CASES))
    return jbn.Moments(*map(np.float32, (mean, var, count)))


def assert_same_where_counted(a, b):
    assert_allclose(a.count, b.count, rtol=1e-5)
    some = np.asarray(a.count) > 0
    assert_allclose(np.asarray(a.mean)[some], np.asarray(b.mean)[some], rtol=1e-4, atol=1e-2)
    assert_allclose(np.asarray(a.var)[some], np.asarray(b.var)[some], rtol=1e-3, atol=1e-1)


def test_merge_is_associative_and_commutative():
    a, b, c = map(any_moments, range(3))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert_same_where_counted(left, right)
    assert_same_where_counted(left, merge(a, b, c))
    assert_same_where_counted(merge(a, b), merge(b, a))


def test_merge_has_an_identity_whatever_the_empty_part_holds():
    a, b = any_moments(0), any_moments(1)
    some = a.count > 0
    for held in b.mean, np.full_like(b.mean, np.nan), np.full_like(b.mean, np.inf):
        empty = jbn.Moments(held, b.var, np.zeros_like(b.count))
        for merged in merge(a, empty), merge(empty, a):
            for new, old in zip(merged, a):
                assert_array_equal(np.asarray(new)[some], old[some])
            assert_array_equal(merged.count, a.count)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(
    part_of_row=st.lists(st.integers(0, 5), min_size=12, max_size=12),
    kind=st.sampled_from(["mask", "weights", "weights per feature"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_parts_merged_in_any_order_give_the_moments_of_the_whole(part_of_row, kind, seed, data):
    rng, part_of_row = np.random.RandomState(seed), np.array(part_of_row)
    weights = {
        "mask": np.float32(part_of_row < 5)[:, None] * np.ones(2),
        "weights": rng.gamma(1.0, size=(12, 1)) * np.ones(2),
        "weights per feature": rng.randint(0, 3, (12, 2)) * rng.rand(1, 2),
    }[kind]
    weights = np.float32(weights * (part_of_row < 5)[:, None])  # some rows belong to no part
    clean = rng.normal(3, 2, (12, 2)).astype(np.float32)
    x = np.where(weights > 0, clean, np.float32(np.nan))
    parts = [measure(x, weights * np.float32(part_of_row == part)[:, None]) for part in range(5)]
    while len(parts) > 1:
        order = data.draw(st.permutations(range(len(parts))))
        together = data.draw(st.integers(2, len(parts)))
        merged = merge(*(parts[i] for i in order[:together]))
        parts = [merged, *(parts[i] for i in order[together:])]
    for leaf, expected in zip(parts[0], reference.moments(clean, mask=weights)):
        assert_allclose(leaf, expected, rtol=1e-5, atol=1e-5)


def test_merge_computes_in_floating_point_whatever_it_is_given():
    # A scalar count holds for every feature; numbers and arrays of NumPy are moments too.
    halves = [jbn.Moments(np.array([value, 3]), np.array([1, 0]), 2) for value in (0, 1)]
    mean, var, count = jax.jit(lambda: jbn.merge(*halves))()
    assert_array_equal([mean, var, count], [[0.5, 3], [1.25, 0], [4, 4]])


# Parts of any counts weigh their share.

RATIOS = [1.0, 3.0, 1e3, 2.0**24, 2.0**25, 1e9, 2.0**40, 1e20, 1e37]


def assert_is(actual, expected, message=""):
    for leaf, wanted in zip(actual, expected):
        assert_allclose(leaf, wanted, rtol=1e-6, err_msg=message)


def merged_in_float64(parts):
    mean, var, count = (np.stack([np.float64(leaf) for leaf in leaves]) for leaves in zip(*parts))
    share = count / count.sum(0)
    whole = (share * mean).sum(0)
    return whole, (share * (var + (mean - whole) ** 2)).sum(0), count.sum(0)


def test_a_part_weighs_its_share_whatever_the_ratio_of_counts():
    small, ratios = map(np.ravel, np.meshgrid([1.0, 0.01, 1e-20], RATIOS))
    few = jbn.Moments(*(np.float32(0 * small + leaf) for leaf in (10.0, 2.0, small)))
    # A mean far below the other's is as exact as what remains of that.
    many = jbn.Moments(*(np.float32(0 * small + leaf) for leaf in (1e-3, 1.0, small * ratios)))
    for whole in merge(few, many), merge(many, few), pool(many, few):
        assert_is(whole, merged_in_float64([few, many]))


def test_many_parts_of_very_different_counts_are_merged_by_shares():
    rng = np.random.RandomState(0)
    counts = 10.0 ** np.array([0, -3, 5, 8, 2, -20, 9, 9])
    parts = [jbn.Moments(*np.float32([[rng.normal(3, 5)], [rng.rand()], [count]])) for count in counts]
    for given_parts in (parts, parts[::-1]):
        assert_is(merge(*given_parts), merged_in_float64(parts))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["devices", "vmap", "virtual batches"])
def test_samples_of_very_different_weights_are_merged_by_shares(way):
    # Each device, or pair of rows, has moments of its own.
    x = np.arange(8, dtype=np.float32)[:, None] * 3 + 1
    weights = np.float32([2.0**25, 2.0**25, 1, 1, 1e-3, 1e9, 1, 2])[:, None]
    over_axis = lambda x, w: jbn.moments(x, mask=w, axis_name="i")
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    mapped = {
        "devices": jax.shard_map(over_axis, mesh=mesh, in_specs=P("i"), out_specs=P()),
        "vmap": lambda x, w: jax.vmap(over_axis, axis_name="i", out_axes=None)(x[:, None], w[:, None]),
        "virtual batches": lambda x, w: jbn.batch_norm(
            x, None, jbn.init(1)[1], train=True, mask=w, virtual_batch_size=2, update=jbn.pooled()
        )[1],
    }[way]
    assert_is(jax.jit(mapped)(x, weights), reference.moments(x, mask=weights))


# What the one formula makes of each kind of part.


def test_a_mean_in_two_numbers_loses_nothing():
    # 1e6 has steps of 1/16 in float32: the second number holds what the first cannot.
    rest = np.float32([0.011, -0.017, 0.003])
    whole = jax.jit(merge_rows)(Part(np.full(3, 1e6, np.float32), rest, *np.float32([[1, 2, 3], [5, 1, 2]])))
    means, weights = np.float64(rest), np.array([5, 1, 2]) / 8
    mean = weights @ means
    assert_allclose(np.float64(whole.mean) - 1e6 + np.float64(whole.mean_low), mean, rtol=1e-5)
    assert_allclose(whole.var, weights @ (np.array([1, 2, 3]) + (means - mean) ** 2), rtol=1e-6)


def test_a_lone_part_comes_out_as_it_is():
    lone = np.float32([[0.1, 1e30, 1e-35], [0, 0, 0], [0.3, 7, 1e-30], [49, 49, 49]])
    empty = np.float32([[1e9] * 3, [0] * 3, [np.nan] * 3, [0] * 3])
    whole = jax.jit(merge_rows)(Part(*np.stack([lone, empty], 1)))
    assert_array_equal([whole.mean + whole.mean_low, whole.var, whole.count], lone[[0, 2, 3]])


def test_samples_are_parts_without_variance():
    of_rows = Reduction(lambda *values: [jnp.sum(value, 0, keepdims=True) for value in values])
    merged = jax.jit(lambda x, count: merge_parts(Samples(x, None), count, of_rows))
    whole = merged(np.float32([1, 2, 6]), np.float32([3]))
    assert_allclose([whole.mean + whole.mean_low, whole.var], [[3], [14 / 3]], rtol=1e-6)


def test_ratio_of_nothing_is_0_and_uncounted_values_are_0():
    assert_array_equal(ratio(jnp.array([0.0, 6.0]), jnp.array([0.0, 3.0])), [0, 2])
    assert_array_equal(where_counted(jnp.array([jnp.nan, 5.0]), jnp.array([0.0, 0.5])), [0, 5])
    assert_array_equal(where_counted(jnp.array([5.0]), None), [5])
