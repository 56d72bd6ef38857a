"""Samples, layers and masks that the tests train with, and ways to spread a batch over devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn

MASKS = {
    "no mask": None,
    "Boolean": np.array([1, 1, 0, 1, 1, 0, 1], bool)[:, None],
    "weights, per feature": np.random.RandomState(4).gamma(1.0, size=(7, 3)),
}


def random(shape, dtype="float32", mean=3.0, sd=2.0, seed=0):
    rng = np.random.RandomState(seed)
    x = rng.normal(mean, sd, shape)
    return jnp.asarray(x + 1j * rng.normal(mean, sd, shape) if dtype.startswith("complex") else x, dtype)


def layer(features, dtype="float32"):
    params = jbn.Params(random(features, dtype, 1.0, 0.3, seed=1), random(features, dtype, 0.0, 1.0, seed=2))
    return params, jbn.init(features, dtype=dtype)[1]


def train(x, mask, params, running, **options):
    return jbn.batch_norm(x, params, running, train=True, mask=mask, update=jbn.ema(0.5), **options)


def on_devices(f, names, check_vma=True, out_specs=None):
    """Maps `f(x, mask, params, running)` over shards of `x` and `mask`, on 4 x 2 devices named a and b."""
    spec = P(names)
    return jax.shard_map(
        f,
        mesh=jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2),
        in_specs=(spec, spec, P(), P()),
        out_specs=(spec, P()) if out_specs is None else out_specs,
        check_vma=check_vma,
    )


def per_example(maps, over=None):
    """Trains on one example, or on one position of one, in `vmap`s of the names `maps`, innermost last."""

    def f(x, mask, params, running):
        one = lambda x, mask: train(x, mask, params, running, axis_name=over or maps)
        for name in maps:
            one = jax.vmap(one, (0, None if mask is None else 0), (0, None), axis_name=name)
        return one(x, mask)

    return f


# Ways to train a layer on one batch, which all are `train`.
WAYS = {
    "shard_map, one axis": on_devices(partial(train, axis_name="a"), "a"),
    "shard_map, two axes": on_devices(partial(train, axis_name=["a", "b"]), ("a", "b")),
    "shard_map, unchecked": on_devices(partial(train, axis_name="b"), "b", check_vma=False),
    "vmap per example": per_example(["i"]),
    "vmap per position": per_example(["j", "i"]),
    "vmap in shard_map": on_devices(per_example(["i"], over=("i", "a")), "a", check_vma=False),
}
