"""Which axes of x a mask of fewer axes belongs to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

import jbn
import jbn.linen
import jbn.nnx
from tests.helpers import reference

REFUSED = [
    ((5, 5, 5), (5, 5), r"mask\[\.\.\., None\] for the first axes, mask.reshape\(1, 5, 5\) for the last"),
    ((5, 5, 5), (5,), r"mask\[\.\.\., None, None\] for the first axes, mask.reshape\(1, 1, 5\)"),
    ((7, 7), (7,), r"mask\[\.\.\., None\] for the first axes, mask.reshape\(1, 7\)"),
    ((5, 5, 3), (5, 1), r"mask\[\.\.\., None\] for the first axes, mask.reshape\(1, 5, 1\)"),
    ((4, 6, 3), (4, 6), r"does not broadcast.*its axes are the first ones: pass mask\[\.\.\., None\]"),
    ((4, 6, 3), (4,), r"does not broadcast.*pass mask\[\.\.\., None, None\]"),
    ((4, 6, 3), (2, 6), r"does not broadcast.*expected at most"),
    ((4, 3), (1, 4, 3), r"does not broadcast.*expected at most"),
]


def refused(mask, fix):
    return pytest.raises(ValueError, match=rf"mask of shape \({mask.shape[0]},.*{fix}")


def test_a_mask_that_could_belong_to_the_first_axes_is_refused():
    for shape, mask, fix in REFUSED:
        x, mask = jax.ShapeDtypeStruct(shape, jnp.float32), np.ones(mask, bool)
        for given in mask, jax.ShapeDtypeStruct(mask.shape, bool):
            with refused(mask, fix):
                if given is mask:
                    jax.eval_shape(lambda x, mask=mask: jbn.moments(x, mask=mask), x)
                else:
                    jax.eval_shape(lambda x, mask: jbn.moments(x, mask=mask), x, given)


def test_it_is_refused_wherever_it_is_given():
    x, mask = np.ones((5, 5, 5), np.float32), np.ones((5, 5), bool)
    linen_layer = jbn.linen.BatchNorm(use_running_average=False)
    nnx_layer = jbn.nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    for call in (
        lambda: jbn.batch_norm(x, None, jbn.init(5)[1], train=True, mask=mask),
        lambda: linen_layer.init_with_output(jax.random.key(0), x, mask=mask),
        lambda: nnx_layer(x, mask=mask),
    ):
        with refused(mask, REFUSED[0][2]):
            call()


def test_a_mask_of_fewer_axes_that_fits_one_way_belongs_to_the_last():
    rng = np.random.RandomState(0)
    measure = jax.jit(lambda x, mask: jbn.moments(x, mask=mask))
    for shape, fewer in ((4, 6, 3), (3,)), ((4, 6, 3), (6, 3)), ((5, 5, 5), ()), ((5, 5, 5), (1, 1)):
        x, mask = np.float32(rng.normal(3, 2, shape)), np.asarray(rng.rand(*fewer) < 0.6)
        # As to Flax and to NumPy.
        for leaf, expected in zip(measure(x, mask), reference.moments(x, mask=np.broadcast_to(mask, shape))):
            assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6, err_msg=(shape, fewer))
