"""Checkpoints of the training state: a thin layer over Orbax.

A checkpoint has the items `model` (the parameters and running statistics that are evaluated, which belong
together), `optimizer` (its state, and what it trains if a moving average of that is evaluated) and `meta`
(the step and the sums that the next log line reports). Data order, augmentation and learning rate are
functions of the seed and the step, so nothing else is needed to go on exactly.
"""

import functools
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.errors import RunFailed, UserError, explain
from train.models.network import Variables
from train.training.steps import TrainState

Metrics = dict[str, float]


def _quality(metrics: Metrics) -> tuple[float, float]:
    """Orders checkpoints: by accuracy, then by loss. What is not finite is the worst."""
    finite = math.isfinite(metrics["loss"])
    return (metrics["accuracy"], -metrics["loss"]) if finite else (-math.inf, -math.inf)


class Checkpoints:
    """The checkpoints of one run: the newest two and the best one by validation."""

    def __init__(self, run_dir: Path):
        _quieten()
        folder = (run_dir / "checkpoints").absolute()
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

    def __enter__(self) -> "Checkpoints":
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

    def save(self, state: TrainState, metrics: Metrics | None) -> None:
        """Saves the state at its step, with the validation metrics that rank it. A step is saved once."""
        step = int(state.step)
        if step == self.latest_step:
            return
        items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        except Exception as error:  # what Orbax raises depends on the file system
            reason = explain(error) or f"{error}. What was saved before is kept."
            folder = self._manager.directory
            raise RunFailed(f"step {step} could not be saved to '{folder}': {reason}") from error
        if not saved:
            raise RuntimeError(f"Orbax declined to save step {step} after step {self.latest_step}.")

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores the whole state of a step, with the structure, dtypes and sharding of `like`."""
        restored = self._read(step, _items(like))
        evaluated, optimizer = Variables(**restored["model"]), restored["optimizer"]
        trained = evaluated if like.average is None else Variables(**optimizer["variables"])
        return like._replace(
            variables=trained,
            average=None if like.average is None else evaluated,
            opt_state=optimizer["opt_state"],
            **restored["meta"],
        )

    def restore_model(self, step: int, like: Variables) -> Variables:
        """Restores what is evaluated at a step, with the shapes, dtypes and sharding of `like`."""
        return Variables(**self._read(step, {"model": like._asdict()})["model"])

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        wanted = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**wanted)).items())
        except Exception as error:  # what Orbax raises depends on which file is broken
            folder = Path(self._manager.directory / str(step))
            if not isinstance(error, FileNotFoundError) and (reason := explain(error)):
                raise RunFailed(f"'{folder}' could not be read: {reason}") from error
            raise _broken(folder, error) from error


@functools.cache
def _quieten() -> None:
    """Drops what Orbax and TensorStore print at length: no news, or what the error of a save says too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_unless_late(unraisable: Any) -> None:
        # A write that ends after the save which it was part of has failed finds nobody to tell.
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_unless_late


def _check_metrics(folder: Path) -> None:
    """Raises a UserError for checkpoints that the manager could not rank."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is no folder. Move it away, or take another run directory.")
    for path in folder.glob("[0-9]*/metrics/metrics"):
        try:
            _quality(json.loads(path.read_text()))
        except FileNotFoundError:
            continue  # the job that trains there has just deleted it
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(path.parent.parent, error) from error


def _broken(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"'{folder}' is no whole checkpoint ({type(error).__name__}). Delete that folder to go on from the "
        "one before."
    )


def _items(state: TrainState) -> dict[str, Any]:
    optimizer = {"opt_state": state.opt_state}
    if state.average is not None:
        optimizer["variables"] = state.variables._asdict()
    meta = {"step": state.step, "sums": state.sums, "failed_at": state.failed_at}
    return {"model": state.evaluated._asdict(), "optimizer": optimizer, "meta": meta}
