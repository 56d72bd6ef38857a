"""Each kind of norm, in Linen and in NNX, beside what it is in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import quick_jit
from flax import nnx
from numpy.testing import assert_allclose

import jbn
from train.config import Model
from train.norms import Norm

IMAGES = np.random.RandomState(0).normal(1, 2, (8, 3, 2, 6)).astype(np.float32)
VECTORS = np.random.RandomState(1).normal(1, 2, (8, 6)).astype(np.float32)
KINDS = ["none", "batch", "ghost", "flax", "layer", "group"]


def make(kind, **options):
    return Norm(Model(norm=kind, virtual_batch_size=4, norm_groups=2, **options), jbn.ema(0.75, debias=True))


def standardized(x, axis):
    return (x - x.mean(axis, keepdims=True)) / x.std(axis, keepdims=True)


def of_groups(x):
    groups = x.reshape(len(x), -1, 2, x.shape[-1] // 2)
    return standardized(groups, (1, 3)).reshape(x.shape)


def of_batch(x):
    return standardized(x, tuple(range(x.ndim - 1)))


EXPECTED = {
    "none": lambda x: x,
    "batch": of_batch,
    "ghost": lambda x: np.concatenate([of_batch(x[:4]), of_batch(x[4:])]),
    "flax": of_batch,
    "layer": lambda x: standardized(x, -1),
    "group": of_groups,
}


def in_linen(norm, x):
    """Returns what a new layer makes of `x` in training, its parameters and its new running statistics."""
    layer = norm.linen_layer(train=True)
    if not norm.adds_bias:
        return layer(x), {}, {}
    variables = layer.init(jax.random.key(0), x)
    y, updated = layer.apply(variables, x, mutable=["batch_stats"])
    return y, variables["params"], updated.get("batch_stats", {})


def in_nnx(norm, x):
    """Does the same in NNX."""
    layer = norm.nnx_layer(x.shape[-1], rngs=nnx.Rngs(0))
    y = layer(x)
    if not norm.adds_bias:
        return y, {}, {}
    return y, *(nnx.to_pure_dict(nnx.state(layer, kind)) for kind in (nnx.Param, nnx.BatchStat))


@pytest.mark.parametrize("run", [in_linen, in_nnx])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [IMAGES, VECTORS], ids=["images", "vectors"])
def test_each_kind_normalizes_over_what_it_says_and_then_scales_and_shifts(kind, x, run):
    y, params, _ = quick_jit(partial(run, make(kind)))(x)
    assert_allclose(y, EXPECTED[kind](np.float64(x)), atol=1e-4)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == ({} if kind == "none" else {"scale": (6,), "bias": (6,)})
    assert make(kind).adds_bias == ("bias" in shapes)


@pytest.mark.parametrize("run", [in_linen, in_nnx])
@pytest.mark.parametrize(
    "kind, weight, names",
    [("batch", 1, "mean var count"), ("ghost", 1, "mean var count"), ("flax", 0.25, "mean var")]
    + [("layer", 0, ""), ("group", 0, ""), ("none", 0, "")],
)
def test_running_statistics_are_those_of_the_whole_batch_by_the_rule_or_by_the_momentum(
    kind, weight, names, run
):
    _, _, stats = quick_jit(partial(run, make(kind, norm_momentum=0.75)))(IMAGES)
    assert set(stats) == set(names.split())
    if stats:
        over = IMAGES.reshape(-1, 6)
        assert_allclose(stats["mean"], weight * over.mean(0), rtol=1e-5, atol=1e-6)
        assert_allclose(stats["var"], 1 - weight + weight * over.var(0), rtol=1e-5)
    assert_allclose(stats.get("count", 0.25), 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_for_outputs_alone(kind):
    norm, x = make(kind, dtype="bfloat16"), jnp.asarray(VECTORS, jnp.bfloat16)
    for run in (in_linen, in_nnx):
        y, *variables = jax.eval_shape(partial(run, norm), x)
        assert y.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} <= {jnp.dtype("float32")}


def test_norms_of_the_same_options_are_equal_and_hash_alike():
    assert make("batch") == make("batch") and hash(make("batch")) == hash(make("batch"))
    assert len({make(kind) for kind in KINDS} | {make("batch", norm_momentum=0.5)}) == len(KINDS) + 1
