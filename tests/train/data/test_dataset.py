"""Splits, their order and their batches."""

import numpy as np
from numpy.testing import assert_array_equal

from train.data import Split, eval_batches, order, steps_per_epoch


def test_split_takes_copies_of_the_examples_at_positions_among_its_own_rows(tmp_path):
    rows = np.array([1, 3, 4, 6, 8])
    inputs = np.lib.format.open_memmap(tmp_path / "inputs.npy", "w+", np.float32, (9, 2))
    inputs[:] = np.arange(18).reshape(9, 2)
    split = Split(inputs, np.arange(9, dtype=np.int32), rows)
    assert len(split) == 5
    for at, expected in (slice(2, 5), [4, 6, 8]), (np.array([4, 2, 4]), [8, 4, 8]), (slice(9), rows):
        taken, labels = split.take(at)
        assert type(taken) is np.ndarray and not np.shares_memory(taken, inputs)
        assert_array_equal(labels, expected)
        assert_array_equal(taken[:, 0], 2 * np.array(expected))


def test_order_is_a_permutation_that_follows_from_seed_and_epoch():
    first = order(3, 5, 100)
    assert_array_equal(np.sort(first), np.arange(100, dtype=np.int32), strict=True)
    assert_array_equal(first, order(3, 5, 100))
    assert_array_equal(order(0, 0, 8), [3, 7, 4, 0, 2, 6, 5, 1])  # the same on every machine
    for other in order(3, 6, 100), order(4, 5, 100), order(5, 3, 100):
        assert (other != first).any()


def test_epochs_have_whole_batches_alone_and_one_at_least(refusal):
    assert [steps_per_epoch(100, size) for size in (1, 32, 50, 51, 100)] == [100, 3, 2, 1, 1]
    assert refusal(steps_per_epoch, 100, 101) == (
        "batch_size: expected at most the 100 training examples, got 101; set a smaller one."
    )


def test_eval_batches_hold_each_example_once_in_one_size():
    for n, dtype in (1, np.float32), (7, np.uint8), (8, np.float32), (9, np.uint8), (24, np.float32):
        rows = np.arange(0, 2 * n, 2)
        split = Split(np.arange(1, 2 * n + 1, dtype=dtype)[:, None], np.arange(2 * n, dtype=np.int32), rows)
        batches = list(eval_batches(split, 8))
        shapes = [((8, 1), np.dtype(dtype)), ((8,), np.int32), ((8,), bool)]
        for (inputs, labels), mask in batches:
            assert [(leaf.shape, leaf.dtype) for leaf in (inputs, labels, mask)] == shapes
        inputs = np.concatenate([batch.examples.inputs for batch in batches])
        labels = np.concatenate([batch.examples.labels for batch in batches])
        mask = np.concatenate([batch.mask for batch in batches])
        assert_array_equal(labels[mask], split.labels[rows])
        assert_array_equal(inputs[mask], split.inputs[rows])
        assert not inputs[~mask].any() and not labels[~mask].any()
    nothing = Split(np.zeros((3, 2), np.float32), np.zeros(3, np.int32), np.arange(0))
    assert list(eval_batches(nothing, 8)) == []
