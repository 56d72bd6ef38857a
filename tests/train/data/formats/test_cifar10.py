"""CIFAR-10's binary batches, in folders and archives."""

import io
import tarfile

import numpy as np

from tests.helpers.arrays import assert_same, save_npys
from train.data.formats.arrays import CIFAR10_FILES, KEYS, cifar10

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 4, 3072)).astype(np.uint8)  # of four images a batch
LABELS = np.random.RandomState(1).randint(0, 10, (6, 4)).astype(np.uint8)
IMAGES = PIXELS.reshape(24, 3, 32, 32).transpose(0, 2, 3, 1)
CIFAR10 = dict(zip(KEYS, (IMAGES[:20], LABELS.ravel()[:20], IMAGES[20:], LABELS.ravel()[20:])))


def records(pixels, labels):
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


BATCHES = {name: records(*batch) for name, *batch in zip(CIFAR10_FILES, PIXELS, LABELS)}


def save_batches(folder, batches):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in batches.items():
        (folder / name).write_bytes(content)
    return folder


def save_tar(path, batches, mode="w:gz"):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in (batches | {"readme.html": b"<html>"}).items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_cifar10_is_found_in_each_form_that_it_has(tmp_path):
    np.savez(tmp_path / "mine.npz", **CIFAR10)
    for path in (
        tmp_path / "mine.npz",
        save_npys(tmp_path / "arrays", CIFAR10),
        save_batches(tmp_path / "batches", BATCHES),
        save_batches(tmp_path / "unpacked" / "cifar-10-batches-bin", BATCHES).parent,
        save_tar(tmp_path / "packed" / "cifar-10-binary.tar.gz", BATCHES).parent,
        save_tar(tmp_path / "mine.tar.gz", BATCHES),
        save_tar(tmp_path / "mine.tgz", BATCHES),
        save_tar(tmp_path / "mine.tar", BATCHES, "w"),
    ):
        before = sorted(tmp_path.rglob("*"))
        found = cifar10(path).arrays
        assert_same(found, CIFAR10, path.name)
        assert found["x_train"].flags.c_contiguous and sorted(tmp_path.rglob("*")) == before
    assert cifar10(tmp_path) is None


def test_missing_batches_are_named(tmp_path, refusal):
    some = {
        name: BATCHES[name] for name in CIFAR10_FILES if name not in ("data_batch_3.bin", "test_batch.bin")
    }
    for path in (save_batches(tmp_path / "folder", some), save_tar(tmp_path / "mine.tar.gz", some)):
        assert refusal(cifar10, path) == (
            f"{path}: expected {', '.join(CIFAR10_FILES)}, got no data_batch_3.bin and no test_batch.bin."
        )
    assert "got no data_batch_1.bin and no" in refusal(cifar10, save_tar(tmp_path / "empty.tar.gz", {}))


def test_damaged_archive_is_named(tmp_path, refusal):
    for mode, name in (("w", "mine.tar"), ("w:gz", "mine.tar.gz")):
        path = save_tar(tmp_path / name, BATCHES, mode)
        content = path.read_bytes()
        for damaged in (
            b"",
            b"no archive at all",
            *(content[: int(part * len(content))] for part in (0.1, 0.5)),
        ):
            path.write_bytes(damaged)
            sentence = refusal(cifar10, path)
            assert " cannot be read: " in sentence or ", got no " in sentence, (name, len(damaged))


def test_malformed_batch_is_named(tmp_path, refusal):
    for content, reason in [
        (b"", "it is empty"),
        (records(PIXELS[0], LABELS[0])[:-1], "cannot reshape array of size 12291"),
        (records(PIXELS[0], LABELS[0] + 10), "it has the label 1"),
    ]:
        for path in (
            save_batches(tmp_path / "folder", BATCHES | {"data_batch_2.bin": content}),
            save_tar(tmp_path / "mine.tar.gz", BATCHES | {"data_batch_2.bin": content}),
        ):
            sentence = refusal(cifar10, path)
            assert sentence.startswith(f"{path}/data_batch_2.bin cannot be read: {reason}")
            assert sentence.endswith(
                "; expected one record or more of a label, from 0 to 9, and 3072 pixels, a byte each."
            )
