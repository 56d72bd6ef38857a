"""What follows from the values of a job: their names, how two jobs differ, and how long one is."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from train.config.schema import Config
from train.errors import UserError

# How and where a job runs does not change what it computes, but for rounding.
NOT_COMPARED = (
    *("run_dir", "data.path", "data.cache", "profile", "devices"),
    *("coordinator", "num_processes", "process_id", "peer_timeout"),
)


def differences(a: Config, b: Config, *, ignore: Sequence[str] = ()) -> list[str]:
    """List the keys in which two jobs differ, each with both values."""
    flat_a, flat_b = (flatten(dataclasses.asdict(config)) for config in (a, b))
    return [
        f"{key} = {flat_a[key]!r}, now {flat_b[key]!r}"
        for key in flat_a
        if key not in ignore and flat_a[key] != flat_b[key]
    ]


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Return how many steps the job has."""
    steps = config.steps if config.epochs is None else math.ceil(config.epochs * steps_per_epoch)
    assert steps is not None, "check() sees to it that one of the two is given"
    if steps >= 2**31:
        raise UserError(f"epochs: expected fewer than 2**31 steps, got {steps}.")
    return steps


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the values of nested tables as files and flags do: `data.path`."""
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
