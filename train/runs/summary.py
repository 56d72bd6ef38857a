"""What a session says of itself: before it starts, and when it has ended."""

import re
import resource
import sys
from pathlib import Path
from typing import Any

import jax

from train.runs.checkpoints import Checkpoints
from train.training.job import Job
from train.runs.log import read_metrics


def heading(job: Job, step: int | None) -> str:
    """Says what is about to be trained, and from which step on."""
    sizes = [f"{len(getattr(job.data, split)):,} {split}" for split in ("train", "validation", "test")]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(job.initial.variables.params))
    devices = f"{job.mesh.size} x " * (job.mesh.size > 1) + jax.devices()[0].device_kind
    lines = [
        f"data   {job.config.data.name}: {', '.join(sizes)} examples",
        f"model  {job.config.model.name}: {parameters:,} parameters, norm {job.config.model.norm}",
        f"run    {job.total_steps:,} steps of {job.config.batch_size} on {devices}",
    ]
    return "\n".join(lines) + ("" if step is None else f", going on from step {step:,}")


def summarize(
    run_dir: Path,
    checkpoints: Checkpoints,
    status: str,
    wall_seconds: float,
    examples_per_second: float | None,
) -> dict[str, Any]:
    """Returns what a run has reached, as summary.json has it."""
    tests = {line["step"]: line for line in read_metrics(run_dir) if line["split"] == "test"}
    best = tests.get(checkpoints.best_step, {})
    return {
        "status": status,
        "step": checkpoints.latest_step,
        "best_step": checkpoints.best_step,
        "test_accuracy": best.get("accuracy"),
        "test_loss": best.get("loss"),
        "best_test_accuracy": max((line["accuracy"] for line in tests.values()), default=None),
        "wall_seconds": round(wall_seconds, 3),
        "examples_per_second": examples_per_second and round(examples_per_second, 1),
        "peak_host_bytes": peak_host_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }


def peak_host_bytes() -> int:
    """Returns the most memory that this process has held."""
    status = Path("/proc/self/status")
    # On Linux, getrusage also counts what the process that started this one has held.
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # kilobytes but on macOS


def peak_device_bytes() -> int | None:
    """Returns the most memory that one device has held; None on CPUs, whose memory is the host's."""
    held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in held if peak is not None), default=None)
