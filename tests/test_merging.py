import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jbn.merging import Part, merge_parts, merge_rows, ratio, where_counted


def add_up(values):
    return jnp.sum(values, 0, keepdims=True)


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
    x, zero = jnp.array([1.0, 2.0, 6.0]), jnp.zeros(1)
    whole = merge_parts(Part(x, zero, zero, None), jnp.array([3.0]), add_up)
    assert_allclose([whole.mean + whole.rest, whole.var], [[3], [14 / 3]], rtol=1e-6)


def test_ratio_of_nothing_is_0_and_uncounted_values_are_0():
    assert_array_equal(ratio(jnp.array([0.0, 6.0]), jnp.array([0.0, 3.0])), [0, 2])
    assert_array_equal(where_counted(jnp.array([jnp.nan, 5.0]), jnp.array([0.0, 0.5])), [0, 5])
    assert_array_equal(where_counted(jnp.array([5.0]), None), [5])
