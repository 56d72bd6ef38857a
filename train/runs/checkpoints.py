"""Checkpoints of a run: a thin layer over Orbax.

A checkpoint is a dict of pytrees, saved and restored by name. Data order, augmentation and learning rate are
functions of the seed and the step, so that a training state is all that is needed to go on exactly.
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

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.errors import RunFailed, UserError, explain

Metrics = dict[str, float]
RECALIBRATED = "recalibrated"  # the folder of the best model with running statistics that were pooled anew


def _quality(metrics: Metrics) -> Any:
    """Rank checkpoints by accuracy, where it is measured, then by loss. What is not finite is the worst."""
    finite = math.isfinite(metrics["loss"])
    return (metrics.get("accuracy", 0.0), -metrics["loss"]) if finite else (-math.inf, -math.inf)


class Checkpoints:
    """The checkpoints of one run: the newest two and the best one by validation."""

    def __init__(self, run_dir: Path, name: str = "checkpoints"):
        _silence_libraries()
        folder = (run_dir / name).absolute()
        _check_metrics(folder)
        policies = [
            checkpoint_managers.LatestN(2),
            checkpoint_managers.BestN(get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False),
        ]
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=_quality,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                # The next step overwrites the state's buffers, so a save has to end before it.
                enable_async_checkpointing=False,
            ),
        )

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
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(**saves), metrics=metrics)
        except Exception as error:  # what Orbax raises depends on the file system
            reason = explain(error) or f"{error}. What was saved before is kept."
            folder = self._manager.directory
            raise RunFailed(f"step {step} could not be saved to '{folder}': {reason}") from error
        if not saved:
            raise RuntimeError(f"Orbax declined to save step {step} after step {self.latest_step}.")

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Restore items of a step, with the structure, shapes, dtypes and sharding of `like`."""
        restores = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**restores)).items())
        except Exception as error:  # what Orbax raises depends on which file is broken
            folder = Path(self._manager.directory / str(step))
            if not isinstance(error, FileNotFoundError) and (reason := explain(error)):
                raise RunFailed(f"'{folder}' could not be read: {reason}") from error
            raise _broken(folder, error) from error


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
        # A write that ends after its save has failed wants to tell an event loop that is gone.
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_unless_late


def _check_metrics(folder: Path) -> None:
    """Raise a UserError for checkpoints that the manager could not rank."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder. Move it away, or give another run directory.")
    for path in folder.glob("[0-9]*/metrics/metrics"):
        try:
            _quality(json.loads(path.read_text()))
        except FileNotFoundError:
            continue  # the job that trains there has just deleted it
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(path.parent.parent, error) from error


def _broken(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"'{folder}' is not a complete checkpoint ({type(error).__name__}). Delete that folder to go on from "
        "the one before."
    )
