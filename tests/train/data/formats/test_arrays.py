"""Each reader returns what its files hold, and says in a sentence what is wrong with them."""

import io
import os
import pickle
import re
import warnings
import zipfile
from typing import get_args

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.helpers.arrays import Bomb, assert_same, keras_arrays, save_npys
from train.config import DataName
from train.data.formats import arrays
from train.data.formats.arrays import digits, npz
from train.data.formats.readers import READERS

ARRAYS = keras_arrays()


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(autouse=True)
def _nothing_explodes(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    yield
    assert not os.listdir()


def test_the_schema_and_the_table_of_readers_have_the_same_names():
    assert set(READERS) == set(get_args(DataName))


def test_digits_have_a_fixed_test_split_and_every_example_once(tmp_path):
    found = digits(tmp_path)
    assert [file.name for file in found.files] == ["digits.csv.gz"]
    found = found.arrays
    assert {key: (array.shape, array.dtype.name) for key, array in found.items()} == {
        "x_train": ((1437, 8, 8, 1), "float32"),
        "y_train": ((1437,), "int32"),
        "x_test": ((360, 8, 8, 1), "float32"),
        "y_test": ((360,), "int32"),
    }
    images, labels = (np.concatenate([found[f"{name}_train"], found[f"{name}_test"]]) for name in "xy")
    # As scikit-learn's load_digits has them, from 0 to 16.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len({image.tobytes() for image in images}) == 1797 and 16 * images.sum(dtype=float) == 561_718
    top = np.float32([[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]) / 16
    assert labels[(images[:, :2, :, 0] == top).all((1, 2))].tolist() == [0]
    # The split itself is part of every number in the documentation.
    assert_array_equal(found["y_test"][:12], [4, 5, 6, 9, 4, 7, 8, 9, 9, 6, 9, 9])


def test_digits_without_scikit_learn_say_what_to_install(tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(arrays, "find_spec", lambda name: None)
    assert refusal(digits, tmp_path) == "data.name = 'digits' needs scikit-learn; pip install scikit-learn."


# NumPy's files


def test_npz_is_read_however_it_was_written(tmp_path):
    path = tmp_path / "mine.npz"
    for dtype in (np.uint8, np.float32, ">f8"):
        given = keras_arrays(dtype=dtype)
        given["x_test"] = np.asfortranarray(given["x_test"])
        for save in (np.savez, np.savez_compressed):
            save(path, **given, more=np.zeros(3))
            assert_same(npz(path).arrays, given, f"{dtype} {save.__name__}")


def test_folder_may_hold_the_archive_or_npy_files_which_stay_memory_maps(tmp_path):
    assert npz(tmp_path) is None
    given = ARRAYS | {"x_train": np.asfortranarray(ARRAYS["x_train"]), "more": np.zeros(3)}
    found = npz(save_npys(tmp_path, given)).arrays
    assert_same(found, ARRAYS)
    for array in found.values():
        # What a memory map refuses, nobody does to the user's file by mistake.
        assert isinstance(array, np.memmap) and not array.flags.writeable
    np.savez(tmp_path / "npz.npz", **keras_arrays(n_train=5))
    assert len(npz(tmp_path).arrays["x_train"]) == 5


@pytest.mark.parametrize("where", ["npz", "folder"])
def test_header_that_python_2_wrote_is_read_without_a_warning(tmp_path, where):
    given = ARRAYS | {"x_train": np.arange(7.0)}
    files = {f"{key}.npy": saved(array).replace(b"(7,), }  ", b"(7L,), } ") for key, array in given.items()}
    with warnings.catch_warnings(record=True) as caught:
        assert_same(npz(write(tmp_path, where, files)).arrays, given)
    assert not caught


def write(folder, where, files):
    """Write files into a folder or an archive of zip format, and returns what to read."""
    if where == "folder":
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder
    with zipfile.ZipFile(folder / "mine.npz", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder / "mine.npz"


def test_file_that_is_no_npz_is_refused_and_no_code_in_it_runs(tmp_path, refusal):
    path = tmp_path / "mine.npz"
    for content in (b"", b"PK\x03\x04 cut", pickle.dumps(Bomb()), b"no archive at all", saved(np.zeros(3))):
        path.write_bytes(content)
        sentence = refusal(npz, path)
        assert (
            " cannot be read: " in sentence
            and "; expected an .npz file of plain arrays (of texts, save y.astype(str))." in sentence
        )


def test_damaged_npz_is_refused(tmp_path, refusal):
    path = tmp_path / "mine.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, **keras_arrays(n_train=500))
        content = path.read_bytes()
        for keep in (0.3, 0.9, 0.999):
            path.write_bytes(content[: int(keep * len(content))])
            assert " cannot be read: " in refusal(npz, path), (save, keep)
        path.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
        assert " cannot be read: " in refusal(npz, path), save


@pytest.mark.parametrize("where", ["npz", "folder"])
def test_array_that_is_none_is_refused_and_no_code_in_it_runs(tmp_path, where, refusal):
    for content, reason in [
        (saved(np.array([Bomb()], object)), "[Oo]bject"),
        (saved(np.array([(Bomb(),)], [("a", object)])), "[Oo]bject"),
        (pickle.dumps(Bomb()), "magic string|is no array"),
        (saved(np.zeros(7))[:-1], "array data|mmap length"),
        (saved(np.zeros(7))[:40], "EOF"),
        (saved(np.zeros(7)).replace(b"(7,)", b"(-7)"), "shape is not valid"),
        (saved(np.zeros(7)).replace(b"'<f8'", b"'<q9'"), "descr is not a valid dtype"),
        (b"no array at all", "magic string|is no array"),
        (b"", "magic string|is no array"),
    ]:
        files = {f"{key}.npy": saved(array) for key, array in ARRAYS.items()} | {"x_train.npy": content}
        path = write(tmp_path, where, files)
        name = "mine.npz" if where == "npz" else "x_train.npy"
        assert re.search(f"{name} cannot be read: .*({reason})", refusal(npz, path)), content[:20]


@pytest.mark.parametrize("where", ["npz", "folder"])
def test_test_and_validation_data_may_be_missing_but_not_half_of_them(tmp_path, where, refusal):
    keys = [f"{axis}_{part}" for part in ("train", "test", "validation") for axis in "xy"]
    for given in (keys[:2], keys[:4], keys, keys[:2] + keys[4:]):
        folder = tmp_path / ",".join(given)
        folder.mkdir()
        path = write(folder, where, {f"{key}.npy": saved(np.arange(7)) for key in given})
        found = npz(path)
        assert found.arrays.keys() == set(given) and found.notes == ()
    for given, missing in [
        (keys[:1], "y_train"),
        (keys[1:2], "x_train"),
        (keys[:3], "y_test"),
        (keys[:2] + keys[5:], "x_validation"),
        (keys[2:4], "x_train and no y_train"),
    ]:
        folder = tmp_path / "-".join(given)
        folder.mkdir()
        path = write(folder, where, {f"{key}.npy": saved(ARRAYS["y_test"]) for key in given})
        assert refusal(npz, path).endswith(f", got no {missing}."), given
    path = write(tmp_path, "npz", {"other.npy": saved(np.zeros(3))})
    assert refusal(npz, path) == f"{path}: expected x_train, y_train, got 'other'."


@pytest.mark.parametrize("where", ["npz", "folder"])
def test_arrays_that_are_not_read_are_said(tmp_path, where):
    names = ("x_train", "y_train", "x_val", "y_val")
    path = write(tmp_path, where, {f"{name}.npy": saved(np.arange(7)) for name in names})
    (note,) = npz(path).notes
    assert note.startswith(f"Left out of '{path}': 'x_val', 'y_val'; expected x_train, y_train, x_test, ")
    assert note.endswith("x_validation, y_validation.")
