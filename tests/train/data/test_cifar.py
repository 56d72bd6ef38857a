import io
import os
import pickle
import struct
import tarfile
import warnings

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from train.data.cifar import ARCHIVES, BATCHES, FOLDERS, cifar10
from train.errors import UserError


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


PIXELS = np.random.RandomState(0).randint(0, 256, (6, 4, 3072)).astype(np.uint8)  # of four images a batch
LABELS = np.random.RandomState(1).randint(0, 10, (6, 4)).astype(np.uint8)


def binary(pixels, labels):
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


def pickled(pixels, labels, protocol=4):
    return pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol)


def fortran(pixels, labels):
    return pickled(np.asfortranarray(pixels), labels)


def of_python_2(pixels, labels):
    """Writes what Python 2 and the NumPy of its time wrote, protocol 2: these are the files' own opcodes."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    def number(value):
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + short(b"b")
    array += b"\x87R(" + number(1) + number(len(pixels)) + number(3072) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + short(b"u1") + number(0) + number(1) + b"\x87R("
    dtype += number(3) + short(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    array += dtype + b"\x89T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    numbers = b"](" + b"".join(number(int(label)) for label in labels) + b"e"
    return b"\x80\x02}(" + short(b"labels") + numbers + short(b"data") + array + b"u."


FORMS = {
    "binary": (binary, ".bin"),
    "python 2": (of_python_2, ""),
    "fortran order": (fortran, ""),
} | {f"protocol {p}": (lambda pixels, labels, p=p: pickled(pixels, labels, p), "") for p in (0, 1, 2, 3, 4)}


def files(form="binary"):
    """The six batches, as they are in the folder and the archive that are distributed."""
    write, ending = FORMS[form]
    return {name + ending: write(pixels, labels) for name, pixels, labels in zip(BATCHES, PIXELS, LABELS)}


def save(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def save_tar(path, contents, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in (contents | {"readme.html": b"<html>"}).items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def holds_everything(found):
    images = PIXELS.reshape(24, 3, 32, 32).transpose(0, 2, 3, 1)
    assert_array_equal(found["x_train"], images[:20], strict=True)
    assert_array_equal(found["x_test"], images[20:], strict=True)
    assert_array_equal(found["y_train"], LABELS.ravel()[:20], strict=True)
    assert_array_equal(found["y_test"], LABELS.ravel()[20:], strict=True)
    assert found["x_train"].flags.c_contiguous and found["x_test"].flags.c_contiguous
    return True


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_arrays_without_a_warning(tmp_path, form):
    with warnings.catch_warnings(record=True) as caught:
        assert holds_everything(cifar10(save(tmp_path, files(form)))) and not caught


@pytest.mark.parametrize("form", ["binary", "python 2"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archive_is_read_as_it_is(tmp_path, form, mode):
    assert holds_everything(cifar10(save_tar(tmp_path / "mine.tar.gz", files(form), mode)))
    assert os.listdir(tmp_path) == ["mine.tar.gz"]


@pytest.mark.parametrize("name, form", list(zip(FOLDERS + ARCHIVES, ["binary", "python 2"] * 2)))
def test_folder_may_hold_what_is_distributed(tmp_path, name, form):
    (save if name in FOLDERS else save_tar)(tmp_path / name, files(form))
    assert holds_everything(cifar10(tmp_path))


def test_folder_and_archive_without_batches_have_none(tmp_path):
    assert cifar10(tmp_path) == cifar10(tmp_path / "nowhere") == {}
    assert cifar10(save_tar(tmp_path / "mine.tar.gz", {})) == {}


@pytest.mark.parametrize("form, ending", [("binary", ".bin"), ("python 2", "")])
@pytest.mark.parametrize("where", [lambda path: path, lambda path: path / "mine.tar.gz"])
def test_missing_batches_are_named(tmp_path, form, ending, where):
    contents = files(form)
    del contents[f"data_batch_3{ending}"], contents[f"test_batch{ending}"]
    path = where(tmp_path)
    (save if path == tmp_path else save_tar)(path, contents)
    with pytest.raises(
        UserError, match=rf"{path} has \[.*\]; wanted \['data_batch_3{ending}', 'test_batch{ending}'\] too"
    ):
        cifar10(path)


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"\x1f\x8b\x08 cut"])
def test_file_that_is_no_archive_is_named(tmp_path, content):
    (tmp_path / "mine.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match="mine.tar.gz cannot be read: .*; wanted a .tar or .tar.gz file"):
        cifar10(tmp_path / "mine.tar.gz")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated_archive_is_named(tmp_path, keep, mode):
    path = save_tar(tmp_path / "mine.tar.gz", files(), mode)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match="mine.tar.gz (cannot be read|has .* wanted .* too)"):
        cifar10(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it has 0 images and 0 labels"),
        (binary(PIXELS[0], LABELS[0])[:-1], "cannot reshape array of size 12291"),
        (binary(PIXELS[0], LABELS[0] + 10), "it has the label 1"),
    ],
)
def test_malformed_binary_batch_is_named(tmp_path, content, message):
    save(tmp_path, files() | {"data_batch_2.bin": content})
    with pytest.raises(
        UserError, match=f"{tmp_path}/data_batch_2.bin cannot be read: {message}.*; wanted one record or more"
    ):
        cifar10(tmp_path)


GOOD = {b"data": PIXELS[0], b"labels": LABELS[0].tolist()}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "Ran out of input"),
        (pickle.dumps(GOOD)[:-100], "truncated|Ran out of input"),
        (pickle.dumps([]), "list indices"),
        (pickle.dumps({b"data": PIXELS[0]}), "b'labels'"),
        (pickle.dumps(GOOD | {b"data": [1, 2]}), "'list' object has no attribute"),
        (pickle.dumps(GOOD | {b"data": PIXELS[0, :, :9]}), r"b'data' has dtype 'u1' and shape \(4, 9\)"),
        (pickle.dumps(GOOD | {b"data": PIXELS[0] * 1.0}), r"b'data' has dtype 'f8' and shape"),
        (pickle.dumps(GOOD | {b"data": PIXELS[0].astype(object)}), "b'data' has dtype 'O8'"),
        (pickle.dumps(GOOD | {b"data": PIXELS[0, :3]}), "it has 3 images and 4 labels"),
        (pickle.dumps(GOOD | {b"labels": [1, 2, 3, 10]}), "it has the label 10"),
        (pickle.dumps(GOOD | {b"labels": [1, 2, 3, -1]}), r"bytes must be in range\(0, 256\)"),
        (pickle.dumps(GOOD | {b"labels": [1, 2, 3, 0.5]}), "cannot be interpreted as an integer"),
        (pickle.dumps(GOOD | {b"labels": "text"}), "string argument without an encoding"),
        (pickle.dumps(GOOD | {b"more": io.BytesIO()}), "it asks for _io.BytesIO, which is no array"),
        (pickle.dumps(GOOD | {b"more": Bomb()}), "it asks for (posix|nt).mkdir, which is no array"),
        (b"cnumpy\nload\n(Vexploded.npy\ntR.", "it asks for numpy.load, which is no array"),
        (b"cbuiltins\neval\n(Vopen('exploded', 'w')\ntR.", "it asks for builtins.eval"),
        (b"(S'exploded'\niposix\nmkdir\n.", "it asks for posix.mkdir"),
        (b"cnumpy\nndarray.tofile\n.", "it asks for numpy.ndarray.tofile"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0etesting.os.abc\x93.", "it asks for numpy.testing.os.abc"),
    ],
)
def test_pickle_of_anything_but_arrays_is_named_and_no_code_in_it_runs(
    tmp_path, monkeypatch, content, message
):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, files("python 2") | {"data_batch_2": content})
    with pytest.raises(
        UserError, match=f"{tmp_path}/data_batch_2 cannot be read: .*({message}).*; wanted a pickled dict"
    ):
        cifar10(tmp_path)
    assert not (tmp_path / "exploded").exists()
