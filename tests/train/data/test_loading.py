"""The data that a job names: where they are looked for, what is refused, how they are split and scaled."""

import dataclasses
import itertools
import os
import tracemalloc

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.helpers.arrays import keras_arrays as arrays
from tests.helpers.arrays import save_npys
from train.config import Config, Data, Model
from train.data import Examples, fingerprint, load, preprocessing
from train.data.formats.arrays import KEYS
from train.data.formats.readers import READERS, Reader
from train.data.formats.reading import Found
from train.training.job import prepare

SHAPES = [(4, 5), (4, 5, 3), (3,)]  # grey images, images, vectors


def read(config):
    """Return the training and the test examples."""
    loaded = load(dataclasses.replace(config, validation=0))
    return [Examples(split.inputs, split.labels) for split in (loaded.train, loaded.test)]


# Which data


def test_a_further_reader_in_the_table_is_all_that_a_further_data_set_needs(tmp_path, monkeypatch, refusal):
    read_text = lambda path, config: Found(
        {key: np.loadtxt(path / f"{key}.txt", np.uint8, ndmin=2 if "x" in key else 1) for key in KEYS}
    )
    monkeypatch.setitem(READERS, "text", Reader(read_text, "a folder of text files"))
    monkeypatch.delenv("JBN_DATA", raising=False)
    config = Data(name="text", path=str(tmp_path))
    assert refusal(load, config).startswith(f"{tmp_path} cannot be read: ")
    for key in KEYS:
        (tmp_path / f"{key}.txt").write_text("1 2\n3 4\n" if "x" in key else "0 1")
    loaded = load(config)
    assert_array_equal(loaded.train.inputs, np.uint8([[1, 2], [3, 4]]), strict=True)
    assert (loaded.labels.outputs, len(loaded.test)) == (2, 2)
    assert refusal(load, Data(name="text")) == (
        "data.path: expected a folder of text files, for data.name = 'text', got none; or set $JBN_DATA to it"
        "."
    )


def test_data_are_found_by_flag_or_environment(tmp_path, monkeypatch, refusal):
    for name in ("mnist", "cifar10", "npz"):
        np.savez(tmp_path / f"{name}.npz", **arrays())
        monkeypatch.setenv("JBN_DATA", str(tmp_path))
        by_environment, _ = read(Data(name=name))
        monkeypatch.setenv("JBN_DATA", "/nowhere")
        assert refusal(read, Data(name=name)).startswith("$JBN_DATA: '/nowhere' does not exist; expected")
        by_flag, _ = read(Data(name=name, path=str(tmp_path)))
        by_file, _ = read(Data(name=name, path=str(tmp_path / f"{name}.npz")))
        for train in by_environment, by_flag, by_file:
            assert_array_equal(train.inputs[..., 0], arrays()["x_train"], name)


def test_path_is_not_ignored_where_the_data_come_with_the_program(tmp_path, monkeypatch, refusal):
    sentence = refusal(load, Data("digits", path=str(tmp_path)))
    assert (
        f"come with the program, got '{tmp_path}'; for data of your own set data.name = 'folder'" in sentence
    )
    monkeypatch.setenv("JBN_DATA", str(tmp_path))  # of all jobs, and so of some that need none
    assert len(load(Data("digits")).test) == 360


def test_missing_file_names_the_path_and_what_is_accepted(tmp_path, monkeypatch, refusal):
    monkeypatch.delenv("JBN_DATA", raising=False)
    for name, also in (
        ("npz", ""),
        ("mnist", ".npy files, or with train-"),
        ("cifar10", "cifar-10-binary.tar.gz"),
    ):
        accepted = READERS[name].accepts
        assert accepted.startswith("an .npz file with x_train") and also in accepted
        assert refusal(read, Data(name=name)) == (
            f"data.path: expected {accepted}, for data.name = '{name}', got none; or set $JBN_DATA to it."
        )
        for path in (None, str(tmp_path / "gone")):  # a finished run does not need them
            assert fingerprint(Data(name=name, path=path), loss="cross_entropy") is None
        assert refusal(read, Data(name=name, path=str(tmp_path / "nowhere"))) == (
            f"data.path: '{tmp_path}/nowhere' does not exist; expected {accepted}."
        )
        assert refusal(read, Data(name=name, path=str(tmp_path))) == (
            f"data.path: expected {accepted}, got '{tmp_path}', which has none of it."
        )


