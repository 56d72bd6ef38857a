"""NumPy's files, MNIST's IDX files, CIFAR-10's binary batches, embedded digits -> raw arrays.

Nothing is ever unpickled. Each reader returns the arrays under the names of the Keras layout, or None where
the path has nothing of its kind.
"""

import gzip
import math
import struct
import tarfile
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.lib.npyio import NpzFile

from train.data.dataset import permutation
from train.data.formats.reading import Found, left_out, reading, regular
from train.errors import UserError

KEYS = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL = ("x_test", "y_test", "x_validation", "y_validation")  # of arrays of one's own
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
TEXTS = " (of texts, save y.astype(str))"  # pandas and lists of objects have them otherwise
CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


def digits(_: Path) -> Found:
    """Read scikit-learn's handwritten digits: 8 x 8 pixels from 0 to 1, and a fixed test split."""
    # The file without scikit-learn, whose import takes longer than the job's training.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("data.name = 'digits' needs scikit-learn; pip install scikit-learn.")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")
    inputs = (table[:, :-1] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = table[:, -1].astype(np.int32)
    shuffled = permutation(0, len(labels))
    train, test = np.sort(shuffled[360:]), np.sort(shuffled[:360])
    return Found(dict(zip(KEYS, (inputs[train], labels[train], inputs[test], labels[test]))), (file,))


def npz(path: Path, name: str = "npz") -> Found | None:
    """Read an .npz archive, or a folder of .npy files as memory maps, for data larger than memory."""
    if path.is_dir() and (path / f"{name}.npz").is_file():
        path = path / f"{name}.npz"
    if path.is_dir():
        names = [file.stem for file in path.glob("*.npy")]
        files = {key: path / f"{key}.npy" for key in _wanted(path, names)}
        if not files:
            return None
        arrays = {key: npy(file) for key, file in files.items()}
        return Found(arrays, tuple(files.values()), notes=_others(path, names))
    with (
        reading(path, f"an .npz file of plain arrays{TEXTS}"),
        regular(path).open("rb") as file,
        NpzFile(file) as archive,
    ):
        keys = _wanted(path, archive.files)
        if not keys:
            got = ", ".join(map(repr, archive.files[:10])) or "no arrays"
            raise UserError(f"{path}: expected {', '.join(KEYS[:2])}, got {got}.")
        arrays = {key: member(archive, key) for key in keys}
        return Found(arrays, (path,), notes=_others(path, archive.files))


def _others(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    others = sorted(set(names) - {*KEYS, *OPTIONAL})
    return (left_out(path, others, ", ".join(dict.fromkeys(KEYS + OPTIONAL))),) if others else ()


def _wanted(path: Path, names: Sequence[str]) -> list[str]:
    """Return which of these arrays are data; if any are, training data are, and inputs have labels."""
    found = [key for key in dict.fromkeys(KEYS + OPTIONAL) if key in names]
    needed = [f"{axis}_{key[2:]}" for key in found for axis in "xy"]
    if found:
        _require_all(path, found, [*KEYS[:2], *needed])
    return found


def npy(path: Path) -> np.ndarray:
    """Read an .npy file as a memory map."""
    with reading(path, f"an .npy file of a plain array{TEXTS}"):
        return open_memmap(regular(path), mode="r")


def member(archive: NpzFile, name: str) -> np.ndarray:
    """Read an array of an .npz archive, whose members may be anything."""
    array = archive[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is no array")
    return array


def mnist(path: Path) -> Found | None:
    """Read MNIST as `npz` does, or from its four IDX files, each plain or .gz."""
    if found := npz(path, "mnist"):
        return found
    for folder in (path, path / "raw", path / "MNIST" / "raw"):  # torchvision has them below its root
        files = {name: file for name in IDX_FILES if (file := _idx_file(folder, name))}
        if files:
            _require_all(folder, files, IDX_FILES)
            arrays = {key: _idx(files[name]) for key, name in zip(KEYS, IDX_FILES)}
            return Found(arrays, tuple(files.values()))
    return None


def cifar10(path: Path) -> Found | None:
    """Read CIFAR-10 as `npz` does, or from its six binary batches, in a folder or a .tar.gz."""
    if path.is_file() and path.suffix in (".gz", ".tgz", ".tar"):
        return _cifar10_tar(path)
    if found := npz(path, "cifar10"):
        return found
    for folder in (path, path / "cifar-10-batches-bin"):
        files = {name: folder / name for name in CIFAR10_FILES if (folder / name).is_file()}
        if files:
            _require_all(folder, files, CIFAR10_FILES)
            arrays = _cifar10({file: file.read_bytes() for file in files.values()})
            return Found(arrays, tuple(files.values()))
    archive = path / "cifar-10-binary.tar.gz"
    return _cifar10_tar(archive) if archive.is_file() else None


def _require_all(path: Path, found: Collection[str], names: Sequence[str]) -> None:
    names = list(dict.fromkeys(names))
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path}: expected {', '.join(names)}, got no {' and no '.join(missing)}.")


def _idx_file(folder: Path, name: str) -> Path | None:
    names = [mark.join(name.split("-idx")) + end for mark in ("-idx", ".idx") for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx(path: Path) -> np.ndarray:
    axes = 3 if "idx3" in path.name else 1
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with reading(path, f"an IDX file of bytes along {axes} axes"), opened(path, "rb") as file:
        magic, *shape = struct.unpack(f">{1 + axes}I", file.read(4 + 4 * axes))
        if magic != 0x800 + axes:
            raise ValueError(f"it starts with the number {magic} and not {0x800 + axes}")
        size = math.prod(shape)
        content = file.read(size + 1)  # no more than that, however much a .gz unpacks to
        if len(content) != size:
            found = "more" if content[size:] else "fewer"
            raise ValueError(f"its header announces {shape} bytes, and there are {found}")
        return np.frombuffer(content, np.uint8).reshape(shape)


def _cifar10_tar(path: Path) -> Found:
    with reading(path, "a .tar.gz file of CIFAR-10's binary batches"), tarfile.open(path) as archive:
        members = {Path(member.name).name: member for member in archive if member.isfile()}
        _require_all(path, members, CIFAR10_FILES)
        files = {path / name: archive.extractfile(members[name]) for name in CIFAR10_FILES}
        return Found(_cifar10({name: file.read() for name, file in files.items() if file}), (path,))


def _cifar10(batches: dict[Path, bytes]) -> dict[str, np.ndarray]:
    *train, (x_test, y_test) = (_cifar10_batch(path, content) for path, content in batches.items())
    x_train, y_train = map(np.concatenate, zip(*train))
    return dict(zip(KEYS, (x_train, y_train, x_test, y_test)))


def _cifar10_batch(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    with reading(path, "one record or more of a label, from 0 to 9, and 3072 pixels, a byte each"):
        records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)
        labels, pixels = records[:, 0], records[:, 1:]
        if not len(records) or labels.max() > 9:
            raise ValueError(f"it has the label {labels.max()}" if len(records) else "it is empty")
        return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels
