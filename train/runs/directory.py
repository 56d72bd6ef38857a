"""Layout, identity and lock of a run directory.

config.json       the resolved job
data.json         the data: shape, classes, preprocessing, a fingerprint
environment.json  versions and devices of the latest start
metrics.jsonl     one line an evaluation and split (train/runs/log.py)
inspection.jsonl  what the layers see, if asked for (train/training/inspection.py)
summary.json      what the run reached; absent while it runs (train/runs/summary.py)
checkpoints/      train/runs/checkpoints.py
recalibrated/     the best model with running statistics pooled anew, if asked for
diagnosis.json    whether the running statistics fit the data, if asked for; report.html has its pictures
tensorboard/      the metrics once more
curves.png        their chart (train/runs/curves.py)
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
from typing import Any

import jax

from train import config as configs
from train.config import NOT_COMPARED, Config
from train.data import Dataset, Description
from train.errors import DISK_FULL, UserError
from train.runs.files import as_json, read_json, write_json, write_next_to
from train.runs.summary import Summary, read_summary

LENGTH = ("steps", "epochs")
_RESTORE_CONFIG = "Restore it from a backup, or give another run directory."
_RESTORE_DATA = "Delete it: the job writes it anew when it is started again."


def earlier_summary(config: Config) -> Summary | None:
    """Return the summary of an earlier run of this job in its directory, if there is one.

    Raises:
      UserError: the directory holds another job, or something that is not a run.
    """
    path = Path(config.run_dir)
    with usable(path):
        if not (path / "config.json").exists():
            # What a run makes before its config.json, and may have been killed after.
            begun = {".config.json.tmp", "checkpoints"}
            if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - begun):
                raise UserError(f"run_dir = '{path}' is in use, and not by a run; give another --run_dir.")
            return None
    summary = read_summary(path)
    may_grow = LENGTH if summary and summary.finished else ()
    if differing := configs.differences(read_config(path), config, ignore=NOT_COMPARED + may_grow):
        only_length = not configs.differences(read_config(path), config, ignore=NOT_COMPARED + LENGTH)
        raise UserError(
            f"run_dir = '{path}' holds another job: {'; '.join(differing)}. Give another --run_dir, or go "
            "back to the values there to resume it"
            + ("; once it is finished, it may get more steps." if only_length else ".")
        )
    return summary


def data_cache(run_dir: Path) -> Path:
    """Return the folder beside a run for what is made of its data once, and serves other runs too."""
    # Of "." the parent would be "." too, and then the cache something in the run that is no run's.
    return (run_dir if run_dir.name else run_dir.absolute()).parent / "data-cache"


def has_same_length(config: Config) -> bool:
    """Return whether the run in the directory was asked for the same steps and epochs."""
    earlier = read_config(Path(config.run_dir))
    return all(getattr(earlier, key) == getattr(config, key) for key in LENGTH)


@contextlib.contextmanager
def created_and_locked(path: Path) -> Iterator[None]:
    """Keep other processes from training in a run directory. The lock ends with the process, however it ends.

    Raises:
      UserError: the directory cannot be created, or another process trains there.
    """
    with usable(path):
        path.mkdir(parents=True, exist_ok=True)
        directory = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run_dir = '{path}' is in use by another process. Wait for it, or give another --run_dir."
            ) from None
        yield
    finally:
        os.close(directory)


def begin(config: Config, dataset: Dataset) -> None:
    """Record what runs in the run directory, on which data, and where."""
    path = Path(config.run_dir)
    with usable(path):
        written = write_next_to(path / "config.json", as_json(dataclasses.asdict(config)))
        # Before the new length is there, or a run that grows and is killed would look finished.
        (path / "summary.json").unlink(missing_ok=True)
        os.replace(written, path / "config.json")
        write_json(path / "data.json", Description.of(dataset).to_json())
        write_json(path / "environment.json", _environment())


def check_same_data(path: Path, fingerprint: str, remedy: str = "give another --run_dir") -> None:
    """Raise a UserError for a run directory whose run was trained on other data."""
    if not (path / "data.json").exists():
        return
    earlier = read_data(path).fingerprint
    # Earlier versions hashed a part of the data, to half as many digits.
    if len(earlier) == len(fingerprint) and earlier != fingerprint:
        raise UserError(
            f"run_dir = '{path}' was trained on other data (fingerprint {earlier}, now {fingerprint}). "
            f"Restore those data, or {remedy}."
        )


def as_described(path: Path, dataset: Dataset) -> Dataset:
    """Return the data of a job with the labels that its run directory describes, if they fit.

    They are the same, but where an earlier version began the run, which did not count the examples of each
    class: what a checkpoint holds depends on whether classes are uneven.
    """
    if not (path / "data.json").exists():
        return dataset
    labels = read_data(path).labels
    return dataset._replace(labels=labels) if labels.outputs == dataset.labels.outputs else dataset


@contextlib.contextmanager
def usable(path: Path, key: str = "run_dir") -> Iterator[None]:
    """Raise a UserError for a directory that cannot be used; a full disk stays an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        reason = f"{error.strerror}" + (f": '{error.filename}'" if error.filename else "")
        raise UserError(f"{key} = '{path}' cannot be used: {reason}. Give another --{key}.") from error


def read_config(path: Path) -> Config:
    """Read the job of a run directory."""
    values = _read(path, "config.json", _RESTORE_CONFIG)
    try:
        if not isinstance(values, dict):
            raise UserError(f"expected an object, got a {type(values).__name__}.")
        config = configs.parse(values)
        configs.check(config)
        return config
    except UserError as error:
        raise UserError(
            f"'{path / 'config.json'}' is not a job of this program: {error} {_RESTORE_CONFIG}"
        ) from None


def read_data(path: Path) -> Description:
    """Read the description of a run's data."""
    values = _read(path, "data.json", _RESTORE_DATA)
    try:
        return Description.from_json(values)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"'{path / 'data.json'}' does not describe data: {error}. {_RESTORE_DATA}") from None


def _read(path: Path, name: str, remedy: str) -> Any:
    if not os.path.exists(path):  # Path.exists raises an error for a name that is too long
        raise UserError(f"'{path}' does not exist; expected a run directory.")
    if not (path / name).is_file():
        runs = sorted(found.parent for found in path.glob("*/config.json"))
        if path.is_file():
            trained = path.suffix == ".toml"
            remedy = "Give the folder that training it made." if trained else "Give the folder of a run."
        elif runs:  # as in the folder of a study
            remedy = f"Give one of the runs in it, such as '{runs[0]}'."
        raise UserError(f"'{path}' is not a run directory: it has no {name}. {remedy}")
    try:
        return read_json(path / name)
    except UserError as error:
        raise UserError(f"{error}. {remedy}") from None


def _environment() -> dict[str, Any]:
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