@pytest.mark.skipif("JBN_DATA" not in os.environ, reason="needs MNIST in $JBN_DATA")
def test_real_mnist_has_its_known_sizes_and_first_labels():
    train, test = read(Data(name="mnist"))
    assert train.inputs.shape == (60000, 28, 28, 1) and test.inputs.shape == (10000, 28, 28, 1)
    assert_array_equal(train.labels[:5], [5, 0, 4, 1, 9])


# What their arrays may be


def test_arrays_of_images_or_vectors_stay_memory_maps_unless_their_dtype_changes(tmp_path):
    for shape, (dtype, mapped) in itertools.product(
        SHAPES, [(np.uint8, True), (np.float32, True), (np.float16, False), (">f4", False), ("f8", False)]
    ):
        case = f"{shape} {dtype}"
        given = arrays(shape=shape, dtype=dtype)
        given["y_test"] = given["y_test"].astype(int)[:, None]  # as Keras has CIFAR-10's
        parts = read(Data(name="npz", path=str(save_npys(tmp_path, given))))
        for part, (inputs, labels) in zip(("train", "test"), parts):
            x = given[f"x_{part}"][..., None] if shape == (4, 5) else given[f"x_{part}"]
            expected = x if dtype == np.uint8 else x.astype(np.float32)
            assert_array_equal(inputs, expected, case, strict=True)
            assert_array_equal(labels, given[f"y_{part}"].ravel().astype(np.int32), case, strict=True)
            assert isinstance(inputs, np.memmap) == mapped and type(labels) is np.ndarray, case


MALFORMED = [
    (
        {"x_train": np.zeros((20, 4, 5), np.uint8)},
        "examples of one kind, got uint8[4, 5, 1] in x_train, uint8[4, 4, 1]",
    ),
    ({"x_train": np.zeros((20, 4, 4))}, "examples of one kind, got float32[4, 4, 1] in x_train, uint8"),
    (
        {"x_train": np.zeros(20, np.uint8)},
        "x_train of shape (n, features), (n, h, w) or (n, h, w, channels), got x_tr",
    ),
    ({"x_train": np.uint8(1)}, "x_train of shape (n, features)"),
    (
        {"x_train": np.zeros((20, 4, 4), np.int32)},
        "x_train of uint8 or floating point (save x.astype('float32'), or of pixels x.astype('uint8')), got "
        "x_train int32[20, 4, 4]",
    ),
    ({"x_train": np.zeros((20, 4, 4), [("a", "f4")])}, "x_train of uint8 or floating point"),
    ({"x_train": np.full((20, 4, 4), 1e300)}, "finite float32 numbers in x_train"),
    ({"x_test": np.full((8, 4, 4), np.nan, np.float32)}, "finite float32 numbers in x_test"),
    (
        {"x_train": np.where(np.arange(20)[:, None] == 7, np.inf, np.ones(6))},
        "finite float32 numbers in x_train, got others in x_train[7].",
    ),
    ({"x_test": np.zeros((0, 4, 4), np.uint8), "y_test": np.zeros(0, int)}, "one example or more"),
    ({"x_train": np.zeros((20, 0))}, "one example or more, of one number or more"),
    ({"y_train": np.zeros(19, int)}, "one label in y_train for each of the 20 examples, got x_train"),
    ({"y_train": np.zeros((20, 2), int)}, "one label in y_train for each of the 20 examples"),
    ({"y_train": np.zeros(20)}, "integers or texts as y_train, got float64; for numbers set model.loss"),
    ({"y_train": np.full(20, "cat")}, "labels in y_train that are integers >= 0 and < 2**31, got <U3"),
    (
        {"y_train": np.eye(20)},
        "one label in y_train for each of the 20 examples (of one-hot ones, save y.argmax",
    ),
    ({"y_train": np.full(20, -1)}, "labels in y_train that are integers >= 0"),
    ({"y_train": np.full(20, 2**64 - 1, np.uint64)}, "labels in y_train that are integers >= 0 and < 2**31"),
]


