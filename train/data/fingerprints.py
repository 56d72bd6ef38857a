"""Fingerprints: a hash of all examples, which tells whether data are the same as before."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from train.data.dataset import Examples
from train.data.preprocessing import chunks

LARGE = 2**26  # bytes of files from which on a fingerprint is kept


def of(examples: dict[str, Examples], names: Sequence[str], columns: Sequence[str]) -> str:
    """Return a hash of the values, shapes and dtypes of all splits, whatever files they come from."""
    digest = xxhash.xxh3_128(repr((tuple(names), tuple(columns))).encode())
    for part, (inputs, labels) in sorted(examples.items()):
        digest.update(f"{part}{inputs.dtype.name}{inputs.shape}{labels.dtype.name}".encode())
        digest.update(np.ascontiguousarray(labels).data)
        for rows in chunks(inputs, len(inputs)):
            digest.update(np.ascontiguousarray(inputs[rows]).data)
    return digest.hexdigest()


def cached(folder: Path | None, files: Sequence[Path], key: str, compute: Callable[[], str]) -> str:
    """Return a fingerprint of files, computed once as long as their sizes and times stay the same.

    It is kept in a file of the folder, for files that are so large that hashing takes time.
    """
    found = [(str(file.absolute()), file.stat()) for file in files]
    if folder is None or sum(stat.st_size for _, stat in found) < LARGE:
        return compute()
    # The time of the last change of the file's metadata too, which no tool can set back.
    stamp = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in found]
    names = repr((key, [name for name, _ in found]))
    path = folder / f"fingerprint-{xxhash.xxh64_hexdigest(names.encode(errors='surrogateescape'))}.json"
    try:
        kept = json.loads(path.read_text())
        if kept["files"] == stamp:
            return kept["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    fingerprint = compute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"files": stamp, "fingerprint": fingerprint}))
        temporary.replace(path)
    except OSError:
        pass  # where it cannot be kept, it is computed each time
    return fingerprint
