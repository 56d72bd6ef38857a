"""The README's table of what is exact: what it says of jbn and of Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jbn.linen
import jbn.nnx
from tests.helpers import reference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
LAYERS = jbn.linen.BatchNorm, nn.BatchNorm


def train(kind, x, mask=None, **options):
    """Return outputs and new running statistics, which with momentum 0 are the batch's."""
    layer = kind(use_running_average=False, momentum=0.0, **options)
    variables = {
        "params": {"scale": jnp.ones(x.shape[-1]), "bias": jnp.zeros(x.shape[-1])},
        "batch_stats": {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])},
    }
    y, updated = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, updated["batch_stats"]


def error(y, x):
    return np.abs(np.float64(y) - reference.batch_norm(x)).max()


def batch(mean, sd, seed=0):
    return np.float32(mean + sd * np.random.RandomState(seed).normal(size=(4096, 32)))


def test_a_large_mean():
    x = batch(1e4, 1)
    ours, flax = (error(jax.jit(lambda x, kind=kind: train(kind, x)[0])(x), x) for kind in LAYERS)
    two_passes = error(train(nn.BatchNorm, x, use_fast_variance=False)[0], x)
    assert ours < 6e-4 < two_passes < 2e-3 and flax > 1000


@pytest.mark.parametrize("counted, of_flax", [(2, 2.71), (0, np.nan)])
def test_devices_of_unequal_counts(counted, of_flax):
    low, high = (1.31, 1.31) if counted == 0 else (0.376667, 5.043333)
    x = np.float32([low] * 8 + [high] * 8)[:, None]
    mask = np.r_[np.ones(8, bool), np.arange(8) < counted][:, None]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for kind, expected in zip(LAYERS, (1.31, of_flax)):
        shared = lambda x, mask, kind=kind: train(kind, x, mask, axis_name="data")[1]["mean"]
        mean = jax.shard_map(shared, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
        np.testing.assert_allclose(jax.jit(mean)(x, mask), expected, rtol=1e-3)


def test_nan_behind_a_mask_and_in_a_batch():
    x = batch(0, 1)[:16]
    x[10:, 3] = np.nan
    mask = (np.arange(16) < 10)[:, None]
    for kind, spared in zip(LAYERS, (True, False)):
        loss = lambda x, kind=kind: jnp.sum(train(kind, x, mask)[0] ** 3, where=mask)
        assert np.isfinite(jax.grad(loss)(x)).all() == spared
        _, stats = train(kind, x)
        assert np.isfinite(stats["mean"]).all() == spared


def test_weights_in_a_mask():
    x, weights = batch(0, 1)[:16], np.float32(np.random.RandomState(1).uniform(0.1, 2, (16, 1)))
    weighted, plain = np.average(x, 0, weights[:, 0]), x.mean(0)
    for kind, expected, scales in (LAYERS[0], weighted, (1, 1e-35, 5e37)), (LAYERS[1], plain, (1,)):
        for scale in scales:
            _, stats = train(kind, x, weights * np.float32(scale))
            np.testing.assert_allclose(stats["mean"], expected, rtol=1e-4, atol=1e-6)


def test_bfloat16_results_of_a_module_of_nnx():
    x = batch(10, 0.1)
    ours, flax = (
        error(kind(32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x).astype(jnp.float32), x)
        for kind in (jbn.nnx.BatchNorm, nnx.BatchNorm)
    )
    assert ours < 0.016 and flax > 0.3
