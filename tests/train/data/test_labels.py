"""Labels as data have them: numbers or texts, classes or targets."""

import numpy as np
from numpy.testing import assert_array_equal

from train.data import Labels
from train.data.labels import converted


def classes(given, names=(), known=None):
    parts, found = converted("data", {"train": given}, names, loss="cross_entropy", known=known)
    assert parts["train"].dtype == np.int32
    return parts["train"].tolist(), found


def test_texts_are_classes_in_the_order_of_their_names_or_numbers():
    for given, expected, names in [
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        ([b"dog", b"cat", b"dog"], [1, 0, 1], ("cat", "dog")),
        (["10", "9", "-1"], [2, 1, 0], ("-1", "9", "10")),
        (["10", "9", "b"], [1, 0, 2], ("9", "10", "b")),
        (["\u00e4", "z", ""], [2, 1, 0], ("", "z", "\u00e4")),
    ]:
        assert classes(np.array(given)) == (expected, names)
        assert classes(np.array(given)[:, None]) == (expected, names)


def test_integers_and_booleans_are_positions():
    for dtype in (np.uint8, np.int64, ">i2", bool):
        assert classes(np.array([1, 0, 1], dtype)) == ([1, 0, 1], ())
    assert classes(np.array([1, 0, 1]), names=("dog", "cat")) == ([0, 1, 0], ("cat", "dog"))


def test_known_classes_keep_their_positions_and_others_are_refused(refusal):
    known = Labels(counts=(1, 1, 1), names=("dog", "cat", "elk"))
    assert classes(np.array(["elk", "dog"]), known=known) == ([2, 0], known.names)
    assert classes(np.array([1, 0]), names=("dog", "elk"), known=known) == ([2, 0], known.names)
    assert classes(np.array([2, 0]), known=known) == ([2, 0], ())
    assert classes(np.array(["2", "0"]), known=Labels(counts=(1, 1, 1))) == ([2, 0], ("0", "1", "2"))
    numbered = Labels(counts=(1, 1), names=("1", "2"))
    assert classes(np.array([2, 1, 1]), known=numbered) == ([1, 0, 0], ("1", "2"))
    assert "'1', '2', got '0'." in refusal(classes, np.array([1, 0]), known=numbered)
    sentence = refusal(classes, np.array(["fox", "elk", "ape"]), known=known)
    assert sentence.endswith("network was trained on, 'dog', 'cat', 'elk', got 'ape', 'fox'.")
    assert "labels up to 2, as in" in refusal(classes, np.array([3]), known=known)


def test_targets_are_numbers_of_any_dtype_or_texts_of_them(refusal):
    for given in (
        np.float64([1.5, -2, 1e30]),
        np.float16([1.5, -2]),
        np.array([3, -4]),
        np.array(["1.5", "-2"]),
    ):
        parts, names = converted("data", {"train": given}, (), loss="squared_error")
        assert_array_equal(parts["train"], given.astype(np.float32), strict=True)
        assert names == ()
    for given, got in [
        (["1", "x"], "got 'x'"),
        ([1e300], "finite float32 numbers"),
        ([1, np.nan], "labels of the train data, got nan as number 2."),
        ([1e9 + 1, 1e9 - 1], "about 1000000000 with a standard deviation of 1; subtract 1000000000 from all"),
    ]:
        assert got in refusal(converted, "data", {"train": np.array(given)}, (), loss="squared_error")
    for given in [0.1, 0.1, 0.1], [1e9, 2e9], [1e9 + 1]:
        parts, _ = converted("data", {"train": np.array(given)}, (), loss="squared_error")
        assert_array_equal(parts["train"], np.float32(given))


def test_numbers_that_are_no_classes_are_refused_with_the_key_that_takes_them(refusal):
    for given, expected in [
        ([0.5], "integers or texts as y_train, got float64; for numbers set model.loss = 'squared_error'"),
        ([-1], "integers >= 0 and < 2**31, got -1 to -1"),
        (["1.5", "2"], "classes as labels, got the number 1.5; for numbers set model.loss = 'squared_error'"),
        (["nan", "2"], "classes as labels, got the number nan"),
        (["9" * 5000, "2"], f"classes as labels, got the number {'9' * 80}; for"),
    ]:
        assert expected in refusal(classes, np.array(given)), given
