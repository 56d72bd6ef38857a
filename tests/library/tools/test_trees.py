"""Statistics of several models, merged: those of all their data together."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from numpy.testing import assert_allclose, assert_array_equal

import jbn

RNG = np.random.RandomState(0)
SIZES = (5, 1, 40)
DATA = [RNG.normal(RNG.normal(0, 3, 3), RNG.uniform(0.5, 2, 3), (size, 3)) for size in SIZES]
WHOLE = np.concatenate(DATA)
MEAN, VAR = WHOLE.mean(0), WHOLE.var(0)


@pytest.fixture(autouse=True)
def _standard_promotion(standard_promotion):
    yield


def stats(x, **more):
    return {"mean": np.float32(x.mean(0)), "var": np.float32(x.var(0)), **more}


def check(layer, mean=MEAN, var=VAR):
    assert_allclose(layer["mean"], mean, rtol=2e-6, atol=2e-6)
    assert_allclose(layer["var"], var, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
def test_statistics_of_flax_are_weighted_by_the_numbers_of_samples():
    trees = [{"block": {"norm": stats(x)}, "list": [stats(2 * x)]} for x in DATA]
    for merge in (jbn.merge_trees, lambda *trees, counts: jax.jit(jbn.merge_trees)(*trees, counts=counts)):
        merged = merge(*trees, counts=SIZES)
        assert jax.tree.structure(merged) == jax.tree.structure(trees[0])
        check(merged["block"]["norm"])
        check(merged["list"][0], 2 * MEAN, 4 * VAR)
    frozen = jbn.merge_trees(*map(freeze, trees), counts=np.array(SIZES))
    assert frozen == freeze(frozen)
    check(frozen["block"]["norm"])
    # A part of weight 0 is left out, whatever it holds.
    check(
        jbn.merge_trees(trees[0], {**trees[0], "list": [stats(np.nan * DATA[0])]}, counts=(3, 0))["list"][0],
        2 * DATA[0].mean(0),
        4 * DATA[0].var(0),
    )
    (one,) = jax.tree.leaves(jbn.merge_trees({"a": stats(DATA[0])}, counts=[2])["a"]["mean"])
    assert_array_equal(one, np.float32(DATA[0].mean(0)))


@pytest.mark.slow
def test_states_of_nnx_go_back_into_a_model():
    models = [nnx.Sequential(nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))) for _ in DATA]
    for model, x in zip(models, DATA):
        model(jnp.asarray(x, jnp.float32))
    merged = jbn.merge_trees(*[nnx.state(model, nnx.BatchStat) for model in models], counts=SIZES)
    nnx.update(models[0], merged)
    check({"mean": models[0].layers[0].mean[...], "var": models[0].layers[0].var[...]})


@pytest.mark.slow
def test_moments_are_merged_by_their_own_counts():
    trees = [
        {"x": jbn.moments(jnp.asarray(x, jnp.float32)), "y": (jbn.Moments(*np.ones((2, 3)), 2),)}
        for x in DATA
    ]
    merged = jbn.merge_trees(*trees)
    check(merged["x"]._asdict())
    assert_array_equal(merged["x"].count, np.full(3, sum(SIZES)))
    assert_array_equal(merged["y"][0].count, np.full(3, 6))
    whole = jbn.merge_trees(*[tree["x"] for tree in trees])
    jax.tree.map(assert_array_equal, whole, jbn.merge(*[tree["x"] for tree in trees]))
    jax.tree.map(assert_array_equal, jbn.merge_trees(whole), whole)


@pytest.mark.slow
def test_counts_are_what_each_rule_goes_on_from():
    def after(update, batches):
        _, running = jbn.init(3)
        for _ in range(batches):
            running = update(running, jbn.moments(jnp.asarray(DATA[0], jnp.float32)))
        return running._asdict()

    for update, counts, expected in (
        (jbn.pooled(), None, 25),
        (jbn.pooled(), (10, 15), 25),
        (jbn.ema(0.9), (10, 15), 5),
        (jbn.cumulative(), (10, 15), 5),
        (jbn.ema(0.5, debias=True), (10, 15), 0.4 * 0.75 + 0.6 * 0.875),
        (jbn.ema(0.9, debias=True), (0, 15), 1 - 0.9**3),
        (jbn.ema(0.0, debias=True), (10, 15), 1),
    ):
        merged = jbn.merge_trees(*({"norm": after(update, n)} for n in (2, 3)), counts=counts)["norm"]
        assert_allclose(merged["count"], np.full(3, expected), rtol=1e-6, err_msg=f"{update} {counts}")
    # A layer that was never updated counts for nothing; if none was, it stays as new.
    check(
        jbn.merge_trees(after(jbn.pooled(), 0), after(jbn.pooled(), 1), counts=(9, 9)),
        DATA[0].mean(0),
        DATA[0].var(0),
    )
    # Counts of one tree may be one number, and those of another one for each feature.
    mixed = after(jbn.ema(0.9), 3) | {"count": 2.0}
    for options in ({}, {"counts": (1, 1)}):
        merged = jbn.merge_trees(after(jbn.ema(0.9), 3), mixed, **options)
        assert_allclose(merged["count"], np.full(3, 5))
    # Moments that were given no count, and integers.
    check(jbn.merge_trees(*[jbn.Moments(x.mean(0), x.var(0)) for x in DATA], counts=SIZES)._asdict())
    ints = {"mean": np.zeros(1, int), "var": np.ones(1, int)}
    merged = jbn.merge_trees(ints, ints | {"mean": np.ones(1, int)}, counts=(1, 1))
    assert (merged["mean"], merged["var"]) == (0.5, 1.25)
    new = after(jbn.ema(0.9, debias=True), 0)
    for counts in (None, (9, 9), (0, 0)):
        jax.tree.map(assert_array_equal, jbn.merge_trees(new, new, counts=counts), new)


def test_what_does_not_merge_is_named():
    tree, counted = {"a": {"norm": stats(DATA[0])}}, stats(DATA[0], count=np.ones(3))
    narrow = {"a": {"norm": stats(DATA[0][:, :2])}}
    cases = (
        ((), {}, "merge_trees got no trees; expected one or more."),
        ((tree, tree), {}, "'a/norm' has no count; expected counts=, how many samples each of the 2 trees"),
        ((tree, tree), {"counts": (1, 2, 3)}, "counts=(1, 2, 3); expected one number for each of 2 trees."),
        ((tree,), {"counts": 3}, "counts=3; expected one number for each of 1 trees"),
        ((tree,), {"counts": jnp.ones(())}, "counts=1.0; expected one number for each of 1 trees"),
        (([tree, tree],), {"counts": (1, 2)}, "counts=(1, 2); .*: a list of trees is given as merge_trees(*"),
        ((tree, tree), {"counts": (1, -1)}, "counts=(1, -1); expected one finite number >= 0"),
        ((tree, tree), {"counts": (1, 1e39)}, "counts=(1, 1e+39); expected one finite number >= 0"),
        ((tree, tree), {"counts": (1, 1e-39)}, "counts=(1, 1e-39); expected one finite number >= 0"),
        ((tree, {"a": {}}), {"counts": (1, 2)}, "'a/norm/mean' is not in all trees; expected the same paths"),
        ((counted, stats(DATA[0])), {}, "'count' is not in all trees"),
        ((tree, narrow), {"counts": (1, 2)}, "'a/norm/mean' has shape (2,); expected (3,)"),
    )
    for trees, options, message in cases:
        with pytest.raises(ValueError, match="^" + re.escape(message).replace(r"\.\*", ".*", 1)):
            jbn.merge_trees(*trees, **options)
    for wrong, message in (
        (
            {"params": {"kernel": np.ones(2)}},
            "'params' has kernel; expected jbn.Moments, or the mean and var of",
        ),
        ({"mean": np.ones(2), "var": np.ones(2), "scale": np.ones(2)}, "'the tree itself' has mean, scale"),
        ({"mean": np.ones(2)}, "'the tree itself' has mean; expected"),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
            jbn.merge_trees(wrong, counts=[1])


@pytest.mark.slow
def test_layers_of_one_shape_share_a_program_and_many_trees_need_none(monkeypatch):
    traced = []
    merge = lambda *parts: traced.append(len(parts)) or jbn.merge(*parts)
    monkeypatch.setattr("jbn._tools.trees.merge", merge)
    monkeypatch.setattr("jbn._tools.trees._COMPILED", 4)
    x = RNG.normal(size=(5, 6, 7))
    trees = [{"a": stats(rows), "b": stats(rows + 1)} for rows in x]
    for number, calls in ((4, 1), (5, 2)):
        traced.clear()
        merged = jbn.merge_trees(*trees[:number], counts=[6] * number)
        assert traced == [number] * calls
        whole = x[:number].reshape(-1, 7)
        for name, mean in (("a", whole.mean(0)), ("b", whole.mean(0) + 1)):
            check(merged[name], mean, whole.var(0))
