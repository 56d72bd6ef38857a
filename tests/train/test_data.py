import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from train import data
from train.config import Data, UserError


def arrays(n_train=20, n_test=8, shape=(4, 4), dtype=np.uint8):
    rng = np.random.RandomState(0)
    return {
        "x_train": rng.randint(0, 256, (n_train, *shape)).astype(dtype),
        "y_train": np.arange(n_train, dtype=np.uint8) % 3,
        "x_test": rng.randint(0, 256, (n_test, *shape)).astype(dtype),
        "y_test": np.arange(n_test, dtype=np.int64) % 4,
    }


def load_npz(tmp_path, **options):
    np.savez(tmp_path / "mine.npz", **options.pop("arrays"))
    return data.load(Data(name="npz", path=str(tmp_path / "mine.npz"), **options))


def rows(*splits):
    return sorted(bytes(row) for split in splits for row in split.inputs)


def test_digits_have_a_fixed_test_split_and_every_example_once():
    from sklearn.datasets import load_digits

    digits = data.load(Data(validation=0.1))
    sizes = [len(split.labels) for split in (digits.train, digits.validation, digits.test)]
    assert (sizes, digits.classes) == ([1293, 144, 360], 10)
    everything = data.Split((load_digits().data / 16).astype(np.float32), load_digits().target)
    assert rows(digits.train, digits.validation, digits.test) == rows(everything)
    # The split itself is part of every number in the README.
    assert_array_equal(digits.test.labels[:12], [4, 5, 6, 9, 4, 7, 8, 9, 9, 6, 9, 9])


@pytest.mark.parametrize("fraction, held_out", [(0.0, 0), (0.25, 5)])
def test_validation_is_held_out_of_the_training_data_and_never_of_the_test_data(tmp_path, fraction, held_out):
    given = arrays()
    loaded = load_npz(tmp_path, arrays=given, validation=fraction)
    assert len(loaded.validation.labels) == held_out
    whole = data.Split((given["x_train"] / 255).astype(np.float32), given["y_train"])
    assert rows(loaded.train, loaded.validation) == rows(whole)
    assert_array_equal(loaded.test.labels, given["y_test"])


@pytest.mark.parametrize(
    "shape, dtype, wanted",
    [((4, 4), np.uint8, (4, 4, 1)), ((4, 4, 3), np.uint8, (4, 4, 3)), ((7,), np.float64, (7,))],
)
def test_own_arrays_may_be_images_or_vectors(tmp_path, shape, dtype, wanted):
    given = arrays(shape=shape, dtype=dtype)
    loaded = load_npz(tmp_path, arrays=given, validation=0)
    assert loaded.train.inputs.shape == (20, *wanted) and loaded.train.inputs.dtype == np.float32
    scale = 255 if dtype == np.uint8 else 1  # bytes become [0, 1]; floating point is left as it is
    assert_array_equal(
        loaded.train.inputs.reshape(given["x_train"].shape), np.float32(given["x_train"]) / np.float32(scale)
    )
    assert loaded.classes == 4


def test_mnist_is_found_in_a_folder_by_flag_or_environment(tmp_path, monkeypatch):
    np.savez(tmp_path / "mnist.npz", **arrays(shape=(28, 28)))
    monkeypatch.setenv("JBN_DATA", str(tmp_path))
    by_environment = data.load(Data(name="mnist"))
    monkeypatch.setenv("JBN_DATA", "/nowhere")
    by_flag = data.load(Data(name="mnist", path=str(tmp_path)))
    assert rows(by_environment.train) == rows(by_flag.train)
    assert by_flag.test.inputs.shape == (8, 28, 28, 1)


@pytest.mark.skipif("JBN_DATA" not in os.environ, reason="needs MNIST in $JBN_DATA")
def test_real_mnist_has_its_known_sizes_and_first_labels():
    mnist = data.load(Data(name="mnist", validation=0))
    assert mnist.train.inputs.shape == (60000, 28, 28, 1) and mnist.test.inputs.shape == (10000, 28, 28, 1)
    assert_array_equal(mnist.train.labels[:5], [5, 0, 4, 1, 9])