def test_malformed_arrays_are_named_with_their_file(tmp_path, refusal):
    path = str(tmp_path / "mine.npz")
    for change, expected in MALFORMED:
        np.savez(path, **arrays() | change)
        sentence = refusal(read, Data(name="npz", path=path))
        assert sentence.startswith(f"{path}: expected {expected}"), sentence


def test_every_number_is_checked_though_never_all_at_once(given, monkeypatch, refusal):
    monkeypatch.setattr(preprocessing, "CHUNK", 1000 * 4 * 3)
    for row in (0, 999, 1000, 2499):
        values = arrays(n_train=2500, shape=(3,), dtype=np.float32)
        values["x_train"][row, 1] = np.inf
        assert "expected finite float32 numbers in x_train" in refusal(given(values)), row


def test_chunks_cover_all_examples_in_64_mib_or_one_by_one():
    rows = [range(100)[part] for part in preprocessing.chunks(np.empty((1, 2**20), np.uint8), 100)]
    assert [len(part) for part in rows] == [16] * 6 + [4]
    assert [i for part in rows for i in part] == [*range(100)]
    large = np.broadcast_to(np.uint8(0), (2, 2**25))
    assert list(preprocessing.chunks(large, 2)) == [slice(0, 1), slice(1, 2)]


def test_labels_that_cannot_be_classes_are_named(given, refusal):
    assert refusal(given(arrays() | {"y_test": np.full(8, 20)})) == (
        "data.name = 'given': expected labels from 0 to the number of classes - 1, got labels up to 20 for "
        "20 training examples."
    )


# Splits


def test_digits_are_split_in_three():
    for validation, sizes in (0.1, [1293, 144, 360]), (0, [1437, 0, 360]):
        loaded = load(Data(validation=validation))
        assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == sizes
        assert (loaded.labels.outputs, loaded.example_shape) == (10, (8, 8, 1))


def test_validation_is_held_out_of_the_training_data_and_never_of_the_test_data(given, refusal):
    values = arrays()
    # The same rows on every machine, as whichever checkpoint is best depends on them.
    for fraction, held_out in (0.0, []), (0.25, [1, 8, 10, 18, 19]):
        loaded = given(values)(validation=fraction)
        assert_array_equal(loaded.validation.rows, np.array(held_out, np.int64), strict=True)
        assert_array_equal(loaded.train.rows, np.setdiff1d(np.arange(20), held_out), strict=True)
        assert_array_equal(loaded.test.rows, np.arange(8), strict=True)
        for split, part in (loaded.train, "train"), (loaded.validation, "train"), (loaded.test, "test"):
            inputs, labels = split.take(slice(None))
            assert_array_equal(inputs[..., 0], values[f"x_{part}"][split.rows], strict=True)
            assert_array_equal(labels, values[f"y_{part}"][split.rows].astype(np.int32), strict=True)
        assert loaded.labels.outputs == 4
    assert refusal(given(values), validation=0.999) == (
        "data.validation: expected a fraction that leaves some of 20 examples to train on, got 0.999."
    )


def test_fraction_that_is_held_out_for_testing_takes_some_examples_and_leaves_some(given, refusal):
    values = {key: array for key, array in arrays().items() if not key.endswith("test")}
    loaded = given(values)(test=0.1, validation=0)
    assert_array_equal(loaded.test.rows, [1, 18])
    assert_array_equal(loaded.train.rows, np.setdiff1d(np.arange(20), loaded.test.rows))
    for fraction in (0.02, 0.99):
        assert refusal(given(values), test=fraction) == (
            "data.test: expected a fraction that holds out some of 20 examples, for the data have no test "
            f"split, and leaves some, got {fraction}."
        )


