"""Training steps on several kinds of examples, and with batch renormalization, beside NumPy float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.train.training.test_steps import (
    DATA,
    PREPROCESSING,
    X,
    assert_first_step_goes_down,
    losses,
    one_step,
    step_config,
    wide,
)
from train.data import render_mixed
from train.models import Variables
from train.runs import processes
from train.training import job
from train.training.state import StepInputs

RATE = 0.2  # of the adversarial examples


def setup(**options):
    config = step_config(**options)
    inputs = StepInputs(DATA, PREPROCESSING, np.uint32(0))
    return config, job.create(config, np.uint32(0)), processes.replicate(config.mesh, inputs)


def logits_of(params, x, domain, *, corrected=None):
    """Return logits where each domain is normalized by itself, and corrected by r and d if they are given."""
    x = x @ params["Dense_0"]["kernel"]
    normalized = np.zeros_like(x)
    for which in np.unique(domain):
        part = x[domain == which]
        normalized[domain == which] = (part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5)
    if corrected is not None:
        normalized = normalized * corrected[0] + corrected[1]
    norm, head = params["BatchNorm_0"], params["Dense_1"]
    at = domain if np.ndim(norm["scale"]) == 2 else slice(None)
    scale, bias = ((norm[name][at] if np.ndim(norm[name]) == 2 else norm[name]) for name in ("scale", "bias"))
    return 1 / (1 + np.exp(-(normalized * scale + bias))) @ head["kernel"] + head["bias"]


@pytest.mark.slow
def test_renderings_are_normalized_apart_in_parts_of_a_batch_too():
    names, parts = ("original", "inverted"), 2
    config, state, inputs = setup(
        data={"renderings": names}, optimizer={"accumulate": parts}, domains=2, affine_by_domain=True
    )
    key = jax.random.fold_in(jax.random.key(0), 0)
    images, domain = jax.device_get(render_mixed(names, key, DATA.inputs[:8]))
    x = (images.reshape(8, 16) - 100.0) / 64

    def loss(params):
        rows = [np.arange(8)[part::parts] for part in range(parts)]
        return np.mean([losses(logits_of(params, x[r], domain[r]), DATA.labels[r]) for r in rows])

    new = one_step(config, state, inputs, jnp.arange(8)).variables
    assert new.params["BatchNorm_0"]["scale"].shape == (2, 6)
    assert_first_step_goes_down(loss, state.variables.params, new.params)
    features = x @ wide(state.variables.params["Dense_0"]["kernel"])
    stats = new.batch_stats["BatchNorm_0"]
    for which in (0, 1):
        assert_allclose(stats["mean"][which], features[domain == which].mean(0), rtol=1e-4, atol=1e-5)
        assert_allclose(stats["var"][which], features[domain == which].var(0), rtol=1e-4)


@pytest.mark.slow
def test_adversarial_examples_are_made_and_normalized_with_statistics_of_their_own():
    config, state, inputs = setup(optimizer={"adversarial": RATE}, domains=2)
    params, x, labels = wide(state.variables.params), X[:8], DATA.labels[:8]
    loss_of = lambda x: losses(logits_of(params, x, np.zeros(8)), labels).sum()
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = 1e-5
        gradient[at] = loss_of(x + step) - loss_of(x - step)
    both, domain = np.concatenate([x, x + RATE * np.sign(gradient)]), np.repeat([0, 1], 8)
    loss = lambda params: losses(logits_of(params, both, domain), np.tile(labels, 2)).mean()
    new = one_step(config, state, inputs, jnp.arange(8))
    assert_first_step_goes_down(loss, state.variables.params, new.variables.params)
    assert int(new.sums["examples"]) == 16
    features = both @ params["Dense_0"]["kernel"]
    for which in (0, 1):
        found = new.variables.batch_stats["BatchNorm_0"]["mean"][which]
        assert_allclose(found, features[domain == which].mean(0), rtol=1e-4, atol=1e-5)
    # Evaluation, which says nothing of domains, has the statistics of clean examples.
    apply = jax.jit(partial(config.network.apply, train=False))
    assert_array_equal(apply(new.variables, x)[0], apply(new.variables, x, domain=0)[0])
    assert np.abs(apply(new.variables, x)[0] - apply(new.variables, x, domain=1)[0]).max() > 1e-3


@pytest.mark.slow
def test_renorm_corrects_parts_of_a_batch_towards_the_running_statistics_and_counts_one_update():
    limits = {"norm_r_max": 1.5, "norm_d_max": 0.5, "norm_plain": 0.0, "norm_ramp": 0.0}
    config, state, inputs = setup(norm="renorm", optimizer={"accumulate": 2, "average": 0.5}, **limits)
    params, kernel = state.variables.params, wide(state.variables.params["Dense_0"]["kernel"])
    stats = {
        "mean": np.linspace(-1, 1, 6, dtype=np.float32),
        "var": np.linspace(0.1, 3, 6, dtype=np.float32),
        "count": np.ones(6, np.float32),
        "num_updates": np.int32(7),
    }
    given = Variables(params, {"BatchNorm_0": stats})
    state = state._replace(variables=given, average=given)
    rows = [np.arange(8)[part::2] for part in range(2)]
    corrected = []
    for r in rows:
        features, sd = X[r] @ kernel, np.sqrt(stats["var"] + 1e-5)
        ratio = np.sqrt(features.var(0) + 1e-5) / sd
        away = (features.mean(0) - stats["mean"]) / sd
        corrected.append((np.clip(ratio, 1 / 1.5, 1.5), np.clip(away, -0.5, 0.5)))
        assert len(np.unique(corrected[-1][0])) > 2  # some within the limits

    def loss(params):  # to whose gradient r and d are constants
        of_parts = [
            losses(logits_of(params, X[r], np.zeros(4), corrected=c), DATA.labels[r])
            for r, c in zip(rows, corrected)
        ]
        return np.mean(of_parts)

    new = one_step(config, state, inputs, jnp.arange(8))
    assert_first_step_goes_down(loss, params, new.variables.params)
    found, features = new.variables.batch_stats["BatchNorm_0"], X[:8] @ kernel
    assert_allclose(found["mean"], 0.9 * stats["mean"] + 0.1 * features.mean(0), rtol=1e-4, atol=1e-5)
    assert_allclose(found["var"], 0.9 * stats["var"] + 0.1 * features.var(0), rtol=1e-4)
    for counted in (found["num_updates"], new.average.batch_stats["BatchNorm_0"]["num_updates"]):
        assert (int(counted), counted.dtype) == (8, jnp.int32)
