import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from arrays import keras_arrays as arrays
from numpy.testing import assert_allclose, assert_array_equal

from train.config import Data
from train.data import dataset as data
from train.data import sources
from train.errors import UserError


def load_npz(tmp_path, arrays, save=np.savez, **options):
    save(tmp_path / "mine.npz", **arrays)
    return data.load(Data(name="npz", path=str(tmp_path / "mine.npz"), **options))


@pytest.mark.parametrize(
    "given, sizes", [({}, [1293, 144, 360, 10]), ({"validation": 0}, [1437, 0, 360, 10])], ids=str
)
def test_digits_are_split_in_three(given, sizes):
    digits = data.load(Data(**given))
    assert [len(digits.train), len(digits.validation), len(digits.test), digits.classes] == sizes


@pytest.mark.parametrize("fraction, held_out", [(0.0, []), (0.25, [1, 8, 10, 18, 19])])
def test_validation_is_held_out_of_the_training_data_and_never_of_the_test_data(tmp_path, fraction, held_out):
    given = arrays()
    loaded = load_npz(tmp_path, given, validation=fraction)
    # The same rows on every machine, as whichever checkpoint is best depends on them.
    assert_array_equal(loaded.validation.rows, np.array(held_out, np.int64), strict=True)
    assert_array_equal(loaded.train.rows, np.setdiff1d(np.arange(20), held_out), strict=True)
    assert_array_equal(loaded.test.rows, np.arange(8), strict=True)
    for split, part in (loaded.train, "train"), (loaded.validation, "train"), (loaded.test, "test"):
        inputs, labels = split.take(slice(None))
        assert_array_equal(inputs[..., 0], given[f"x_{part}"][split.rows], strict=True)
        assert_array_equal(labels, given[f"y_{part}"][split.rows].astype(np.int32), strict=True)
    assert loaded.classes == 4


def test_splits_share_the_memory_map_and_take_copies_of_few_examples(tmp_path):
    loaded = load_npz(tmp_path, arrays(), validation=0.25)
    assert isinstance(loaded.train.inputs, np.memmap) and loaded.train.inputs is loaded.validation.inputs
    for at in slice(2, 5), np.array([4, 2, 4]):
        inputs, labels = loaded.train.take(at)
        assert type(inputs) is np.ndarray and not np.shares_memory(inputs, loaded.train.inputs)
        assert_array_equal(inputs, loaded.train.inputs[loaded.train.rows[at]])
        assert_array_equal(labels, loaded.train.labels[loaded.train.rows[at]])


@pytest.mark.parametrize("dtype, scale", [(np.uint8, 255), (np.float32, 1)])
def test_bytes_become_numbers_in_0_to_1_and_floating_point_is_left_as_it_is(tmp_path, dtype, scale):
    given = arrays(dtype=dtype)
    loaded = load_npz(tmp_path, given, validation=0)
    found = loaded.preprocessing(loaded.train.take(slice(None)).inputs)
    assert_array_equal(found[..., 0], np.float32(given["x_train"]) / np.float32(scale), strict=True)
    assert {(leaf.shape, leaf.dtype.name) for leaf in loaded.preprocessing} == {((), "float32")}


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (7,)], ids=str)
@pytest.mark.parametrize("dtype, chunk", [(np.uint8, sources.CHUNK), (np.float32, 1000)])
def test_normalizing_is_by_mean_and_standard_deviation_of_the_training_split_alone(
    tmp_path, monkeypatch, shape, dtype, chunk
):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    given = arrays(n_train=200, shape=shape, dtype=dtype)
    first = load_npz(tmp_path, given, validation=0.25, normalize=True)
    examples = first.train.take(slice(None)).inputs.astype(np.float64)
    over = tuple(range(examples.ndim - 1))  # all but the channels of images, all but the features of vectors
    assert_allclose(first.preprocessing.mean, examples.mean(over), rtol=1e-6)
    assert_allclose(first.preprocessing.std, examples.std(over), rtol=1e-6)
    assert {leaf.dtype for leaf in first.preprocessing} == {np.dtype(np.float32)}
    seen = first.preprocessing(first.train.take(slice(None)).inputs)
    assert_allclose(seen, (examples - examples.mean(over)) / examples.std(over), atol=1e-5)
    given["x_test"][:] = given["x_train"][first.validation.rows] = 99
    again = load_npz(tmp_path, given, validation=0.25, normalize=True)
    for one, other in zip(first.preprocessing, again.preprocessing):
        assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("constant", [0, 0.1, -1e6, 1 / 3])
