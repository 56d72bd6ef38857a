"""What a run has reached: summary.json."""

import dataclasses
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from train.errors import UserError
from train.runs.checkpoints import Checkpoints, open_recalibrated
from train.runs.files import is_number, read_json, read_lines

SPLITS = ("train", "validation", "test")
Status = Literal["finished", "stopped", "failed"]

# How metrics that say how good a network is are called.
SAID = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "r2": "R^2"}
OF_EACH = ("class_accuracy", "rendering_accuracy", "rendering_r2")  # metrics that are several numbers by name
NAMED = 20  # at most, that are printed


@dataclass(frozen=True)
class Summary:
    """What a run has reached; None where it has no evaluation yet, or the number is not known."""

    status: Status
    step: int | None = None
    best_step: int | None = None  # by validation; the last one where there is none
    test_accuracy: float | None = None  # of the best step; of numbers there is none
    test_loss: float | None = None
    best_test_accuracy: float | None = None  # the maximum of the test curve, as papers report it
    recalibrated: dict[str, float] | None = None  # the test metrics of the best step after recalibration
    wall_seconds: float | None = None  # earlier sessions included
    examples_per_second: float | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    best_test_r2: float | None = None  # likewise, of numbers
    test: dict[str, Any] | None = None  # all metrics of the best step
    validated: bool = True  # whether there is validation; earlier versions did not say

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "finished" and self.step is not None

    @property
    def reached(self) -> str:
        """What the best step has reached, in words."""
        said = _said(self.test or {"accuracy": self.test_accuracy, "loss": self.test_loss})
        if not said:
            return "no evaluation yet"
        after = f"; after recalibration {_said(self.recalibrated)}" if self.recalibrated else ""
        which = ", the best by validation" * self.validated
        return f"test {said} at step {self.best_step}{which}{after}"


def _said(test: dict[str, Any]) -> str:
    """Return the metrics of the test split that say how good a network is, in words."""
    said = [f"{said} {test[key]:.4f}" for key, said in SAID.items() if test.get(key) is not None]
    for key in OF_EACH:
        if said and 0 < len(of_each := test.get(key, {})) <= NAMED:
            known = (f"{name} {'-' if a is None else f'{a:.4f}'}" for name, a in of_each.items())
            said[-1] += f" ({', '.join(known)})"
    if (error := test.get("mean_absolute_error")) is not None:
        said.append(f"mean absolute error {error:.4g}")
    return ", ".join(said)


def read_summary(run_dir: Path) -> Summary | None:
    """Read the summary of a run; None if there is none, or a broken one, which the next start replaces."""
    try:
        summary = Summary(**read_json(run_dir / "summary.json"))
        status, step, *numbers, validated = dataclasses.astuple(
            dataclasses.replace(summary, test=None, recalibrated=None)
        )
        known = status in get_args(Status) and type(step) in (int, type(None)) and type(validated) is bool
        measured = all(map(_are_metrics, (summary.test or {}, summary.recalibrated or {})))
        return summary if known and measured and all(map(is_number, numbers)) else None
    except (UserError, TypeError):
        return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without a last line that a kill may have cut, and others that are no results."""
    lines = read_lines(run_dir / "metrics.jsonl")
    return [
        line
        for line in lines
        if "loss" in line and line.get("split") in SPLITS and _are_metrics(line | {"split": None})
    ]


def _are_metrics(value: Any) -> bool:
    """Return whether a value of a JSON file is metrics: numbers by their names, and those of each class."""
    if not isinstance(value, dict):
        return False
    of_each = [value[name] for name in OF_EACH if name in value]
    if not all(isinstance(numbers, dict) for numbers in of_each):
        return False
    others = (number for name, number in value.items() if name not in OF_EACH)
    return all(map(is_number, (*others, *(number for numbers in of_each for number in numbers.values()))))


def summarize(
    run_dir: Path,
    checkpoints: Checkpoints,
    status: Status,
    wall_seconds: float,
    examples_per_second: float | None,
) -> Summary:
    """Return what a run has reached, by its metrics and its checkpoints."""
    lines = read_metrics(run_dir)
    tests = {line["step"]: line for line in lines if line["split"] == "test"}
    best = tests.get(checkpoints.best_step, {})
    with open_recalibrated(run_dir, best_step := checkpoints.best_step) as of_best:
        recalibrated = of_best.metrics(best_step) if of_best and best_step is not None else None
    maximum = lambda key: max(
        (line[key] for line in tests.values() if line.get(key) is not None), default=None
    )
    metrics = {key: value for key, value in best.items() if key not in ("step", "split", "seconds")}
    return Summary(
        status=status,
        step=checkpoints.latest_step,
        best_step=checkpoints.best_step,
        test_accuracy=best.get("accuracy"),
        test_loss=best.get("loss"),
        best_test_accuracy=maximum("accuracy"),
        recalibrated=recalibrated,
        wall_seconds=round(wall_seconds, 3),
        examples_per_second=examples_per_second and round(examples_per_second, 1),
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(),
        best_test_r2=maximum("r2"),
        test=metrics or None,
        validated=any(line["split"] == "validation" for line in lines),
    )


def peak_host_bytes() -> int:
    """Return the most memory that this process has held."""
    status = Path("/proc/self/status")
    # On Linux, getrusage also counts what the process that started this one has held.
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # kilobytes but on macOS


def peak_device_bytes() -> int | None:
    """Return the most memory that one device has held; None on CPUs, whose memory is the host's."""
    held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in held if peak is not None), default=None)
