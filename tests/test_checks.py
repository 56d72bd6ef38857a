import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jbn._checks import as_samples, as_weights

X = jnp.zeros((4, 2, 3))


@pytest.mark.parametrize("x", [np.ones(2, np.float32), 1.5, jnp.ones(2, jnp.bfloat16)])
def test_samples_may_be_any_array_of_floating_point(x):
    assert_array_equal(as_samples(x), x)


@pytest.mark.parametrize(
    "shape, wanted", [((), (1, 1, 1)), ((3,), (1, 1, 3)), ((4, 1, 1), (4, 1, 1)), ((2, 1), (1, 2, 1))]
)
def test_weights_line_up_with_the_samples_from_the_right(shape, wanted):
    assert as_weights(np.ones(shape), X).shape == wanted


def test_weights_that_jit_hides_are_not_looked_at():
    assert_array_equal(jax.jit(lambda mask: as_weights(mask, X))(-jnp.ones(3)), -np.ones((1, 1, 3)))
    with pytest.raises(ValueError, match="mask holds a weight that is negative"):
        jax.jit(lambda: as_weights(-np.ones(3), X))()
