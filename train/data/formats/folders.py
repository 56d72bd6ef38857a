"""Folders of images, one folder a class."""

import os
from collections.abc import Iterator
from pathlib import Path

import xxhash
from filelock import FileLock

from train.config import Data
from train.data.formats import images
from train.data.formats.decoding import Files, decode, decoded
from train.data.formats.reading import Found
from train.errors import DISK_FULL, UserError

ACCEPTS = (
    "a folder with train/CLASS/*.png (and test/CLASS/, validation/CLASS/), or with CLASS/*.png alone, of "
    "PNG, JPEG, WebP, GIF, BMP or TIFF"
)
NAMES = {  # of the folders of splits, in any case
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}


def read(path: Path, config: Data) -> Found | None:
    """Read images as bytes in RGB. Labels are positions of classes, whose names are those of their folders.

    They are decoded into `config.cache`, again whenever a file is added, removed, or replaced.
    """
    if not path.is_dir():
        return None
    parts, left_out = _parts(path)
    if not parts:
        return None
    names = tuple(sorted({name for files in parts.values() for name in files}))
    cache = Path(config.cache or ".") / _cache_name(path, config.image_size)
    stamp = _stamp(path, parts)
    try:
        arrays = decoded(cache, stamp)  # which needs no lock, and may be on a disk that is only read
        if arrays is None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(cache.with_name(cache.name + ".lock")):
                if decoded(cache, stamp) is None:  # unless another process has decoded them meanwhile
                    decode(cache, stamp, parts, names, image_size=config.image_size)
                arrays = decoded(cache, stamp)
            assert arrays is not None, "what was just written can be read"
    except OSError as error:
        if error.errno in DISK_FULL:  # which of several disks, the system may not have said
            raise OSError(error.errno, error.strerror, str(cache.parent)) from error
        raise UserError(
            f"data.cache = '{cache.parent}' cannot be used: {error.strerror or error}. Give another "
            "--data.cache."
        ) from error
    said = f"Files in '{path}' that are no images by their names are left out: {left_out:,}."
    files = tuple(sorted(cache.glob("*.npy")))
    return Found(arrays, files, names=names, notes=(said,) if left_out else ())


def _parts(path: Path) -> tuple[dict[str, Files], int]:
    """Return the images of each split and class, and how many other files there are."""
    roots, parts, left_out = _roots(path), {}, 0
    for part, root in roots.items():
        found = {entry.name: list(_files(entry)) for entry in sorted(root.iterdir()) if _is_folder(entry)}
        loose = [file for file in root.iterdir() if _is_image(file)]
        if loose:
            raise UserError(f"'{loose[0]}' is in no folder of a class; expected {ACCEPTS}.")
        parts[part] = {name: [file for file in files if _is_image(file)] for name, files in found.items()}
        left_out += sum(not _is_image(file) for files in found.values() for file in files)
        if empty := [name for name, files in parts[part].items() if not files]:
            if len(empty) < len(found) or len(roots) > 1:
                raise UserError(f"'{root / empty[0]}' has no image; add some, or remove that folder.")
            return {}, 0
    return ({part: files for part, files in parts.items() if files} if parts["train"] else {}), left_out


def _roots(path: Path) -> dict[str, Path]:
    """Return the folder of each split; without any, the whole is that of the training data."""
    roots = {}
    for folder in sorted(filter(_is_folder, path.iterdir())):
        part = next((part for part, names in NAMES.items() if folder.name.lower() in names), None)
        if part in roots:
            raise UserError(
                f"expected one folder of {part} data, got '{roots[part]}' and '{folder}'; remove one."
            )
        if part is not None:
            roots[part] = folder
    if "train" in roots:
        return roots
    for folder in roots.values():  # with folders in it, it is rarely meant as a class
        if any(map(_is_folder, folder.iterdir())):
            raise UserError(f"'{folder}' has no train/ beside it; expected {ACCEPTS}.")
    return {"train": path}


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith((".", "__"))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in images.SUFFIXES


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in an order that is the same everywhere; hidden ones are left out."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _cache_name(path: Path, image_size: int) -> str:
    key = repr((str(path.resolve()), image_size)).encode()
    return f"{path.name}-{xxhash.xxh64_hexdigest(key)}"


def _stamp(path: Path, parts: dict[str, Files]) -> str:
    """Return what changes when a file is added, removed or replaced: names, sizes and times."""
    stamp = xxhash.xxh3_128()
    for part, classes in parts.items():
        for file in (file for files in classes.values() for file in files):
            found = file.stat()
            name = str(file.relative_to(path))
            stamp.update(repr((part, name, found.st_size, found.st_mtime_ns, found.st_ctime_ns)).encode())
    return stamp.hexdigest()
