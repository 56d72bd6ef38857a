"""Fingerprints of large files are computed once, and again when a file has changed."""

import os

import numpy as np

from tests.helpers.arrays import keras_arrays, save_npys
from train.config import Data
from train.data import Labels, fingerprints, load, load_test, preprocessing
from train.data.dataset import Examples


def test_every_value_counts_wherever_it_is(monkeypatch):
    monkeypatch.setattr(preprocessing, "CHUNK", 12 * 300)  # bytes of 300 rows
    inputs, labels = np.zeros((2000, 3), np.float32), np.zeros(2000, np.int32)
    seen = {fingerprints.of({"train": Examples(inputs, labels)}, (), ())}
    for row in range(0, 2000, 7):
        inputs[row, row % 3] = 1
        seen.add(fingerprints.of({"train": Examples(inputs, labels)}, (), ()))
    for names, columns in ((("a",), ()), ((), ("a",)), (("b",), ())):
        seen.add(fingerprints.of({"train": Examples(inputs, labels)}, names, columns))
    seen.add(fingerprints.of({"test": Examples(inputs, labels)}, (), ()))
    assert len(seen) == 1 + 286 + 3 + 1


def test_files_are_hashed_once_until_their_size_or_times_change(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "LARGE", 0)
    folder, hashed = tmp_path / "data", []
    of = fingerprints.of
    monkeypatch.setattr(fingerprints, "of", lambda *given: (hashed.append(1), of(*given))[1])
    config = Data("npz", path=str(save_npys(folder, keras_arrays())))
    for cache, count in (tmp_path / "cache", 1), (tmp_path / "cache", 1), (None, 2), (tmp_path / "other", 3):
        first = load(config, cache=cache).fingerprint
        assert len(hashed) == count
    before = (folder / "x_train.npy").stat()
    values = keras_arrays()
    values["x_train"][0, 0, 0] ^= 1
    save_npys(folder, values)
    os.utime(folder / "x_train.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = load(config, cache=tmp_path / "cache").fingerprint
    assert changed != first and len(hashed) == 4
    (kept,) = (tmp_path / "cache").glob("fingerprint-*.json")
    for spoilt in ("", "[]", "{}", '{"files": 3}'):
        kept.write_text(spoilt)
        assert load(config, cache=tmp_path / "cache").fingerprint == changed
    (tmp_path / "locked").write_text("no folder")
    assert load(config, cache=tmp_path / "locked").fingerprint == changed


def test_fingerprint_that_is_kept_is_of_one_use_of_the_files(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text("a,b,c\n" + "1,0,1\n0,1,0\n" * 20)
    uses = [("a", "cross_entropy"), ("b", "cross_entropy"), ("a", "squared_error")]
    seen = []
    for large in (fingerprints.LARGE, 0, 0):
        monkeypatch.setattr(fingerprints, "LARGE", large)
        configs = [(Data("csv", path=str(path), label=label), loss) for label, loss in uses]
        seen.append(
            [load(config, loss=loss, cache=tmp_path / "cache").fingerprint for config, loss in configs]
        )
    assert seen[0] == seen[1] == seen[2] and len(set(seen[0])) == 3
    # As other data of a network that knows more classes, and columns in another order.
    known, config = Labels(counts=(1, 1, 1), names=("2", "1", "0")), Data("csv", path=str(path), label="a")
    options = {"loss": "cross_entropy", "labels": known, "columns": ("c", "b"), "cache": tmp_path / "new"}
    assert load_test(config, **options)[1] != seen[0][0]
    assert load(config, cache=tmp_path / "new").fingerprint == seen[0][0]


def test_small_files_leave_nothing_beside_the_run(tmp_path):
    np.savez(tmp_path / "npz.npz", **keras_arrays())
    load(Data("npz", path=str(tmp_path)), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
