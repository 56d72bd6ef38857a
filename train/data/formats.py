"""Files -> raw arrays: .npz and MNIST's IDX files. Nothing in a file is ever run.

Each reader returns the arrays under the names of the Keras layout: x_train, y_train, x_test, y_test.
"""

import contextlib
import gzip
import math
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.errors import UserError

KEYS = ("x_train", "y_train", "x_test", "y_test")
SMALL = 2**26  # bytes up to which a checksum is worth the time that it takes
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
IDX_STEMS = dict(zip(KEYS, ("train-images", "train-labels", "t10k-images", "t10k-labels")))


@contextlib.contextmanager
def reading(path: Path, wanted: str) -> Iterator[None]:
    """Turns whatever goes wrong inside into a UserError that names the file."""
    try:
        with warnings.catch_warnings():
            # NumPy warns of headers that Python 2 wrote, and reads them.
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    # On bytes that nobody foresaw a parser may fail with anything.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}; wanted {wanted}.") from error


def npz(path: Path) -> dict[str, np.ndarray]:
    """Reads an archive that np.savez wrote; of arrays that lie in it uncompressed it returns memory maps.

    Raises:
      UserError: the file is no such archive, it is damaged, or an array is missing or holds objects.
    """
    with reading(path, "an .npz file of plain arrays"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        missing = [f"{key}.npy" for key in KEYS if f"{key}.npy" not in names]
        if missing:
            raise UserError(f"{path} has {names}; wanted {missing} too.")
        return {key: _npz_member(path, archive, archive.getinfo(f"{key}.npy")) for key in KEYS}


def _npz_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        read_header = NPY_HEADERS.get(np.lib.format.read_magic(file))
        if read_header and member.compress_type == zipfile.ZIP_STORED:
            shape, fortran_order, dtype = read_header(file)
            header_size = file.tell()
            content_size = math.prod(shape) * dtype.itemsize
            if member.file_size <= SMALL:
                file.read()  # at its end zipfile compares the checksum
            if content_size and not fortran_order and not dtype.hasobject:
                if header_size + content_size != member.file_size:
                    raise ValueError(
                        f"{member.filename} has {member.file_size - header_size} bytes after its header, "
                        f"which announces {content_size}"
                    )
                offset = _content_offset(path, member) + header_size
                return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
    with archive.open(member) as file:
        # A pickle could run code, so arrays of objects are refused.
        return np.lib.format.read_array(file, allow_pickle=False)


def _content_offset(path: Path, member: zipfile.ZipInfo) -> int:
    # Only the header beside the content has the length of its own extra field.
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        return member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def idx(folder: Path) -> dict[str, np.ndarray]:
    """Reads MNIST's four files, each plain or .gz, in a folder or where torchvision puts them below it.

    Returns:
      Arrays of uint8, of plain files as memory maps; an empty dict where there is none of the files.

    Raises:
      UserError: one of the files is missing or malformed.
    """
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        files = {key: _find_idx(place, key) for key in KEYS}
        missing = [f"{IDX_STEMS[key]}-idx{_axes(key)}-ubyte" for key in KEYS if not files[key]]
        if not missing:
            return {key: _read_idx(files[key], _axes(key)) for key in KEYS}
        if len(missing) < len(KEYS):
            raise UserError(f"{place} has no {', no '.join(missing)}; wanted each, as it is or as .gz.")
    return {}


def _axes(key: str) -> int:
    return 3 if key.startswith("x") else 1


def _find_idx(place: Path, key: str) -> Path | None:
    names = [f"{IDX_STEMS[key]}{mark}idx{_axes(key)}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    return next((place / name for name in names if (place / name).is_file()), None)


def _read_idx(path: Path, axes: int) -> np.ndarray:
    with reading(path, f"an IDX file of bytes along {axes} axes"):
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                content = np.frombuffer(file.read(), np.uint8)
        else:
            content = np.memmap(path, np.uint8, mode="r")
        header, content = np.split(content, [4 + 4 * axes])
        magic, *shape = struct.unpack(f">{1 + axes}I", header.tobytes())
        if magic != 0x800 + axes:
            raise ValueError(f"it starts with the number {magic} and not {0x800 + axes}")
        if content.size != math.prod(shape):
            raise ValueError(f"it has {content.size} bytes after its header, which announces {shape}")
        return content.reshape(shape)
