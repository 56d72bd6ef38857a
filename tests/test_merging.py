import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn._merging import Part, Way, merge_parts, merge_rows, ratio, where_counted

OF_ROWS = Way(lambda *values: [jnp.sum(value, 0, keepdims=True) for value in values])


def test_a_mean_in_two_numbers_loses_nothing():
    # 1e6 has steps of 1/16 in float32: the second number holds what the first cannot.
    rest = jnp.array([0.011, -0.017, 0.003])
    parts = Part(jnp.full(3, 1e6), rest, jnp.array([1.0, 2.0, 3.0]), jnp.array([5.0, 1.0, 2.0]))
    whole = merge_rows(parts)
    means, weights = np.float64(rest), np.array([5, 1, 2]) / 8
    mean = weights @ means
    assert_allclose(np.float64(whole.mean) - 1e6 + np.float64(whole.rest), mean, rtol=1e-5)
    assert_allclose(whole.var, weights @ (np.array([1, 2, 3]) + (means - mean) ** 2), rtol=1e-6)


@pytest.mark.parametrize("mean, rest, var", [(0.1, 0.0, 0.3), (1e30, 0.0, 7.0), (1e-35, 0.0, 1e-30)])
def test_a_lone_part_comes_out_as_it_is(mean, rest, var):
    empty = 1e9, 0.0, np.nan, 0.0
    parts = Part(*(jnp.array(column) for column in zip((mean, rest, var, 49.0), empty)))
    whole = merge_rows(parts)
    assert_array_equal([whole.mean + whole.rest, whole.var, whole.count], np.float32([mean, var, 49]))


def test_samples_are_parts_without_variance():
    x = jnp.array([1.0, 2.0, 6.0])
    whole = merge_parts(Part(x, None, None, None), jnp.array([3.0]), OF_ROWS)
    assert_allclose([whole.mean + whole.rest, whole.var], [[3], [14 / 3]], rtol=1e-6)


def test_ratio_of_nothing_is_0_and_uncounted_values_are_0():
    assert_array_equal(ratio(jnp.array([0.0, 6.0]), jnp.array([0.0, 3.0])), [0, 2])
    assert_array_equal(where_counted(jnp.array([jnp.nan, 5.0]), jnp.array([0.0, 0.5])), [0, 5])
    assert_array_equal(where_counted(jnp.array([5.0]), None), [5])


RATIOS = [1.0, 3.0, 1e3, 2.0**24, 2.0**25, 1e9, 2.0**40, 1e20, 1e37]


def merged_in_float64(parts):
    mean, var, count = (np.stack([np.float64(leaf) for leaf in leaves]) for leaves in zip(*parts))
    share = count / count.sum(0)
    whole = (share * mean).sum(0)
    return whole, (share * (var + (mean - whole) ** 2)).sum(0), count.sum(0)


def moments(mean, var, count):
    return jbn.Moments(*(jnp.array([value], jnp.float32) for value in (mean, var, count)))


@pytest.mark.parametrize("small", [1.0, 0.01, 1e-20])
def test_a_part_weighs_its_share_whatever_the_ratio_of_counts(small):
    for ratio_of_counts in RATIOS:
        few, many = moments(10.0, 2.0, small), moments(1e-3, 1.0, small * ratio_of_counts)
        mean, var, count = merged_in_float64([few, many])
        for whole in (jbn.merge(few, many), jbn.merge(many, few), jbn.pooled()(many, few)):
            # A mean far below the other's is as exact as what remains of that.
            assert_allclose(whole.mean, mean, rtol=1e-6, err_msg=ratio_of_counts)
            assert_allclose(whole.var, var, rtol=1e-6, err_msg=ratio_of_counts)
            assert_allclose(whole.count, count, rtol=1e-6)


def test_many_parts_of_very_different_counts_are_merged_by_shares():
    rng = np.random.RandomState(0)
    counts = 10.0 ** np.array([0, -3, 5, 8, 2, -20, 9, 9])
    parts = [moments(rng.normal(3, 5), rng.rand(), count) for count in counts]
    for given in (parts, parts[::-1]):
        whole = jbn.merge(*given)
        for leaf, wanted in zip(whole, merged_in_float64(parts)):
            assert_allclose(leaf, wanted, rtol=1e-6)


def test_devices_of_very_different_counts_are_merged_by_shares():
    # Each device has one row of weight 2^25 or 1, so that its moments are those of the row.
    x = jnp.arange(8.0)[:, None] * 3 + 1
    weights = np.float32([2.0**25, 1, 1, 2.0**25, 1e-3, 1e9, 1, 2])[:, None]
    mean, var, count = reference.moments(x, mask=weights)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    f = lambda x, w: jbn.moments(x, mask=w, axis_name="i")
    on_devices = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P()))
    in_vmap = lambda x, w: jax.tree.map(
        lambda leaf: leaf[0], jax.vmap(f, axis_name="i")(x[:, None], w[:, None])
    )
    for measure in (on_devices, in_vmap):
        for leaf, wanted in zip(measure(x, jnp.asarray(weights)), (mean, var, count)):
            assert_allclose(leaf, wanted, rtol=1e-6)


def test_virtual_batches_of_very_different_counts_are_merged_by_shares():
    x = jnp.arange(8.0)[:, None] * 3 + 1
    weights = np.float32([2.0**25, 2.0**25, 1, 1, 1e-3, 1e-3, 2, 2])[:, None]
    _, new = jbn.batch_norm(
        x, None, jbn.init(1)[1], train=True, mask=weights, virtual_batch_size=2, update=jbn.pooled()
    )
    for leaf, wanted in zip(new, reference.moments(x, mask=weights)):
        assert_allclose(leaf, wanted, rtol=1e-6)
