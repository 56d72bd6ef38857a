"""Norms are told from other layers by their parameters, in the structure that optax wants."""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import jbn.linen
import jbn.nnx

X = np.ones((4, 8), np.float32)


@pytest.fixture(autouse=True)
def _standard_promotion(standard_promotion):
    yield


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="norm")(x)
        x = nn.Dense(8, name="scale")(x)
        x = nn.WeightNorm(nn.Dense(8))(x)
        x = jbn.linen.BatchNorm(use_scale=False, use_running_average=False)(x)
        x = nn.BatchNorm(use_running_average=False, name="bias")(x)
        x = nn.InstanceNorm()(nn.GroupNorm(2)(nn.RMSNorm()(nn.LayerNorm()(x)))[:, None])[:, 0]
        x = Scaled(name="scaled")(x)
        options = dict(length=3, variable_axes={"params": 0}, split_rngs={"params": True})
        options["metadata_params"] = {nn.PARTITION_NAME: "layers"}
        return nn.scan(Layer, **options)()(x, None)[0]


class Scaled(nn.Module):
    """A scale beside a kernel, and one beside a layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="inner")(x * self.param("scale", nn.initializers.ones, (8,)))
        return x @ Beside(name="beside")()


class Beside(nn.Module):
    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.ones, (8, 8)) * self.param(
            "scale", nn.initializers.ones, ()
        )


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        norm = nn.LayerNorm(scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("model",)))
        return norm(nn.Dense(8, kernel_init=kernel_init)(x)), None


@pytest.fixture
def variables():
    return jax.eval_shape(Net().init, jax.random.key(0), X)


def test_scales_and_biases_of_norms_alone_are_true_whatever_their_rank_name_or_box(variables):
    params = variables["params"]
    mask = jbn.linen.batch_norm_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    found = {
        jax.tree_util.keystr(p, simple=True, separator="/"): m for p, m in jax.tree.leaves_with_path(mask)
    }
    norms = {path for path, is_norm in found.items() if is_norm}
    four = ("bias", "LayerNorm_0", "GroupNorm_0", "InstanceNorm_0")
    assert norms == {
        "BatchNorm_0/bias",
        *(f"{norm}/scale" for norm in four),
        *(f"{norm}/bias" for norm in four),
        "RMSNorm_0/scale",
        "scaled/inner/scale",
        "scaled/inner/bias",
        "ScanLayer_0/LayerNorm_0/scale/value",
        "ScanLayer_0/LayerNorm_0/bias",
    }
    assert {type(leaf) for leaf in found.values()} == {bool} and len(found) > len(norms) + 10
    assert jbn.linen.batch_norm_mask(freeze(params)) == freeze(mask)


def test_roots_and_empty_trees():
    scale, mask = np.ones(3), jbn.linen.batch_norm_mask
    assert mask(jbn.Params(scale, None)) == jbn.Params(True, None)
    assert mask({"scale": scale, "bias": scale}) == {"scale": True, "bias": True}
    assert mask({"kernel": scale, "bias": scale}) == {"kernel": False, "bias": False}
    assert mask([scale, {"bias": None}]) == [False, {"bias": None}]
    beside = {"scale": {"scale": scale, "bias": scale}, "bias": scale}
    assert mask(beside) == {"scale": {"scale": True, "bias": True}, "bias": False}
    assert (mask({}), mask({"a": {}}), mask(scale)) == ({}, {"a": {}}, False)
    assert mask({"dense": {"kernel": None, "bias": scale}}) == {"dense": {"kernel": None, "bias": False}}
    flat = {("dense", "kernel"): scale, ("dense", "bias"): scale, ("norm", "bias"): scale}
    assert list(mask(flat).values()) == [False, False, True]
    assert mask({"posterior": {"mean": scale, "var": scale}}) == {"posterior": {"mean": False, "var": False}}


@pytest.mark.slow
def test_running_statistics_are_refused(variables):
    with pytest.raises(ValueError, match=r"statistics of 'batch_stats/\w+'.*pass variables\[\"params\"\]"):
        jbn.linen.batch_norm_mask(variables)
    model = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"statistics of 'layers/0'.*nnx.state\(model, nnx.Param\)"):
        jbn.nnx.batch_norm_mask(nnx.state(model))


@pytest.mark.slow
def test_optax_decays_all_but_the_norms_and_trains_them_alone_in_linen_and_nnx():
    def is_decayed(params, mask):
        optimizer = optax.adamw(1.0, weight_decay=0.5, mask=mask)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        return jax.tree.leaves(jax.tree.map(lambda update: bool((update != 0).all()), updates))

    params = {
        "dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    }
    others = lambda params: jax.tree.map(operator.not_, jbn.linen.batch_norm_mask(params))
    assert is_decayed(params, others) == is_decayed(params, others(params)) == [True, True, False, False]
    assert is_decayed(params, jbn.linen.batch_norm_mask) == [False, False, True, True]

    # Optimizers for parts of the parameters do not see the others: a bias alone is still that of its layer.
    parts = optax.multi_transform(
        {name: optax.adamw(1.0, weight_decay=0.5, mask=others) for name in (1, 2)},
        jax.tree.map(jnp.ndim, params),
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = parts.update(zeros, parts.init(params), params)
    assert [bool(leaf.any()) for leaf in jax.tree.leaves(updates)] == [True, True, False, False]

    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    norms_alone = optax.multi_transform(
        {True: optax.sgd(1.0), False: optax.set_to_zero()}, jbn.nnx.batch_norm_mask
    )
    both = optax.chain(optax.masked(optax.scale(3.0), jbn.nnx.batch_norm_mask), norms_alone)
    optimizer = nnx.Optimizer(model, both, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    grads = jax.tree.map(jnp.ones_like, before)
    optimizer.update(model, grads)
    moved = jax.tree.map(lambda a, b: float((a - b).mean()), before, nnx.state(model, nnx.Param))
    assert jax.tree.leaves(moved) == [0, 0, 3, 3]
