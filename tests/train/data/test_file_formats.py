import gzip
import io
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
from arrays import keras_arrays as arrays
from numpy.testing import assert_array_equal

from train.data.formats import KEYS, idx, npz
from train.errors import UserError


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def same(found, wanted):
    assert list(found) == list(KEYS)
    for key in KEYS:
        assert_array_equal(found[key], wanted[key], strict=True)
    return True


def owner(array):
    """What an array is a view of, in the end."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return type(array).__name__


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ">f8"])
@pytest.mark.parametrize("save, kind", [(np.savez, "mmap"), (np.savez_compressed, "ndarray")])
def test_npz_is_mapped_where_it_is_stored_and_read_where_it_is_compressed(tmp_path, save, kind, dtype):
    given = arrays(dtype=dtype)
    save(tmp_path / "mine.npz", **given, more=np.zeros(3))
    found = npz(tmp_path / "mine.npz")
    assert same(found, given)
    assert {owner(array) for array in found.values()} == {kind}
    assert {isinstance(array, np.memmap) for array in found.values()} == {kind == "mmap"}


def test_fortran_order_is_read(tmp_path):
    given = arrays() | {"x_train": np.asfortranarray(arrays()["x_train"])}
    np.savez(tmp_path / "mine.npz", **given)
    assert same(npz(tmp_path / "mine.npz"), given)


def test_extra_fields_and_data_before_the_archive_move_no_array(tmp_path):
    given = arrays()
    with (tmp_path / "mine.npz").open("wb") as file:
        file.write(b"something before it")
        with zipfile.ZipFile(file, "w") as archive:
            for key, array in given.items():
                member = zipfile.ZipInfo(f"{key}.npy")
                member.extra = struct.pack("<HH3s", 0x4A4A, 3, b"abc")
                archive.writestr(member, saved(array))
    assert same(npz(tmp_path / "mine.npz"), given)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 cut", pickle.dumps(Bomb()), b"no archive at all", saved(np.zeros(3))]
)
def test_file_that_is_no_npz_is_named_and_no_code_in_it_runs(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(UserError, match="mine.npz cannot be read: .*; wanted an .npz file of plain arrays"):
        npz(tmp_path / "mine.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_truncated_archive_is_named(tmp_path, save, keep):
    path = tmp_path / "mine.npz"
    save(path, **arrays(n_train=500))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match="mine.npz cannot be read"):
        npz(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_changed_byte_is_named(tmp_path, save):
    path = tmp_path / "mine.npz"
    save(path, **arrays(n_train=500))
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="mine.npz cannot be read"):
        npz(path)


@pytest.mark.parametrize("objects", [np.array([Bomb()], object), np.array([(Bomb(),)], [("a", object)])])
def test_arrays_of_objects_are_named_and_no_code_in_them_runs(tmp_path, monkeypatch, objects):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "mine.npz", **arrays() | {"x_train": objects})
    with pytest.raises(UserError, match="mine.npz cannot be read: Object arrays cannot be loaded"):
        npz(tmp_path / "mine.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (saved(np.zeros(7))[:-1], "x_train.npy has 55 bytes after its header, which announces 56"),
        (saved(np.zeros(7)) + b"more", "x_train.npy has 60 bytes after its header, which announces 56"),
        (saved(np.zeros(7))[:40], "EOF"),
        (saved(np.zeros(7)).replace(b"(7,)", b"(-7)"), "shape is not valid"),
        (saved(np.zeros(7)).replace(b"'<f8'", b"'<q9'"), "descr is not a valid dtype"),
        (b"text", "magic string"),
        (b"", "magic string"),
    ],
)
def test_malformed_member_is_named_with_its_file(tmp_path, content, message):
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        for key in KEYS:
            archive.writestr(f"{key}.npy", content)
    with pytest.raises(UserError, match=f"mine.npz cannot be read: .*{message}"):
        npz(tmp_path / "mine.npz")


def test_header_that_python_2_wrote_is_read_without_a_warning(tmp_path):
    given = arrays() | {"x_train": np.arange(7.0)}
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        for key, array in given.items():
            archive.writestr(f"{key}.npy", saved(array).replace(b"(7,), }  ", b"(7L,), } "))
    with warnings.catch_warnings(record=True) as caught:
        assert same(npz(tmp_path / "mine.npz"), given) and not caught


def test_missing_arrays_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        for name in ("x_train.npy", "x_test", "y_train.npy", "y_test.npy"):
            archive.writestr(name, b"text")
    with pytest.raises(
        UserError, match=r"mine.npz has \['x_train.npy', 'x_test', .*\]; wanted \['x_test.npy'\] too"
    ):
        npz(tmp_path / "mine.npz")


IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def save_idx(folder, rename=lambda name: name, change=lambda content: content):
    """Writes the four files into a folder, the training images under another name or changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, name in IDX_FILES.items():
        name, content = rename(name), idx_bytes(arrays()[key])
        content = change(content) if key == "x_train" else content
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


@pytest.mark.parametrize("subfolder", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("ending, kind", [("", "mmap"), (".gz", "bytes")])
@pytest.mark.parametrize("mark", "-.")
def test_idx_files_are_found_under_each_name_that_they_go_by(tmp_path, subfolder, ending, kind, mark):
    save_idx(tmp_path / subfolder, lambda name: name.replace("-idx", f"{mark}idx") + ending)
    found = idx(tmp_path)
    assert same(found, arrays())
    assert {owner(array) for array in found.values()} == {kind}


def test_folder_without_idx_files_has_none(tmp_path):
    assert idx(tmp_path) == {} and idx(tmp_path / "nowhere") == {}


def test_missing_idx_files_are_named(tmp_path):
    save_idx(tmp_path)
    for key in ("y_train", "y_test"):
        (tmp_path / IDX_FILES[key]).unlink()
    with pytest.raises(
        UserError, match=f"{tmp_path} has no {IDX_FILES['y_train']}, no {IDX_FILES['y_test']}; wanted each"
    ):
        idx(tmp_path)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: b"", "mmap an empty file|requires a buffer of 16 bytes"),
        (lambda content: content[:10], "requires a buffer of 16 bytes"),
        (lambda content: content[:-1], r"it has 319 bytes after its header, which announces \[20, 4, 4\]"),
        (lambda content: content + b"1", r"it has 321 bytes after its header, which announces \[20, 4, 4\]"),
        (lambda content: idx_bytes(arrays()["y_train"]), "it starts with the number 2049 and not 2051"),
        (lambda content: b"\x89PNG" + content, "it starts with the number 2303741511 and not 2051"),
        (lambda content: b"\0\0\x08\x03" + b"\xff" * 12, "it has 0 bytes after its header"),
    ],
)
def test_malformed_idx_file_is_named(tmp_path, ending, change, message):
    save_idx(tmp_path, lambda name: name + ending, change)
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte{ending} cannot be read: .*({message})"):
        idx(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_gz_that_is_cut_is_named(tmp_path, keep):
    save_idx(tmp_path, lambda name: name + ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(
        UserError, match="ubyte.gz cannot be read: .*; wanted an IDX file of bytes along 3 axes"
    ):
        idx(tmp_path)
