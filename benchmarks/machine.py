"""What a number depends on: the machine, the versions, and how fast memory is copied."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "dm-haiku", "equinox", "keras", "torch", "numpy")


def describe() -> dict[str, object]:
    """Returns the processor, the number of cores that this process may use, and the versions of packages."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    } | {package: found for package in PACKAGES if (found := _version(package))}


def sentence(machine: dict[str, object]) -> str:
    """Says in one line where numbers were measured."""
    versions = ", ".join(
        f"{name} {machine[name]}" for name in PACKAGES if name in machine and name != "jaxlib"
    )
    return f"{machine['cores']} cores of {machine['processor']}, Python {machine['python']}, {versions}"


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()
