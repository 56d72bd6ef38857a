"""What statistics over devices send, counted in compiled programs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn.linen
from benchmarks.devices import all_reduces
from jbn._merging import MOST_IN_ROWS


def test_many_features_on_many_devices_take_two_or_three_small_collectives():
    features = MOST_IN_ROWS // 8 + 1
    x = jnp.asarray(
        np.random.RandomState(0).normal(5, 1, (16, features)) + np.arange(16)[:, None], jnp.float32
    )
    mask = (np.arange(16) % 3 > 0)[:, None]
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    for counted in mask, None:
        f = jax.shard_map(
            lambda x, mask: jbn.moments(x, mask=mask, axis_name="i"),
            mesh=mesh,
            in_specs=(P("i"), None if counted is None else P("i")),
            out_specs=P(),
        )
        # Of their counts, if those may differ; of their means; and of what is left about the mean of these.
        assert collectives(f, x, counted) == ["all-reduce"] * (2 if counted is None else 3)
        for leaf, expected in zip(jax.jit(f)(x, counted), reference.moments(x, mask=counted)):
            assert_allclose(leaf, np.broadcast_to(expected, leaf.shape), rtol=1e-5)


@pytest.mark.parametrize(
    "flavour, rows, dtype", [("jbn", 32, "float32"), ("flax", 32, "float32"), ("jbn", 65536, "bfloat16")]
)
def test_a_sharded_batch_under_plain_jit_takes_one_collective_each_way(flavour, rows, dtype):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    sharded, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())
    norm = {"jbn": jbn.linen.BatchNorm, "flax": nn.BatchNorm}[flavour](use_running_average=False)
    x = jax.ShapeDtypeStruct((rows, 16), dtype, sharding=sharded)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf.update(sharding=whole), variables)

    def both(variables, x):
        f = lambda params, x: norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        y, backward, updated = jax.vjp(f, variables["params"], x, has_aux=True)
        return y, updated, backward(jnp.sin(y))

    for platform in ("cpu", "cuda", "tpu"):
        text = jax.jit(both).trace(variables, x).lower(lowering_platforms=(platform,)).compile().as_text()
        always = [in_branch for _, in_branch in all_reduces(text) if not in_branch]
        assert len(always) == 2, platform
