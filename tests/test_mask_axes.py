"""Which axes of x a mask of fewer axes belongs to."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

import jbn
import jbn.linen
import jbn.nnx

RNG = np.random.RandomState(0)


@pytest.mark.parametrize(
    "shape, mask, fix",
    [
        ((5, 5, 5), (5, 5), r"mask\[\.\.\., None\] for the first axes, mask.reshape\(1, 5, 5\) for the last"),
        ((5, 5, 5), (5,), r"mask\[\.\.\., None, None\] for the first axes, mask.reshape\(1, 1, 5\)"),
        ((7, 7), (7,), r"mask\[\.\.\., None\] for the first axes, mask.reshape\(1, 7\)"),
        ((5, 5, 3), (5, 1), r"mask\[\.\.\., None\] for the first axes, mask.reshape\(1, 5, 1\)"),
        ((4, 6, 3), (4, 6), r"does not broadcast.*its first axes are those of x: pass mask\[\.\.\., None\]"),
        ((4, 6, 3), (4,), r"does not broadcast.*pass mask\[\.\.\., None, None\]"),
        ((4, 6, 3), (2, 6), r"does not broadcast.*give it one value for each position"),
    ],
)
def test_a_mask_that_could_belong_to_the_first_axes_is_refused(shape, mask, fix):
    x, mask, features = jnp.ones(shape), np.ones(mask, bool), shape[-1]
    linen_layer, nnx_layer = nn_layer(), jbn.nnx.BatchNorm(features, rngs=nnx.Rngs(0))
    calls = [
        lambda: jbn.moments(x, mask=mask),
        lambda: jbn.batch_norm(x, None, jbn.init(features)[1], train=True, mask=mask),
        lambda: linen_layer.init_with_output(jax.random.key(0), x, mask=mask),
        lambda: nnx_layer(x, mask=mask),
        jax.jit(lambda: jbn.moments(x, mask=jnp.asarray(mask))),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"mask of shape \({mask.shape[0]},.*{fix}"):
            call()


def nn_layer():
    return jbn.linen.BatchNorm(use_running_average=False)


@pytest.mark.parametrize(
    "shape, mask",
    [((4, 6, 3), (3,)), ((4, 6, 3), (6, 3)), ((5, 5, 5), ()), ((5, 5, 5), (1, 1)), ((4, 3), (3,))],
)
def test_a_mask_of_fewer_axes_that_fits_one_way_means_what_it_means_to_flax(shape, mask):
    x = jnp.asarray(RNG.normal(3, 2, shape), jnp.float32)
    mask = np.asarray(RNG.rand(*mask) < 0.6) if mask != (3,) else np.array([True, False, True])
    flax = nn.BatchNorm(use_running_average=False, momentum=0.0, use_fast_variance=False)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = flax.init_with_output(jax.random.key(0), x, mask=mask)[1]
        _, theirs = flax.apply(theirs, x, mask=np.broadcast_to(mask, shape), mutable=["batch_stats"])
    actual = jbn.moments(x, mask=mask)
    counted = actual.count > 0
    for name in ("mean", "var"):
        expected = np.where(counted, theirs["batch_stats"][name], 0)
        assert_allclose(getattr(actual, name), expected, rtol=1e-5, atol=1e-6)
