"""Images decoded once, into arrays that are mapped into memory: there may be more than it holds."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from rich.console import Console
from rich.progress import track

from train.data.formats import images
from train.data.formats.reading import PARTS, reading
from train.errors import UserError, shortened

CHANNELS = 3
Files = dict[str, list[Path]]  # of each class
Fault = tuple[Path, str] | None  # of an image: the file, and why it cannot be used


def decoded(cache: Path, stamp: str) -> dict[str, np.ndarray] | None:
    """Return what was decoded earlier, as memory maps; None if it is of other files, or not whole."""
    try:
        if json.loads((cache / "index.json").read_text()) != {"stamp": stamp}:
            return None
        return {file.stem: open_memmap(file, mode="r") for file in sorted(cache.glob("*.npy"))}
    except (OSError, ValueError):
        return None


def decode(
    cache: Path, stamp: str, parts: dict[str, Files], names: tuple[str, ...], *, image_size: int
) -> None:
    """Decode all images, several at a time; the folder is complete once it has its name.

    Args:
      parts: the images of each class of each split.
      names: of the classes; labels are their positions.

    Raises:
      UserError: some images cannot be used.
    """
    # Not with_suffix, for what follows a dot in the folder's name, as in photographs.v1, is no suffix.
    making, replaced = (cache.with_name(cache.name + end) for end in (".part", ".old"))
    shutil.rmtree(making, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    making.mkdir()
    try:
        read = functools.partial(images.read, channels=CHANNELS, image_size=image_size)
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

        def decode_one(job: tuple[np.ndarray, int, Path]) -> Fault:
            array, row, file = job
            try:
                array[row] = read(file, size=shape[:2])
            except UserError as error:
                return file, str(error)
            return None

        doing = f"decoding {len(jobs):,} images, once, into {cache.parent}"
        with reading(cache, images.EXPECTED), ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                faults = [*filter(None, _with_progress(pool.map(decode_one, jobs), doing, len(jobs)))]
            except BaseException:  # such as a request to stop, which waits for no more than what is begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if faults:
            (_, first), *others = faults
            unequal = "pixels, where" in first and " Set data.image_size to scale all to one size." or ""
            also = f" Nor can be used: {shortened([str(file) for file, _ in others])}." if others else ""
            raise UserError(first + unequal + also)
        (making / "index.json").write_text(json.dumps({"stamp": stamp}))
        if cache.exists():  # at once, for those who are about to read it
            cache.rename(replaced)
        making.rename(cache)
    finally:
        shutil.rmtree(making, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _with_progress(results: Iterator[Fault], doing: str, total: int) -> Iterable[Fault]:
    """Show a bar in a terminal, and say elsewhere what takes time. Both on stderr: stdout may be read."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if console.is_terminal:
        return track(results, doing, total, console=console, transient=True)
    console.print(doing)
    return results


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


def _allocate(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    array = open_memmap(file, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):  # or a full disk would end the process while it writes
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array
