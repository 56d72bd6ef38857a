"""Folders of images: their layouts, the cache that they are decoded into, and what is said of them."""

import dataclasses
import errno
import os
import re
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from train.config import Config, Data
from train.data import load
from train.data.formats import decoding, folders
from train.errors import Stopped
from train.runs.directory import data_cache
from train.runs.stopping import StopRequests
from train.training.job import prepare

RANDOM = np.random.RandomState(0)


def save(path, pixels=None, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = RANDOM.randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(drawn if pixels is None else pixels).save(path)
    return np.asarray(Image.open(path).convert("RGB"))


def data(path, **options):
    return Data("folder", path=str(path), **{"cache": str(path.parent / "cache"), "validation": 0} | options)


@pytest.fixture
def photographs(tmp_path):
    """Three classes of unequal sizes, and where each image has to come out."""
    root, expected = tmp_path / "photographs", {}
    for part, counts in {"train": (3, 2, 4), "test": (1, 2, 1)}.items():
        for label, (name, count) in enumerate(zip(("cat", "dog", "elk"), counts)):
            for i in range(count):
                expected[part, label, i] = save(root / part / name / f"{i}.png")
    return root, expected


def test_folders_of_classes_become_splits_with_the_names_of_the_classes(photographs):
    root, expected = photographs
    loaded = load(data(root))
    assert loaded.labels.names == ("cat", "dog", "elk") and loaded.labels.counts == (3, 2, 4)
    for part, split in ("train", loaded.train), ("test", loaded.test):
        inputs, labels = split.take(slice(None))
        of_part = {key: pixels for key, pixels in expected.items() if key[0] == part}
        assert_array_equal(labels, [label for _, label, _ in of_part])
        assert_array_equal(inputs, np.stack([*of_part.values()]), strict=True)
        assert isinstance(split.inputs, np.memmap) and not split.inputs.flags.writeable
    assert loaded.notes == ()


def test_classes_alone_are_split_the_same_each_time_and_it_is_said(tmp_path):
    for name in ("a", "b"):
        for i in range(20):
            save(tmp_path / "all" / name / "deeper" / f"{i:02}.png")
    config = data(tmp_path / "all", test=0.2, validation=0.25)
    loaded = load(config)
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [24, 8, 8]
    rows = np.concatenate([loaded.train.rows, loaded.validation.rows, loaded.test.rows])
    assert_array_equal(np.sort(rows), np.arange(40))
    assert_array_equal(load(config).test.rows, loaded.test.rows)
    assert loaded.notes == (
        "The data have no test split: 8 of 40 examples are held out as one, the same in every run "
        "(data.test = 0.2).",
    )


def test_validation_may_have_a_folder_by_each_of_its_names(photographs):
    root, _ = photographs
    for name in ("validation", "valid", "val"):
        save(root / name / "dog" / "0.png")
        loaded = load(data(root, validation=0.5))
        assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [9, 1, 4]
        assert loaded.validation.labels.tolist() == [1]
        os.rename(root / name, root.parent / name)


def test_splits_are_found_in_any_case_and_never_taken_for_classes(photographs, refusal):
    root, _ = photographs
    for train, test in ("Train", "Test"), ("Training", "Testing"), ("TRAIN", "test"):
        for folder, name in zip(sorted(root.iterdir(), key=lambda path: path.name.lower()), (test, train)):
            folder.rename(root / name)
        loaded = load(data(root))
        assert loaded.labels.names == ("cat", "dog", "elk"), (train, test)
        assert [len(loaded.train), len(loaded.test)] == [9, 4]
    save(root / "Testing" / "cat" / "0.png")
    sentence = refusal(load, data(root))
    assert f"expected one folder of test data, got '{root}/Testing' and '{root}/test'; remove" in sentence
    (root / "TRAIN").rename(root.parent / "elsewhere")
    (root / "Testing").rename(root.parent / "nowhere")
    assert refusal(load, data(root)).startswith(f"'{root}/test' has no train/ beside it; expected")


def test_class_may_have_the_name_of_a_split(tmp_path):
    for name in ("Test", "control"):
        for i in range(4):
            save(tmp_path / "all" / name / f"{i}.png")
    assert load(data(tmp_path / "all", test=0.25)).labels.names == ("Test", "control")


def test_images_of_any_size_are_scaled_and_cut_to_squares(tmp_path, refusal):
    for i, size in enumerate([(30, 20), (20, 31), (8, 8), (64, 48)]):
        save(tmp_path / "mixed" / "ab"[i % 2] / f"{i}.png", size=size)
    assert load(data(tmp_path / "mixed", image_size=12, test=0.5)).example_shape == (12, 12, 3)
    sentence = refusal(load, data(tmp_path / "mixed", test=0.5))
    assert "pixels, where 20 x 30 are needed" in sentence
    root = tmp_path / "mixed"
    assert sentence.endswith(
        f"Set data.image_size to scale all to one size. Nor can be used: {root}/b/1.png, {root}/b/3.png."
    )


def test_images_are_decoded_once_and_again_when_a_file_changes(photographs, monkeypatch):
    root, _ = photographs
    decoded = []
    read = folders.images.read
    counting = lambda path, **options: (decoded.append(path), read(path, **options))[1]
    monkeypatch.setattr(folders.images, "read", counting)
    first = load(data(root))
    count = len(decoded)
    with monkeypatch.context() as patch:  # which may be on a disk that is only read
        patch.setattr(folders, "FileLock", None)
        again = load(data(root)).fingerprint
    assert again == first.fingerprint and len(decoded) == count == 13 + 1

    kept = np.array(first.train.inputs)
    path = root / "train" / "dog" / "1.png"
    before = path.stat()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copying tool may do
    assert load(data(root)).fingerprint != first.fingerprint
    save(root / "train" / "dog" / "2.png")
    assert len(load(data(root)).train) == 10
    path.unlink()
    assert len(load(data(root)).train) == 9
    assert_array_equal(first.train.inputs, kept)  # what a running job has mapped stays as it was


def test_cache_that_was_cut_short_is_made_anew(photographs, monkeypatch):
    root, _ = photographs
    whole = load(data(root)).fingerprint
    (cache,) = (root.parent / "cache").glob("photographs-*[!k]")
    for spoil in ("index.json", "x_train.npy", "y_test.npy"):
        (cache / spoil).write_bytes(b"{")
        assert load(data(root)).fingerprint == whole, spoil


def test_cache_that_may_only_be_read_is_read_if_it_is_whole(photographs, monkeypatch, refusal):
    root, _ = photographs
    before = load(data(root)).fingerprint

    def locked(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(folders, "FileLock", locked)
    assert load(data(root)).fingerprint == before
    save(root / "train" / "dog" / "2.png")
    assert "cannot be used: Permission denied. Give another" in refusal(load, data(root))


def test_full_disk_is_named_and_leaves_no_half_of_a_cache(photographs, monkeypatch):
    root, _ = photographs

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(decoding, "_allocate", full)
    with pytest.raises(OSError, match=re.escape(str(root.parent / "cache"))):
        load(data(root))
    assert [path.suffix for path in (root.parent / "cache").iterdir()] == [".lock"]


def test_cache_is_beside_the_run_or_where_it_was_asked_for(photographs, tmp_path):
    root, _ = photographs
    run_dir = tmp_path / "study" / "run"
    config = Config(str(run_dir), data(root, cache=None), steps=1, batch_size=2, devices=1)
    prepare(config)
    assert [path.name for path in run_dir.parent.iterdir()] == ["data-cache"]
    assert list(data_cache(run_dir).glob("photographs-*/x_train.npy"))
    assert data_cache(Path()).parent == Path.cwd().parent
    prepare(dataclasses.replace(config, data=data(root, cache=str(tmp_path / "asked"))))
    assert list((tmp_path / "asked").glob("photographs-*/x_train.npy"))


def test_what_is_made_in_the_cache_spares_whatever_else_is_there(tmp_path):
    for name in ("photographs.v1", "photographs.old", "photographs.part"):
        for i in range(2):
            save(tmp_path / name / "cat" / f"{i}.png")
    load(data(tmp_path / "photographs.v1", cache=str(tmp_path), test=0.5))
    load(data(tmp_path / "photographs.old", cache=str(tmp_path), test=0.5))
    kept = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert kept == sorted(3 * ["photographs.v1"] + 3 * ["photographs.old"] + ["photographs.part"])


def test_what_is_no_image_is_left_out_and_said(photographs):
    root, _ = photographs
    for name in ("notes.txt", "Thumbs.db", ".DS_Store", "._0.png"):
        (root / "train" / "cat" / name).write_bytes(b"no image")
    (root / "train" / "__MACOSX").mkdir()
    (root / "train" / ".hidden").mkdir()
    loaded = load(data(root))
    assert len(loaded.train) == 9 and loaded.labels.names == ("cat", "dog", "elk")
    assert loaded.notes == (f"Files in '{root}' that are no images by their names are left out: 2.",)


def test_folders_that_hold_something_else_are_refused(photographs, tmp_path, refusal):
    root, _ = photographs
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "classes" / "without_images").mkdir(parents=True)
    for path in (tmp_path / "empty", tmp_path / "file", tmp_path / "classes"):
        assert f"'{path}', which has none of it." in refusal(load, data(path))
    (root / "train" / "fox").mkdir()
    assert f"'{root}/train/fox' has no image; add some, or remove" in refusal(load, data(root))
    (root / "train" / "fox").rmdir()
    save(root / "train" / "loose.png")
    assert f"'{root}/train/loose.png' is in no folder of a class; expected" in refusal(load, data(root))
    (root / "train" / "loose.png").unlink()
    for name in ("cat/0.png", "elk/1.png"):  # the first image says how large all have to be
        (root / "train" / name).write_bytes(b"broken")
    sentence = refusal(load, data(root))
    assert sentence.startswith(f"{root}/train/cat/0.png cannot be read: cannot identify image file")
    assert sentence.endswith(f"Nor can be used: {root}/train/elk/1.png.")
    for file in root.rglob("*.png"):
        file.write_bytes(b"broken")
    assert refusal(load, data(root)).startswith(f"{root}/train/cat/0.png cannot be read: cannot identify")
    assert not list(Path(data(root).cache).glob("*/index.json"))
    (tmp_path / "locked").write_bytes(b"")
    sentence = refusal(load, data(root, cache=str(tmp_path / "locked")))
    assert sentence.startswith(f"data.cache = '{tmp_path}/locked' cannot be used: ")
    assert sentence.endswith("Give another --data.cache.")


def test_request_to_stop_ends_the_decoding_and_leaves_nothing_of_it(photographs, monkeypatch):
    root, _ = photographs
    read, decoded = decoding.images.read, []

    def read_with_a_signal(path, **options):
        decoded.append(path)
        if len(decoded) == 3:
            signal.raise_signal(signal.SIGTERM)
        return read(path, **options)

    monkeypatch.setattr(decoding.images, "read", read_with_a_signal)
    monkeypatch.setattr(decoding.os, "cpu_count", lambda: 1)
    with StopRequests() as stop, pytest.raises(Stopped), stop.at_once():
        load(data(root))
    assert [path.suffix for path in (root.parent / "cache").iterdir()] == [".lock"]
    assert load(data(root)).labels.counts == (3, 2, 4)


@pytest.mark.slow
def test_many_images_never_are_in_memory_at_once(tmp_path):
    pixels = np.zeros((128, 128, 3), np.uint8)
    for i in range(400):
        path = tmp_path / "many" / str(i % 2) / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    tracemalloc.start()  # counts what NumPy and Pillow allocate in Python, and no memory map
    try:
        loaded = load(data(tmp_path / "many"))
        assert tracemalloc.get_traced_memory()[1] < 400 * pixels.nbytes / 4
    finally:
        tracemalloc.stop()
    assert loaded.train.inputs.shape == (400, 128, 128, 3)
