import jax.numpy as jnp
import pytest
from numpy.testing import assert_array_equal

from jbn._axes import expand, feature_axes, other_axes


@pytest.mark.parametrize(
    "axis, features, others",
    [
        (-1, (3,), (0, 1, 2)),
        (1, (1,), (0, 2, 3)),
        ((-1, 1), (1, 3), (0, 2)),
        ([2], (2,), (0, 1, 3)),
        ((), (), (0, 1, 2, 3)),
    ],
)
def test_feature_axes_are_sorted_and_the_others_are_reduced(axis, features, others):
    assert feature_axes(4, axis) == features
    assert other_axes(4, features) == others


def test_expand_lines_values_up_with_the_array():
    x, values = jnp.zeros((5, 2, 4, 3)), jnp.arange(6.0).reshape(2, 3)
    lined_up = x + jnp.broadcast_to(expand(values, 4, (1, 3)), x.shape)
    assert_array_equal(lined_up[4, :, 1], values)
