import gzip
import os
import struct

import numpy as np
import pytest
from arrays import keras_arrays
from numpy.testing import assert_array_equal

from train.config import Data
from train.data import sources
from train.errors import UserError


def arrays(**options):
    given = keras_arrays(**options)
    return given | {"y_test": given["y_test"].astype(int)[:, None]}  # as Keras has CIFAR-10's


def read_npz(tmp_path, arrays):
    np.savez(tmp_path / "mine.npz", **arrays)
    return sources.read(Data(name="npz", path=str(tmp_path / "mine.npz")))


def test_digits_have_a_fixed_test_split_and_every_example_once():
    from sklearn.datasets import load_digits

    train, test = sources.read(Data())
    assert train.inputs.shape == (1437, 8, 8, 1) and test.inputs.shape == (360, 8, 8, 1)
    assert {array.dtype for array in (*train, *test)} == {np.dtype(np.float32), np.dtype(np.int32)}
    found = sorted(
        (label, image.tobytes()) for part in (train, test) for image, label in zip(part.inputs, part.labels)
    )
    images, labels = load_digits(return_X_y=True)
    assert found == sorted((label, np.float32(image / 16).tobytes()) for image, label in zip(images, labels))
    # The split itself is part of every number in the README.
    assert_array_equal(test.labels[:12], [4, 5, 6, 9, 4, 7, 8, 9, 9, 6, 9, 9])


@pytest.mark.parametrize(
    "shape, wanted", [((4, 4), (4, 4, 1)), ((4, 5, 3), (4, 5, 3)), ((7,), (7,))], ids=str
)
@pytest.mark.parametrize(
    "dtype, kept", [(np.uint8, True), (np.float32, True), (np.float16, False), (">f4", False), ("f8", False)]
)
def test_own_arrays_may_be_images_or_vectors_and_are_copied_only_to_change_their_dtype(
    tmp_path, shape, dtype, kept, wanted
):
    given = arrays(shape=shape, dtype=dtype)
    for part, (inputs, labels) in zip(("train", "test"), read_npz(tmp_path, given)):
        x = given[f"x_{part}"].reshape(-1, *wanted)
        assert_array_equal(inputs, x if x.dtype == np.uint8 else x.astype(np.float32), strict=True)
        assert_array_equal(labels, given[f"y_{part}"].ravel().astype(np.int32), strict=True)
        assert isinstance(inputs, np.memmap) == kept and type(labels) is np.ndarray
        # What a memory map refuses, nobody does to the user's file by mistake.
        assert inputs.flags.writeable != kept


@pytest.mark.parametrize("name", ["mnist", "cifar10", "npz"])
def test_npz_is_found_in_a_folder_by_flag_or_environment(tmp_path, monkeypatch, name):
    given = arrays()
    np.savez(tmp_path / f"{name}.npz", **given)
    monkeypatch.setenv("JBN_DATA", str(tmp_path))
    by_environment, _ = sources.read(Data(name=name))
    monkeypatch.setenv("JBN_DATA", "/nowhere")
    by_flag, _ = sources.read(Data(name=name, path=str(tmp_path)))
    by_file, _ = sources.read(Data(name=name, path=str(tmp_path / f"{name}.npz")))
    for train in by_environment, by_flag, by_file:
        assert_array_equal(train.inputs[..., 0], given["x_train"])


def test_idx_files_are_found_in_a_folder(tmp_path):
    for stem, n in ("train", 5), ("t10k", 3):
        images = struct.pack(">4I", 0x803, n, 2, 2) + bytes(range(4 * n))
        labels = struct.pack(">2I", 0x801, n) + bytes(range(n))
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    train, test = sources.read(Data(name="mnist", path=str(tmp_path)))
    assert_array_equal(train.inputs, np.arange(20, dtype=np.uint8).reshape(5, 2, 2, 1), strict=True)
    assert_array_equal(test.labels, np.arange(3, dtype=np.int32), strict=True)
    assert isinstance(train.inputs, np.memmap)


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar"])
def test_cifar10_is_found_in_a_folder_and_never_taken_for_an_npz(tmp_path, ending):
    for batch in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / f"{batch}.bin").write_bytes(bytes([int(batch[-1], 36) % 10]) + bytes(3072))
    train, test = sources.read(Data(name="cifar10", path=str(tmp_path)))
    assert train.inputs.shape == (5, 32, 32, 3) and train.inputs.dtype == np.uint8
    assert_array_equal(train.labels, np.int32([1, 2, 3, 4, 5]), strict=True)
    (tmp_path / f"mine.{ending}").write_bytes(b"no archive")
    with pytest.raises(UserError, match=f"mine.{ending} cannot be read: .*; wanted a .tar"):
        sources.read(Data(name="cifar10", path=str(tmp_path / f"mine.{ending}")))


