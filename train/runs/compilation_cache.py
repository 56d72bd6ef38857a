"""Compiled programs, kept from one start to the next."""

import os
import platform
from pathlib import Path

from filelock import FileLock


def use_compilation_cache() -> None:
    """Lets JAX keep compiled programs in the user's cache folder, unless it is told otherwise already.

    Has to come before jax is imported. Delete the folder, ~/.cache/jbn, at any time.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        _remove_torn_entries(folder)
    except (OSError, RuntimeError):
        return  # There is no home, or none that can be written to and locked: compile each time.
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        # With a limit JAX locks the folder while it reads or writes, so that jobs may share it.
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _cache_folder() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Machines that share a home may not be able to run each other's programs.
    return caches / "jbn" / f"{platform.node()}-{platform.machine()}"


def _remove_torn_entries(folder: Path) -> None:
    """Removes what a kill, or a full disk, has left half written.

    JAX writes KEY-cache and then KEY-atime, the time of its last use. It never replaces half a KEY-cache, but
    warns of it at every start; and for want of one KEY-atime some versions write no entry any more.
    """
    with FileLock(folder / ".lockfile", timeout=10):  # JAX's own
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("cache") + "atime").exists():
                entry.unlink()