@pytest.mark.parametrize("n", [100, 1437])
def test_constant_feature_becomes_0(tmp_path, monkeypatch, constant, n):
    monkeypatch.setattr(sources, "CHUNK", 4 * 3 * 33)
    given = arrays(n_train=n, shape=(3,), dtype=np.float32)
    given["x_train"][:, 1] = constant
    preprocessing = load_npz(tmp_path, given, normalize=True).preprocessing
    assert preprocessing.std[1] == 1 and preprocessing.std[0] > 50
    assert_allclose(preprocessing(given["x_train"])[:, 1], 0, atol=1e-6 * abs(constant))


def test_inputs_too_large_to_normalize_are_named(tmp_path):
    given = arrays(shape=(3,), dtype=np.float32)
    given["x_train"] *= np.float32(1e30)
    with pytest.raises(UserError, match="data.normalize = true, and the inputs .* data.normalize = false"):
        load_npz(tmp_path, given, normalize=True)


@pytest.mark.parametrize("normalize", [False, True])
def test_preprocessing_is_the_same_inside_jit(tmp_path, normalize):
    loaded = load_npz(tmp_path, arrays(shape=(4, 4, 3)), normalize=normalize)
    inputs, _ = loaded.test.take(slice(None))
    inside = jax.jit(lambda preprocessing, inputs: preprocessing(inputs))(loaded.preprocessing, inputs)
    assert_allclose(inside, loaded.preprocessing(inputs), rtol=1e-6, atol=1e-6)
    assert inside.dtype == np.float32


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (7,)], ids=str)
def test_each_feature_is_multiplied_with_a_number_of_its_own(tmp_path, shape, dtype, normalize):
    given = arrays(n_train=50, shape=shape, dtype=dtype)
    plain = load_npz(tmp_path, given, normalize=normalize)
    scaled = load_npz(tmp_path, given, normalize=normalize, feature_scales=(0.01, 100.0))
    inputs = plain.train.take(slice(None)).inputs
    scales = 0.01 * 10_000 ** np.random.RandomState(0).uniform(size=inputs.shape[1:])
    # NumPy's generator gives these wherever it runs.
    assert_allclose(
        scales.ravel()[:3], 0.01 * 10_000 ** np.array([0.5488135, 0.71518937, 0.60276338]), rtol=1e-6
    )
    assert_allclose(scaled.preprocessing(inputs), plain.preprocessing(inputs) * scales, rtol=1e-5)
    assert scaled.preprocessing(inputs).dtype == np.float32
    assert {leaf.dtype.name for leaf in scaled.preprocessing} == {"float32"}
    inside = jax.jit(lambda preprocessing, inputs: preprocessing(inputs))(scaled.preprocessing, inputs)
    assert_allclose(inside, scaled.preprocessing(inputs), rtol=1e-5, atol=1e-5)


def test_feature_scales_are_log_uniform_in_their_limits(tmp_path):
    loaded = load_npz(
        tmp_path, arrays(shape=(4096,), dtype=np.float32), feature_scales=(0.5, 8.0), validation=0
    )
    shares = np.sort(np.log2(1 / loaded.preprocessing.std) + 1) / 4
    assert -1e-6 <= shares[0] < 0.002 and 0.998 < shares[-1] <= 1 + 1e-6
    assert_allclose(shares, np.linspace(0, 1, 4096), atol=0.03)


def test_feature_scales_are_the_same_for_every_job_and_only_its_limits_matter(tmp_path):
    given, limits = arrays(n_train=50, shape=(7,), dtype=np.float32), (0.1, 10.0)
    scales = lambda **options: 1 / load_npz(tmp_path, given, **options).preprocessing.std
    usual = scales(feature_scales=limits)
    assert_array_equal(scales(feature_scales=limits, validation=0.5), usual)
    normalized = load_npz(tmp_path, given, normalize=True, feature_scales=limits).preprocessing.std
    std = load_npz(tmp_path, given, normalize=True).preprocessing.std
    assert_allclose(std / normalized, usual, rtol=1e-6)
    assert_allclose(scales(feature_scales=(10.0, 1000.0)), 100 * usual, rtol=1e-5)
    assert_allclose(scales(feature_scales=(2.0, 2.0)), np.full(7, 2), rtol=1e-6)