@pytest.mark.skipif("JBN_DATA" not in os.environ, reason="needs MNIST in $JBN_DATA")
def test_real_mnist_has_its_known_sizes_and_first_labels():
    train, test = sources.read(Data(name="mnist"))
    assert train.inputs.shape == (60000, 28, 28, 1) and test.inputs.shape == (10000, 28, 28, 1)
    assert_array_equal(train.labels[:5], [5, 0, 4, 1, 9])


@pytest.mark.parametrize(
    "name, accepted",
    [
        ("npz", "an .npz file with x_train, .* or the folder that holds it as npz.npz"),
        ("mnist", "an .npz file with x_train, .* as mnist.npz or .*train-images-idx3-ubyte"),
        ("cifar10", "an .npz file with x_train, .* cifar-10-binary.tar.gz or cifar-10-python.tar.gz"),
    ],
)
def test_missing_file_names_the_path_and_what_is_accepted(tmp_path, monkeypatch, name, accepted):
    monkeypatch.delenv("JBN_DATA", raising=False)
    with pytest.raises(UserError, match=rf"'{name}' needs .*--data.path, or set \$JBN_DATA, to {accepted}"):
        sources.read(Data(name=name))
    for path, problem in (tmp_path, "has nothing of the kind"), (tmp_path / "nowhere", "does not exist"):
        with pytest.raises(
            UserError, match=rf"{path} {problem}; wanted {accepted}.* --data.path or \$JBN_DATA"
        ):
            sources.read(Data(name=name, path=str(path)))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"x_train": np.zeros((20, 4, 5), np.uint8)},
            r"x_train are uint8 and \(4, 5, 1\), of x_test uint8 and \(4, 4, 1\)",
        ),
        ({"x_train": np.zeros((20, 4, 4))}, "x_train are float32 .*, of x_test uint8 .* the same"),
        ({"x_train": np.zeros(20, np.uint8)}, r"wanted x_train of shape \(n, features\)"),
        ({"x_train": np.uint8(1)}, r"wanted x_train of shape \(n, features\)"),
        ({"x_train": np.zeros((20, 4, 4), np.int32)}, "wanted x_train of uint8 or floating point"),
        ({"x_train": np.zeros((20, 4, 4), [("a", "f4")])}, "wanted x_train of uint8 or floating point"),
        ({"x_train": np.full((20, 4, 4), 1e300)}, "wanted finite numbers in x_train"),
        ({"x_test": np.full((8, 4, 4), np.nan, np.float32)}, "wanted finite numbers in x_test"),
        ({"x_test": np.zeros((0, 4, 4), np.uint8), "y_test": np.zeros(0, int)}, "wanted one example or more"),
        ({"x_train": np.zeros((20, 0))}, "wanted one example or more, of one number or more"),
        ({"y_train": np.zeros(19, int)}, "wanted one label in y_train for each of the 20 examples"),
        ({"y_train": np.zeros((20, 2), int)}, "wanted one label in y_train for each of the 20 examples"),
        ({"y_train": np.zeros(20)}, "wanted labels in y_train that are integers >= 0"),
        ({"y_train": np.full(20, "cat")}, "wanted labels in y_train that are integers >= 0"),
        ({"y_train": np.full(20, -1)}, "wanted labels in y_train that are integers >= 0"),
        ({"y_train": np.full(20, 2**64 - 1, np.uint64)}, r"integers >= 0 and < 2\*\*31"),
    ],
)
def test_malformed_arrays_are_named_with_their_file(tmp_path, change, message):
    with pytest.raises(UserError, match=f"mine.npz.*{message}"):
        read_npz(tmp_path, arrays() | change)


@pytest.mark.parametrize("row", [0, 999, 1000, 2499])
def test_every_number_is_checked_though_never_all_at_once(tmp_path, monkeypatch, row):
    monkeypatch.setattr(sources, "CHUNK", 1000 * 4 * 3)
    given = arrays(n_train=2500, shape=(3,), dtype=np.float32)
    given["x_train"][row, 1] = np.inf
    with pytest.raises(UserError, match="mine.npz.*wanted finite numbers in x_train"):
        read_npz(tmp_path, given)


def test_chunks_cover_all_examples_in_64_mib_or_one_by_one():
    rows = [range(100)[part] for part in sources.chunks(np.empty((1, 2**20), np.uint8), 100)]
    assert [len(part) for part in rows] == [16] * 6 + [4] and [i for part in rows for i in part] == [
        *range(100)
    ]
    assert list(sources.chunks(np.broadcast_to(np.uint8(0), (2, 2**25)), 2)) == [slice(0, 1), slice(1, 2)]
