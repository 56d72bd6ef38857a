"""One value per feature is its own mean: a warning, while tracing, that points at the caller."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jbn

RUNNING = jbn.init(3)[1]


def ones(*shape):
    return np.ones(shape, np.float32)


def train(x, **options):
    return jbn.batch_norm(x, None, RUNNING, train=True, **options)


def train_in_vmap(shape, **options):
    return jax.vmap(lambda x: train(x, axis_name="i", **options), axis_name="i")(ones(*shape))


WARNED = {
    "one row": (lambda: train(ones(1, 3)), r"x of shape \(1, 3\) has one value per feature\. "),
    "one position": (lambda: train(ones(1, 1, 1, 3)), "every output is the bias"),
    "one example in a vmap": (lambda: train_in_vmap((1, 3)), r"counted over axis_name='i'\."),
    "a group of one": (
        lambda: train_in_vmap((3, 3), axis_index_groups=[[0, 1], [2]]),
        "counted over .* in the smallest group",
    ),
    "virtual batches of one": (lambda: train(ones(4, 3), virtual_batch_size=1), "in 4 virtual batches"),
    "one of the virtual batches": (lambda: train(ones(3, 3), virtual_batch_size=2), "in 2 virtual batches"),
}


@pytest.mark.parametrize("case", WARNED)
def test_one_value_per_feature_warns_at_trace_time(case):
    call, message = WARNED[case]
    with pytest.warns(jbn.OneValueWarning, match=message):
        jax.eval_shape(call)


def test_one_value_per_feature_warns_with_a_traced_flag():
    with pytest.warns(jbn.OneValueWarning, match="train=False"):
        jax.eval_shape(lambda flag: jbn.batch_norm(ones(1, 3), None, RUNNING, train=flag), True)


def test_more_values_or_inference_do_not_warn():
    # Warnings are errors in these tests.
    for call in (
        lambda: train(ones(1, 5, 3)),
        lambda: train(ones(2, 3)),
        lambda: train(ones(0, 3)),
        lambda: train(ones(4, 3), virtual_batch_size=2),
        lambda: train_in_vmap((2, 3)),
        lambda: jbn.batch_norm(ones(1, 3), None, RUNNING, train=False),
        lambda: jbn.moments(ones(1, 3)),
    ):
        jax.eval_shape(call)


def test_warning_points_at_the_caller_and_comes_once_a_compilation():
    step = jax.jit(train)
    with pytest.warns(jbn.OneValueWarning, match="one value per feature") as caught:
        jax.eval_shape(lambda: train(ones(1, 3)))
        step.trace(ones(1, 3))
        step.trace(ones(1, 3))
    assert len(caught) == 2
    assert caught[0].filename == __file__
    values = {"norm": jbn.batch_norm, "x": ones(1, 3), "running": RUNNING}
    beside = f"{Path(jbn.__file__).parent}_models/net.py"  # a user's, though its name begins like ours
    code = compile("norm(x, None, running, train=True)", beside, "exec")
    with pytest.warns(jbn.OneValueWarning, match="one value per feature") as caught:
        jax.eval_shape(lambda: exec(code, values))
    assert caught[0].filename == beside
