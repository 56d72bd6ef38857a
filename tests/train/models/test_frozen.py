"""What training changes of each network, by the names and shapes of its variables."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np

from train.config import Model
from train.models import build, check, learning

NARROW = {"mlp": (6, 4), "nnx_mlp": (6, 4), "cnn": (6, 4), "resnet20": (4, 4, 4), "resnet18": (4, 4, 4, 4)}
IMAGE = np.zeros((1, 8, 8, 1), np.float32)


def marks_of(name, norm):
    """Return what `learning` marks with each value of the key: leaves by their names, learning and not."""
    config = Model(name=name, widths=NARROW[name], norm=norm, norm_groups=2)
    network = build(config, IMAGE.shape[1:], classes=3)
    variables = jax.eval_shape(network.init, jax.random.key(0), IMAGE)
    found = {}
    for frozen in ("none", "norms", "statistics", "body"):
        marks = learning(replace(config, frozen=frozen), network, variables)
        assert jax.tree.structure(marks) == jax.tree.structure(variables)
        named = {True: {}, False: {}}
        for (path, mark), leaf in zip(
            jax.tree_util.tree_leaves_with_path(marks.params), jax.tree.leaves(variables.params)
        ):
            named[mark][jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
        found[frozen] = named[True], named[False], set(jax.tree.leaves(marks.batch_stats))
    return found


def test_what_is_frozen_is_what_the_key_says_in_every_network():
    for name in NARROW:
        marks = marks_of(name, "batch")
        every, nothing, stats = marks["none"]
        assert nothing == {} and stats == {True}, name
        kept, frozen, stats = marks["statistics"]
        assert kept == every and frozen == {} and stats == {False}, name
        _, frozen, stats = marks["norms"]
        of_norms = {key for key in every if "norm" in key.lower().split("/")[-2]}
        assert frozen.keys() == of_norms and stats == {False}, name
        assert len(of_norms) == 2 * sum(key.endswith("scale") for key in every) > 0, name
        head, _, stats = marks["body"]
        assert {key.rpartition("/")[2]: leaf.shape[-1] for key, leaf in head.items()} == {
            "kernel": 3,
            "bias": 3,
        }
        assert stats == {False}, name


def test_norms_without_statistics_have_a_scale_and_a_bias_to_freeze():
    for name in ("mlp", "nnx_mlp"):
        for norm in ("layer", "group"):
            _, frozen, stats = marks_of(name, norm)["norms"]
            assert len(frozen) == 4 and stats == set(), (name, norm)


def test_what_a_norm_does_not_have_cannot_be_frozen_or_pooled(refusal):
    for norm, frozen in (("none", "norms"), ("none", "statistics"), ("layer", "statistics")):
        message = refusal(check, Model(norm=norm, frozen=frozen))
        assert message == (
            f"model.frozen: expected 'none' or 'body' with model.norm = '{norm}', which has no {frozen} to "
            f"freeze, got '{frozen}'."
        )
    for norm, frozen in (("none", "body"), ("layer", "norms"), ("group", "body"), ("flax", "statistics")):
        check(Model(norm=norm, frozen=frozen), accumulate=2)
    assert refusal(partial(check, recalibrate=True), Model(norm="flax")) == (
        "recalibrate: expected false with model.norm = 'flax', whose running statistics cannot be pooled, "
        "got true; those of 'batch' and 'renorm' and 'ghost' can."
    )
    for norm in ("none", "layer", "batch", "ghost"):
        check(Model(norm=norm), recalibrate=True)