@pytest.mark.parametrize("name", ["mnist", "npz"])
def test_missing_file_names_the_path_and_what_is_accepted(tmp_path, monkeypatch, name):
    monkeypatch.delenv("JBN_DATA", raising=False)
    with pytest.raises(
        UserError, match=r"--data.path, or set \$JBN_DATA, to an .npz file with x_train, y_train"
    ):
        data.load(Data(name=name))
    with pytest.raises(
        UserError, match=rf"{tmp_path}/{name}.npz does not exist; wanted an .npz file with x_train"
    ):
        data.load(Data(name=name, path=str(tmp_path)))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 cut", pickle.dumps(Bomb()), b"no archive at all", saved(np.zeros(3))]
)
def test_file_that_is_no_npz_is_named_and_no_code_in_it_runs(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(UserError, match="mine.npz cannot be read as an .npz file of plain arrays"):
        data.load(Data(name="npz", path="mine.npz"))
    assert not (tmp_path / "exploded").exists()


def test_truncated_archive_is_named(tmp_path):
    np.savez(tmp_path / "whole.npz", **arrays(n_train=500))
    whole = (tmp_path / "whole.npz").read_bytes()
    for keep in (0.3, 0.9, 0.999):
        (tmp_path / "mine.npz").write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(UserError, match="mine.npz cannot be read"):
            data.load(Data(name="npz", path=str(tmp_path / "mine.npz")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y_test": None}, r"wanted \['y_test'\] too"),
        ({"x_train": np.array([Bomb()], object)}, "cannot be read as an .npz file of plain arrays"),
        (
            {"x_train": np.zeros((20, 4, 5), np.uint8)},
            r"x_train has shape \(4, 5, 1\), one of x_test \(4, 4, 1\)",
        ),
        ({"x_train": np.zeros(20, np.uint8)}, r"wanted x_train of shape \(n, features\)"),
        ({"x_train": np.zeros((20, 4, 4), np.int32)}, "wanted x_train of uint8 or floating point"),
        ({"x_test": np.full((8, 4, 4), np.nan, np.float32)}, "wanted finite numbers in x_test"),
        ({"x_test": np.zeros((0, 4, 4), np.uint8), "y_test": np.zeros(0, int)}, "wanted one example or more"),
        ({"y_train": np.zeros(19, int)}, "wanted one label in y_train for each of the 20 examples"),
        ({"y_train": np.zeros(20)}, "wanted labels in y_train that are integers >= 0"),
        ({"y_train": np.full(20, 2**64 - 1, np.uint64)}, r"integers >= 0 and < 2\*\*31"),
        (
            {"x_train": np.zeros((20, 0)), "x_test": np.zeros((8, 0))},
            "one example or more, of one number or more",
        ),
        ({"x_train": np.full((20, 4, 4), 1e300)}, "wanted finite numbers in x_train"),
        ({"y_train": np.full(20, -1)}, "wanted labels in y_train that are integers >= 0"),
    ],
)
def test_malformed_arrays_are_named_with_their_file(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    given = {key: value for key, value in (arrays() | change).items() if value is not None}
    with pytest.raises(UserError, match=f"mine.npz.*{message}"):
        load_npz(tmp_path, arrays=given)
    assert not (tmp_path / "exploded").exists()


def test_archive_of_other_files_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        for name in arrays():
            archive.writestr(name, b"text")
    with pytest.raises(UserError, match="mine.npz has members that are no arrays"):
        data.load(Data(name="npz", path=str(tmp_path / "mine.npz")))


def test_validation_that_leaves_nothing_to_train_on_is_named(tmp_path):
    with pytest.raises(UserError, match="data.validation = 0.999 leaves no example to train on"):
        load_npz(tmp_path, arrays=arrays(), validation=0.999)


def test_labels_that_cannot_be_classes_are_named(tmp_path):
    with pytest.raises(UserError, match="has labels up to 20 and 20 training examples; wanted labels from 0"):
        load_npz(tmp_path, arrays=arrays() | {"y_test": np.full(8, 20)})


def test_order_is_a_permutation_that_follows_from_seed_and_epoch():
    order = data.order(3, 5, 100)
    assert_array_equal(np.sort(order), np.arange(100))
    assert_array_equal(order, data.order(3, 5, 100))
    assert_array_equal(data.order(0, 0, 8), [3, 7, 4, 0, 2, 6, 5, 1])  # the same on every machine
    for other in data.order(3, 6, 100), data.order(4, 5, 100):
        assert (other != order).any()


def test_too_few_examples_for_a_batch_are_named():
    assert data.steps_per_epoch(100, 32) == 3
    with pytest.raises(
        UserError, match="batch_size = 101, but there are 100 training examples; .* 100 or less"
    ):
        data.steps_per_epoch(100, 101)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 24])
def test_eval_batches_hold_each_example_once_in_one_size(n):
    split = data.Split(np.arange(1, n + 1, dtype=np.float32)[:, None], np.arange(n, dtype=np.int32))
    batches = list(data.eval_batches(split, 8))
    assert {batch.inputs.shape for batch in batches} == {(8, 1)}
    assert_array_equal(np.concatenate([batch.labels[batch.mask] for batch in batches]), split.labels)
    assert_array_equal(np.concatenate([batch.inputs[batch.mask] for batch in batches]), split.inputs)