def test_data_larger_than_memory_may_hold_are_never_there_at_once(tmp_path):
    given = arrays(shape=(2**10,), dtype=np.float32) | {"y_train": np.zeros(2**16, np.uint8)}
    del given["x_train"]
    np.savez(tmp_path / "large.npz", **given)
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**16, 2**10)}  # 256 MiB
    with (
        zipfile.ZipFile(tmp_path / "large.npz", "a") as archive,
        archive.open("x_train.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(2**8):
            file.write(bytes(2**20))
    tracemalloc.start()  # counts NumPy's arrays too, and no memory map
    try:
        loaded = data.load(Data(name="npz", path=str(tmp_path / "large.npz"), normalize=True))
        assert tracemalloc.get_traced_memory()[1] < 2**28 / 3
    finally:
        tracemalloc.stop()
    assert loaded.train.inputs.shape == header["shape"] and not loaded.train.take(slice(9)).inputs.any()


@pytest.mark.parametrize(
    "key, at",
    [
        ("x_train", (19, 3, 3)),
        ("x_train", (0, 0, 0)),
        ("x_test", (7, 3, 3)),
        ("y_train", 11),
        ("y_test", 0),
    ],
)
def test_fingerprint_tells_other_data(tmp_path, key, at):
    given = arrays()
    before = load_npz(tmp_path, given).fingerprint
    given[key][at] ^= 1
    assert load_npz(tmp_path, given).fingerprint != before
    assert len(before) == 16 and int(before, 16)


def test_fingerprint_tells_shapes_and_dtypes_of_the_same_bytes(tmp_path):
    prints = {
        load_npz(
            tmp_path,
            arrays()
            | {f"x_{part}": np.zeros((n, *shape), dtype) for part, n in (("train", 20), ("test", 8))},
        ).fingerprint
        for shape, dtype in [((4, 4), np.uint8), ((2, 8), np.uint8), ((16,), np.uint8), ((4,), np.float32)]
    }
    assert len(prints) == 4


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8"])
@pytest.mark.parametrize(
    "options",
    [{}, {"save": np.savez_compressed}, {"validation": 0.5}, {"normalize": True}]
    + [{"feature_scales": (0.1, 10.0)}],
)
def test_fingerprint_is_of_the_data_and_not_of_how_they_are_kept_or_used(tmp_path, dtype, options):
    plain = load_npz(tmp_path, arrays(dtype=np.float32)).fingerprint
    (tmp_path / "elsewhere").mkdir()
    assert load_npz(tmp_path / "elsewhere", arrays(dtype=dtype), **options).fingerprint == plain


def test_validation_that_leaves_nothing_to_train_on_is_named(tmp_path):
    with pytest.raises(UserError, match="data.validation = 0.999 leaves no example to train on"):
        load_npz(tmp_path, arrays(), validation=0.999)


def test_labels_that_cannot_be_classes_are_named(tmp_path):
    with pytest.raises(UserError, match="has labels up to 20 and 20 training examples; wanted labels from 0"):
        load_npz(tmp_path, arrays() | {"y_test": np.full(8, 20)})


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
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_eval_batches_hold_each_example_once_in_one_size(n, dtype):
    rows = np.arange(0, 2 * n, 2)
    split = data.Split(np.arange(1, 2 * n + 1, dtype=dtype)[:, None], np.arange(2 * n, dtype=np.int32), rows)
    batches = list(data.eval_batches(split, 8))
    assert {(leaf.shape, leaf.dtype.name) for batch in batches for leaf in batch} == {
        ((8, 1), np.dtype(dtype).name),
        ((8,), "int32"),
        ((8,), "bool"),
    }
    inputs, labels, mask = (np.concatenate(leaves) for leaves in zip(*batches))
    assert_array_equal(labels[mask], split.labels[rows])
    assert_array_equal(inputs[mask], split.inputs[rows])
    assert not inputs[~mask].any() and not labels[~mask].any()


def test_split_of_no_examples_has_no_eval_batches():
    nothing = data.Split(np.zeros((3, 2), np.float32), np.zeros(3, np.int32), np.arange(0))
    assert list(data.eval_batches(nothing, 8)) == []
