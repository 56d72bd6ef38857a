"""Checkpoints of a run: a thin layer over Orbax.

A checkpoint is a dict of pytrees, saved and restored by name. Data order, augmentation and learning rate are
functions of the seed and the step, so that a training state is all that is needed to go on exactly.

Orbax stores with it our digest of each item, by which a flipped bit is noticed, and the step that was the
best then, by which missing metrics are. Checkpoints of earlier versions have neither.
"""

import contextlib
import functools
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from xxhash import xxh3_128

from train.errors import RunFailed, UserError, explain
from train.runs.files import read_text

Metrics = dict[str, float]
RECALIBRATED = "recalibrated"  # the folder of the best model with running statistics that were pooled anew


def _quality(metrics: Metrics) -> Any:
    """Rank checkpoints by what they were saved with, then by loss. What is not finite is the worst.

    What that is the loss says (`ranking` in train/training/losses.py): an accuracy, or the loss alone.
    """
    finite = math.isfinite(metrics["loss"])
    accuracy = metrics.get("balanced_accuracy", metrics.get("accuracy", 0.0))
    return (accuracy, -metrics["loss"]) if finite else (-math.inf, -math.inf)


def exist(run_dir: Path) -> bool:
    """Return whether a run has a checkpoint, without making its folder."""
    return any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("[0-9]*"))


class Checkpoints:
    """The checkpoints of one run: the newest two and the best one by validation."""

    def __init__(self, run_dir: Path, name: str = "checkpoints"):
        _silence_libraries()
        folder = self._folder = (run_dir / name).absolute()
        _check_metrics(folder)
        policies = [
            checkpoint_managers.LatestN(2),
            checkpoint_managers.BestN(get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            best_fn=_quality,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            # The next step overwrites the state's buffers, so a save has to end before it.
            enable_async_checkpointing=False,
        )
        try:
            self._manager = ocp.CheckpointManager(folder, options=options)
        except ValueError as error:  # of a key in some _CHECKPOINT_METADATA
            raise UserError(
                f"'{folder}' holds a damaged checkpoint: {error} Restore it from a backup, or delete it to "
                "go on from another one."
            ) from error
        self._check_best()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, if there is one."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint by validation; of the newest one where there is no validation."""
        return self._manager.best_step() or self.latest_step

    def metrics(self, step: int) -> Metrics | None:
        """Return the metrics that a step was saved with, if any."""
        return self._manager.metrics(step)

    def save(self, step: int, items: dict[str, Any], metrics: Metrics | None) -> None:
        """Save a step, with the validation metrics that rank it. A step is saved once."""
        if step == self.latest_step:
            return
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        digests = {name: digest(item) for name, item in items.items()}
        if metrics is not None:
            digests["metrics"] = digest(json.loads(json.dumps(metrics)))  # where all NaN are one
        record = {"digests": digests, "best_step": self._best_after(step, metrics)}
        try:
            saved = self._manager.save(
                step, args=ocp.args.Composite(**saves), metrics=metrics, custom_metadata=record
            )
        except Exception as error:  # what Orbax raises depends on the file system
            reason = explain(error) or f"{error}. What was saved before is kept."
            raise RunFailed(f"step {step} could not be saved to '{self._folder}': {reason}") from error
        if not saved:
            raise RuntimeError(f"Orbax declined to save step {step} after step {self.latest_step}.")

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Restore items of a step, with the structure, shapes, dtypes and sharding of `like`."""
        restores = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
        folder = self._folder / str(step)
        try:
            digests = _record(folder)["digests"]
            items = dict(self._manager.restore(step, args=ocp.args.Composite(**restores)).items())
        except Exception as error:  # what Orbax raises depends on which file is broken
            if not isinstance(error, FileNotFoundError) and (reason := explain(error)):
                raise RunFailed(f"'{folder}' could not be read: {reason}") from error
            raise _broken(folder, error) from error
        for name, item in items.items():
            if digests is not None and digests.get(name) != digest(item):
                raise _damaged(folder, name)
        return items

    def _best_after(self, step: int, metrics: Metrics | None) -> int | None:
        """Return the step that is the best by validation once `step` is saved, if there is validation."""
        best = self._manager.best_step()
        if metrics is None:
            return best
        # Of equals the latest, as Orbax ranks them.
        is_best = best is None or _quality(metrics) >= _quality(self._manager.metrics(best) or {})
        return step if is_best else best

    def _check_best(self) -> None:
        """Raise a UserError if another step is the best now than when the newest one was saved."""
        if self.latest_step is None:
            return
        newest = self._folder / str(self.latest_step)
        try:
            recorded = _record(newest)["best_step"]
        except (OSError, ValueError, RecursionError) as error:
            raise _broken(newest, error) from error
        if recorded not in (None, self._manager.best_step()) and (self._folder / str(recorded)).exists():
            raise _damaged(self._folder / str(recorded), "metrics")


@contextlib.contextmanager
def open_recalibrated(run_dir: Path, step: int | None) -> Iterator[Checkpoints | None]:
    """Open what recalibration has made of a step's model, if there is that."""
    if not (run_dir / RECALIBRATED).exists():
        yield None
        return
    with Checkpoints(run_dir, RECALIBRATED) as checkpoints:
        yield checkpoints if checkpoints.latest_step == step else None


@functools.cache
def _silence_libraries() -> None:
    """Drop what Orbax and TensorStore print of each save, and of a failed one besides its error."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_unless_late(unraisable: Any) -> None:
        # A write that ends after its save has failed wants to tell an event loop that is gone; and of several
        # reads that fail, only one is told to whom asked.
        code = getattr(unraisable.object, "cr_code", None)
        if str(unraisable.exc_value) != "Event loop is closed" and not (code and "orbax" in code.co_filename):
            report(unraisable)

    sys.unraisablehook = report_unless_late


def _check_metrics(folder: Path) -> None:
    """Raise a UserError for checkpoints that the manager could not rank, or would rank wrongly."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder. Move it away, or give another run directory.")
    for path in folder.glob("[0-9]*/metrics/metrics"):
        checkpoint = path.parent.parent
        try:
            metrics = json.loads(read_text(path))
            _quality(metrics)
            found = digest(metrics)
            digests = _record(checkpoint)["digests"]
        except FileNotFoundError:
            continue  # the job that trains there is just deleting it, or was killed while it did
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _broken(checkpoint, error) from error
        if digests is not None and digests.get("metrics") != found:
            raise _damaged(checkpoint, "metrics")


def _record(folder: Path) -> dict[str, Any]:
    """Return what was recorded of a checkpoint when it was saved; of those of earlier versions nothing."""
    metadata = json.loads(read_text(folder / "_CHECKPOINT_METADATA"))
    try:
        return {"digests": None, "best_step": None} | metadata.get("custom_metadata", {})
    except (AttributeError, TypeError):
        raise ValueError("it holds no object") from None


def digest(item: Any) -> str:
    """Hash names, dtypes, shapes and bytes of the leaves of an item."""
    found = xxh3_128()
    for path, leaf in jax.tree_util.tree_leaves_with_path(item):
        # All of it is on every device.
        array = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _broken(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"'{folder}' is not a complete checkpoint ({type(error).__name__}). Delete that folder to go on from "
        "the one before."
    )


def _damaged(folder: Path, item: str) -> UserError:
    return UserError(
        f"'{folder}' is damaged: its {item} is not what was saved there. Restore it from a backup, or delete "
        "that folder to go on from the one before."
    )
