"""Folders of images, one folder a class: decoded once, into arrays that are mapped into memory."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
from filelock import FileLock
from numpy.lib.format import open_memmap
from rich.console import Console
from rich.progress import track

from train.config import Data
from train.data.formats import images
from train.data.formats.reading import PARTS, Found, reading
from train.errors import DISK_FULL, UserError

ACCEPTS = (
    "a folder with train/CLASS/*.png (and test/CLASS/, validation/CLASS/), or with CLASS/*.png alone, of "
    "PNG, JPEG, WebP, GIF, BMP or TIFF"
)
CHANNELS = 3
NAMED = 10  # files at most in a sentence
NAMES = {  # of the folders of splits, in any case
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
Files = dict[str, list[Path]]  # of each class


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
        arrays = _decoded(cache, stamp)
        if arrays is None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(cache.with_suffix(".lock")):
                if _decoded(cache, stamp) is None:  # unless another process has decoded them meanwhile
                    _decode(cache, stamp, parts, names, config)
                arrays = _decoded(cache, stamp)
            assert arrays is not None, "what was just written can be read"
    except OSError as error:
        if error.errno in DISK_FULL:  # which of several disks, the system may not have said
            raise OSError(error.errno, error.strerror, str(cache.parent)) from error
        arrays = _decoded(cache, stamp)  # that somebody else has made may be read though not locked
        if arrays is None:
            raise UserError(
                f"data.cache = '{cache.parent}' cannot be used: {error.strerror or error}. Give another "
                "--data.cache."
            ) from error
    notes = (
        [f"{left_out:,} files in '{path}' are no images by their names, and are left out."]
        if left_out
        else []
    )
    return Found(arrays, tuple(sorted(cache.glob("*.npy"))), names=names, notes=tuple(notes))


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


def _decoded(cache: Path, stamp: str) -> dict[str, np.ndarray] | None:
    """Return what was decoded earlier, as memory maps; None if it is of other files, or not whole."""
    try:
        if json.loads((cache / "index.json").read_text()) != {"stamp": stamp}:
            return None
        return {file.stem: open_memmap(file, mode="r") for file in sorted(cache.glob("*.npy"))}
    except (OSError, ValueError):
        return None


def _decode(cache: Path, stamp: str, parts: dict[str, Files], names: tuple[str, ...], config: Data) -> None:
    """Decode all images, several at a time; the folder is complete once it has its name."""
    making, replaced = cache.with_suffix(".part"), cache.with_suffix(".old")
    shutil.rmtree(making, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    making.mkdir()
    try:
        read = functools.partial(images.read, channels=CHANNELS, image_size=config.image_size)
        shape = _shape(
            (file for part in PARTS if part in parts for files in parts[part].values() for file in files),
            functools.partial(read, size=None),
        )
        jobs = []
        for part, classes in parts.items():
            files = [(file, names.index(name)) for name, found in classes.items() for file in found]
            array = _allocate(making / f"x_{part}.npy", (len(files), *shape))
            np.save(making / f"y_{part}.npy", np.array([label for _, label in files], np.int32))
            jobs += [(array, row, file) for row, (file, _) in enumerate(files)]

        def decode(job) -> tuple[Path, str] | None:
            array, row, file = job
            try:
                array[row] = read(file, size=shape[:2])
            except UserError as error:
                return file, str(error)
            return None

        with reading(cache, ACCEPTS), ThreadPoolExecutor(os.cpu_count()) as pool:
            doing, console = f"decoding {len(jobs):,} images, once, into {cache.parent}", Console(stderr=True)
            seen = track(
                pool.map(decode, jobs),
                doing,
                len(jobs),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            faults = [*filter(None, seen)]
        if faults:
            (_, first), *others = faults
            unequal = "pixels, where" in first and " Set data.image_size to scale all to one size." or ""
            raise UserError(first + unequal + _also([str(file) for file, _ in others]))
        (making / "index.json").write_text(json.dumps({"stamp": stamp}))
        if cache.exists():  # at once, for those who are about to read it
            cache.rename(replaced)
        making.rename(cache)
    finally:
        shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _shape(files: Iterator[Path], read: Callable[[Path], np.ndarray]) -> tuple[int, ...]:
    """Return the shape of the first image that can be read, so that all others are named at once."""
    first = None
    for file in files:
        try:
            return read(file).shape
        except UserError as error:
            first = first or error
    assert first is not None, "there is an image"
    raise first


def _also(files: list[str]) -> str:
    """Name further images with a fault, not necessarily the same."""
    some = ", ".join(files[:NAMED]) + f" and {len(files) - NAMED:,} more" * (len(files) > NAMED)
    return f" Nor can be used: {some}." if files else ""


def _allocate(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    array = open_memmap(file, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):  # or a full disk would end the process while it writes
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array
