"""MNIST's IDX files, each plain or .gz."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest

from tests.helpers.arrays import assert_same, keras_arrays, save_npys
from train.data.formats.arrays import IDX_FILES, KEYS, mnist

ARRAYS = keras_arrays()


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def save_idx(folder, *, mark="-", ending="", images=idx_bytes(ARRAYS["x_train"])):
    """Write the four files into a folder, with other training images where they are given."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, name in zip(KEYS, IDX_FILES):
        content = images if key == "x_train" else idx_bytes(ARRAYS[key])
        path = folder / f"{name.replace('-idx', mark + 'idx')}{ending}"
        path.write_bytes(gzip.compress(content) if ending else content)
    return folder


def test_idx_files_are_found_under_each_name_that_they_go_by(tmp_path):
    assert mnist(tmp_path) is None
    for subfolder in (".", "raw", "MNIST/raw"):
        for ending in ("", ".gz"):
            for mark in "-.":
                root = tmp_path / f"{subfolder}{ending}{mark}".replace("/", "_")
                save_idx(root / subfolder, mark=mark, ending=ending)
                assert_same(mnist(root).arrays, ARRAYS, case=root.name)


def test_mnist_may_be_an_archive_or_npy_files_too(tmp_path):
    np.savez(tmp_path / "mnist.npz", **ARRAYS)
    save_npys(tmp_path / "folder", ARRAYS)
    for path in (tmp_path, tmp_path / "mnist.npz", tmp_path / "folder"):
        assert_same(mnist(path).arrays, ARRAYS, case=path)


def test_missing_idx_files_are_named(tmp_path, refusal):
    for name in save_idx(tmp_path).glob("*-labels-*"):
        name.unlink()
    assert refusal(mnist, tmp_path) == (
        f"{tmp_path}: expected {', '.join(IDX_FILES)}, got no {IDX_FILES[1]} and no {IDX_FILES[3]}."
    )


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_malformed_idx_file_is_named(tmp_path, ending, refusal):
    good = idx_bytes(ARRAYS["x_train"])
    for content, reason in [
        (b"", "requires a buffer of 16 bytes"),
        (good[:10], "requires a buffer of 16 bytes"),
        (good[:-1], "its header announces [20, 4, 4] bytes, and there are fewer"),
        (good + b"1", "its header announces [20, 4, 4] bytes, and there are more"),
        (b"\0\0\x08\x03" + b"\xff" * 12, ""),
        (idx_bytes(ARRAYS["y_train"]), "it starts with the number 2049 and not 2051"),
        (b"\x89PNG" + good, "it starts with the number 2303741511 and not 2051"),
    ]:
        save_idx(tmp_path, ending=ending, images=content)
        sentence = refusal(mnist, tmp_path)
        assert f"{IDX_FILES[0]}{ending} cannot be read: " in sentence and reason in sentence, content[:20]
        assert sentence.endswith("; expected an IDX file of bytes along 3 axes.")


def test_gz_that_is_cut_is_named(tmp_path, refusal):
    path = save_idx(tmp_path, ending=".gz") / f"{IDX_FILES[0]}.gz"
    content = path.read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert f"{path} cannot be read: " in refusal(mnist, tmp_path), size


def test_gz_is_unpacked_no_further_than_its_header_announces(tmp_path, refusal):
    save_idx(tmp_path, ending=".gz", images=idx_bytes(ARRAYS["x_train"]) + bytes(2**26))
    tracemalloc.start()
    try:
        assert "and there are more" in refusal(mnist, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
