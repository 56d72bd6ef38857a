"""The run directory: whose it is, and what it says of the job.

config.json       the resolved job
data.json         what the data are like: shape, classes, what the network sees of them, a fingerprint
environment.json  versions and devices of the latest start
metrics.jsonl     one line an evaluation and split (train/runs/log.py)
inspection.jsonl  what the layers see, if asked for (train/training/inspection.py)
summary.json      what the run reached; absent while it runs
checkpoints/      train/runs/checkpoints.py
tensorboard/      the metrics once more
curves.png        their picture (train/runs/curves.py)
profile/          a trace of some steps, if asked for
"""

import contextlib
import dataclasses
import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train import parsing
from train.config import NOT_COMPARED, Config
from train.data.dataset import Dataset, Preprocessing
from train.errors import REMEDIES, UserError
from train.runs.files import as_json, read_json, write_beside, write_json

_LENGTH = ("steps", "epochs")
# What to do where one of these is missing or broken. A broken summary.json is written anew.
_REMEDIES = {
    "config.json": "Bring it back, or take another run directory.",
    "data.json": "Without it, the job writes it anew when it is started again.",
}


class Description(NamedTuple):
    """What a network has to know of the data that it was trained on."""

    shape: tuple[int, ...]  # of one example
    dtype: str
    classes: int
    preprocessing: Preprocessing
    fingerprint: str


def earlier_summary(config: Config) -> dict[str, Any] | None:
    """Returns the summary of an earlier run of this job in its directory, if there is one.

    Raises:
      UserError: the directory holds another job, or something that is no run.
    """
    path = Path(config.run_dir)
    with _usable(path):
        if not (path / "config.json").exists():
            # What a run makes before its config.json, and may have been killed after.
            begun = {".config.json.tmp", "checkpoints"}
            if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - begun):
                raise UserError(f"run_dir = '{path}' is in use, and not by a run; give another --run_dir.")
            return None
    summary = _whole_summary(path / "summary.json")
    may_grow = _LENGTH if is_finished(summary) else ()
    differing = parsing.differences(read_config(path), config, ignore=NOT_COMPARED + may_grow)
    if differing:
        raise UserError(
            f"run_dir = '{path}' holds another job: {'; '.join(differing)}. Give another --run_dir, or go "
            "back to the values there to resume it."
        )
    return summary


def is_finished(summary: dict[str, Any] | None) -> bool:
    """Tells whether a run came to its end."""
    return isinstance(summary, dict) and summary.get("status") == "finished"


def same_length(config: Config) -> bool:
    """Tells whether the run in the directory was asked for the same steps and epochs."""
    earlier = read_config(Path(config.run_dir))
    return all(getattr(earlier, key) == getattr(config, key) for key in _LENGTH)


def create(config: Config) -> None:
    """Creates the run directory.

    Raises:
      UserError: it cannot be created.
    """
    with _usable(Path(config.run_dir)):
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from training in a run directory. The lock ends with its process, however.

    Raises:
      UserError: another process trains there.
    """
    with _usable(path):
        directory = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"run_dir = '{path}' is in use by another process; wait, or give another.") from None
    finally:
        os.close(directory)


def begin(config: Config, dataset: Dataset) -> None:
    """Notes what runs in the run directory, on which data, and where.

    Raises:
      UserError: the run that is there was trained on other data.
    """
    path, description = Path(config.run_dir), describe(dataset)
    if (path / "data.json").exists() and (earlier := read_data(path)).fingerprint != description.fingerprint:
        raise UserError(
            f"run_dir = '{path}' was trained on other data (fingerprint {earlier.fingerprint}, now "
            f"{description.fingerprint}). Give back the data that it had, or another --run_dir."
        )
    preprocessing = {name: value.tolist() for name, value in description.preprocessing._asdict().items()}
    with _usable(path):
        written = write_beside(path / "config.json", as_json(dataclasses.asdict(config)))
        # Before the new length is there, or a run that grows and is killed would be taken for finished.
        (path / "summary.json").unlink(missing_ok=True)
        os.replace(written, path / "config.json")
        write_json(path / "data.json", description._asdict() | {"preprocessing": preprocessing})
        write_json(path / "environment.json", _environment())


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Raises a UserError for a directory that cannot be used; a full disk, which can, is an OSError still."""
    try:
        yield
    except OSError as error:
        if REMEDIES.get(error.errno) == "make room":
            raise
        reason = error.strerror + (f": '{error.filename}'" if error.filename else "")
        raise UserError(
            f"run_dir = '{path}' cannot be used: {reason}. Mend that, or give another --run_dir."
        ) from error


def describe(dataset: Dataset) -> Description:
    """Describes data, for those who come after them."""
    inputs = dataset.train.inputs
    return Description(
        inputs.shape[1:], str(inputs.dtype), dataset.classes, dataset.preprocessing, dataset.fingerprint
    )


def read_config(path: Path) -> Config:
    """Reads the job of a run directory."""
    values = _read(path, "config.json")
    try:
        return parsing.from_dict(values)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path / 'config.json'}' is not a job of this program: {error}. {_REMEDIES['config.json']}"
        ) from None


def read_data(path: Path) -> Description:
    """Reads what the data of a run are like."""
    values = _read(path, "data.json")
    try:
        preprocessing = {name: np.float32(value) for name, value in values.pop("preprocessing").items()}
        shape, classes = tuple(map(int, values.pop("shape"))), int(values.pop("classes"))
        return Description(
            shape=shape, classes=classes, preprocessing=Preprocessing(**preprocessing), **values
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"'{path / 'data.json'}' does not describe data: {error}. {_REMEDIES['data.json']}"
        ) from None


def _read(path: Path, name: str) -> Any:
    if not (path / name).is_file():
        raise UserError(f"'{path}' is not a run directory: it has no {name}. {_REMEDIES[name]}")
    try:
        return read_json(path / name)
    except UserError as error:
        raise UserError(f"{error}. {_REMEDIES[name]}") from None


def _whole_summary(path: Path) -> dict[str, Any] | None:
    """Returns a summary, if it is there and whole."""
    try:
        summary = read_json(path)
        whole = {"status", "step", "best_step", "test_accuracy"} <= set(summary)
        return summary if whole and isinstance(summary["step"], int | None) else None
    except (UserError, TypeError):
        return None


def _environment() -> dict[str, Any]:
    """Describes what the run runs on: versions and devices."""
    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jbn")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "host": platform.node(),
        "jax_options": {key: value for key, value in os.environ.items() if key.startswith(("JAX_", "XLA_"))},
    }
