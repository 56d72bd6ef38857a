"""What a run has reached: summary.json."""

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from train.errors import UserError
from train.runs.checkpoints import Checkpoints, open_recalibrated
from train.runs.files import read_json, read_lines

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Summary:
    """What a run has reached; None where it has no evaluation yet, or the number is not known."""

    status: Status
    step: int | None = None
    best_step: int | None = None  # by validation
    test_accuracy: float | None = None  # of the best step
    test_loss: float | None = None
    best_test_accuracy: float | None = None  # the maximum of the test curve, as papers report it
    recalibrated: dict[str, float] | None = None  # the test metrics of the best step after recalibration
    wall_seconds: float | None = None  # earlier sessions included
    examples_per_second: float | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "finished" and self.step is not None


def read_summary(run_dir: Path) -> Summary | None:
    """Read the summary of a run; None if there is none, or a broken one, which the next start replaces."""
    try:
        summary = Summary(**read_json(run_dir / "summary.json"))
        return summary if isinstance(summary.step, int | None) else None
    except (UserError, TypeError):
        return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without a last line that a kill may have cut."""
    return [line for line in read_lines(run_dir / "metrics.jsonl") if "split" in line]


def summarize(
    run_dir: Path,
    checkpoints: Checkpoints,
    status: Status,
    wall_seconds: float,
    examples_per_second: float | None,
) -> Summary:
    """Return what a run has reached, by its metrics and its checkpoints."""
    tests = {line["step"]: line for line in read_metrics(run_dir) if line["split"] == "test"}
    best = tests.get(checkpoints.best_step, {})
    with open_recalibrated(run_dir, best_step := checkpoints.best_step) as of_best:
        recalibrated = of_best.metrics(best_step) if of_best and best_step is not None else None
    accuracies = [accuracy for line in tests.values() if (accuracy := line.get("accuracy")) is not None]
    return Summary(
        status=status,
        step=checkpoints.latest_step,
        best_step=checkpoints.best_step,
        test_accuracy=best.get("accuracy"),
        test_loss=best.get("loss"),
        best_test_accuracy=max(accuracies, default=None),
        recalibrated=recalibrated,
        wall_seconds=round(wall_seconds, 3),
        examples_per_second=examples_per_second and round(examples_per_second, 1),
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(),
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
