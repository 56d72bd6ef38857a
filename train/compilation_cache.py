"""Compiled programs, kept from one start to the next."""

import os
import platform
from pathlib import Path


def use_compilation_cache() -> None:
    """Lets JAX keep compiled programs in the user's cache folder, unless it is told otherwise already.

    Has to come before jax is imported. Delete the folder, ~/.cache/jbn, at any time.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jbn"
    # Machines that share a home may not be able to run each other's programs.
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache / f"{platform.node()}-{platform.machine()}"),
        # With a limit JAX locks the folder while it reads or writes, so that jobs may share it.
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        Path(settings["JAX_COMPILATION_CACHE_DIR"]).mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written to: compile each time
    for name, value in settings.items():
        os.environ.setdefault(name, value)
