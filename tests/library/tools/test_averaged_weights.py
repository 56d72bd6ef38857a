"""Averaged weights on digits: what the statistics are by PyTorch's `update_bn`, and by recalibration.

`tests/data/torch_update_bn.py` has trained the network and averaged its weights, with PyTorch.
"""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose
from sklearn.datasets import load_digits

import jbn.linen
from tests.helpers import __file__ as helpers

pytestmark = pytest.mark.usefixtures("standard_promotion")
STORED = np.load(Path(helpers).parents[1] / "data" / "torch_update_bn.npz")
BATCH, TRAIN = 4, 1436


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.Dense(16, use_bias=False, name=f"dense{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, name=f"norm{i}")(x))
        return nn.Dense(10, name="head")(x)


def stored(name, kind="before"):
    return STORED[f"{kind}/{name}"]


def flax_variables():
    params = {"head": {"kernel": stored("6.weight").T, "bias": stored("6.bias")}}
    for i in range(2):
        params[f"dense{i}"] = {"kernel": stored(f"{3 * i}.weight").T}
        params[f"norm{i}"] = {"scale": stored(f"{3 * i + 1}.weight"), "bias": stored(f"{3 * i + 1}.bias")}
    return {"params": params, "batch_stats": statistics("before")}


def statistics(kind):
    return {
        f"norm{i}": {s: stored(f"{3 * i + 1}.running_{s}", kind) for s in ("mean", "var")} for i in range(2)
    }


def inputs_by_batch(x):
    """Returns the inputs of each norm in float64, batch by batch, normalized as in training."""
    seen = []
    for i in range(2):
        x = x @ stored(f"{3 * i}.weight").T.astype(float)
        seen.append(x)
        y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        x = np.maximum(y * stored(f"{3 * i + 1}.weight") + stored(f"{3 * i + 1}.bias"), 0)
    return seen


@pytest.mark.slow
def test_statistics_are_the_pooled_ones_where_update_bn_averages_variances():
    digits = load_digits()
    x, labels = (digits.data / 16).astype("float32"), digits.target
    batches, variables = x[:TRAIN].reshape(-1, BATCH, 64), flax_variables()
    new = jbn.linen.recalibrate(Net().apply, variables, list(batches))
    for i, inputs in enumerate(inputs_by_batch(batches.astype(float))):
        ours, theirs = new["batch_stats"][f"norm{i}"], statistics("update_bn")[f"norm{i}"]
        assert_allclose(ours["mean"], inputs.mean((0, 1)), rtol=1e-5, atol=1e-5)
        assert_allclose(ours["var"], inputs.var((0, 1)), rtol=1e-5)
        assert_allclose(theirs["mean"], inputs.mean((0, 1)), rtol=1e-4, atol=1e-4)
        # PyTorch's is the average within batches, times n / (n - 1) for the spread between that is missing.
        assert_allclose(theirs["var"], inputs.var(1).mean(0) * BATCH / (BATCH - 1), rtol=1e-4)
    # Which is too much behind a layer that has normalized each batch: there batches hardly differ.
    assert_allclose(theirs["var"] / ours["var"], np.full(16, BATCH / (BATCH - 1)), rtol=0.01)

    @jax.jit
    def metrics(stats):
        logits = Net().apply({**variables, "batch_stats": stats}, x[TRAIN:])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[TRAIN:]).mean()
        return [loss, (logits.argmax(-1) == labels[TRAIN:]).mean()]

    for kind in "before", "update_bn":
        assert_allclose(metrics(statistics(kind)), STORED[f"metrics_{kind}"], rtol=1e-4)
    before, updated, ours = map(metrics, (statistics("before"), statistics("update_bn"), new["batch_stats"]))
    assert ours[0] < updated[0] < before[0]