def test_pipe_in_the_place_of_data_is_refused_and_never_waited_for(tmp_path, refusal):
    os.mkfifo(tmp_path / "pipe")
    for name, reader in READERS.items():
        if reader.needs_path:
            assert f"{tmp_path}/pipe" in refusal(load, Data(name, path=str(tmp_path / "pipe")))


# Large data


@pytest.mark.slow
def test_data_larger_than_memory_stay_mapped_and_are_never_in_memory_at_once(tmp_path, monkeypatch):
    shape = (64, 64, 3)
    monkeypatch.setattr(preprocessing, "CHUNK", 64 * 4 * int(np.prod(shape)))
    save_npys(tmp_path, arrays(shape=shape, dtype=np.float32) | {"y_train": np.zeros(2**10, np.uint8)})
    (tmp_path / "x_train.npy").unlink()
    large = np.lib.format.open_memmap(tmp_path / "x_train.npy", "w+", np.float32, (2**10, *shape))
    large[-1], size = 1, large.nbytes  # 48 MiB, nearly all a hole in the file
    del large
    tracemalloc.start()  # counts NumPy's arrays too, and no memory map
    try:
        loaded = load(Data(name="npz", path=str(tmp_path), normalize=True, validation=0))
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()
    assert isinstance(loaded.train.inputs, np.memmap) and loaded.train.inputs.nbytes == size
    assert_allclose(loaded.preprocessing.mean, np.full(3, 2.0**-10), rtol=1e-4)
    assert_array_equal(loaded.train.take(slice(-2, None)).inputs[:, 0, 0, 0], [0, 1])


def test_data_larger_than_the_device_may_hold_stay_mapped_in_the_job(tmp_path):
    folder = save_npys(tmp_path / "data", arrays(n_train=64, shape=(4,), dtype=np.float32))
    for gib, on_device in (0.0, False), (1e-6, True):
        options = Data("npz", path=str(folder), device_gib=gib, validation=0)
        config = Config("unused", options, Model(norm="none", widths=(2,)), steps=1, batch_size=8)
        job = prepare(config)
        assert isinstance(job.data.train.inputs, np.memmap)
        assert (job.on_device, job.inputs.examples is not None) == (on_device, on_device)


# Fingerprints


def test_fingerprint_tells_other_data(given):
    before = given(arrays())().fingerprint
    assert len(before) == 32 and int(before, 16)
    others = []
    for key, at in [
        ("x_train", (19, 3, 3)),
        *(("x_train", (row, 1, 2)) for row in range(19)),
        ("x_test", (7, 3, 3)),
        ("y_train", 11),
        ("y_test", 0),
    ]:
        values = arrays()
        values[key][at] ^= 1
        others.append(given(values)().fingerprint)
    for shape, dtype in [((4, 4), np.uint8), ((2, 8), np.uint8), ((16,), np.uint8), ((4,), np.float32)]:
        zeros = {"x_train": np.zeros((20, *shape), dtype), "x_test": np.zeros((8, *shape), dtype)}
        others.append(given(arrays() | zeros)().fingerprint)
    assert len({before, *others}) == 1 + len(others)


def test_fingerprint_is_of_the_data_and_not_of_how_they_are_kept_or_used(given, tmp_path):
    plain = given(arrays(dtype=np.float32))().fingerprint
    for dtype, options in [
        *((dtype, {}) for dtype in ("<f4", ">f4", "f8")),
        *(
            ("<f4", options)
            for options in ({"validation": 0.5}, {"normalize": True}, {"feature_scales": (1.0, 2.0)})
        ),
    ]:
        assert given(arrays(dtype=dtype))(**options).fingerprint == plain, (dtype, options)
    folder = save_npys(tmp_path, arrays(dtype=np.float32))
    assert load(Data(name="npz", path=str(folder))).fingerprint == plain
