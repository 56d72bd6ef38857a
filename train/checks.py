"""What the values of a config have to satisfy."""

import dataclasses
import math

from train.config import Config, flatten
from train.errors import UserError


def check(config: Config) -> None:
    """Raises a UserError for a value that makes no sense, by itself or beside another."""
    values = flatten(dataclasses.asdict(config))
    length = "steps" if config.epochs is None else "epochs"
    rules = {
        length: ("a number > 0", lambda value: 0 < value < math.inf),
        "batch_size": ("1 or more", lambda value: value >= 1),
        "eval_every": ("1 or more", lambda value: value >= 1),
        "early_stopping": ("0 or more", lambda value: value >= 0),
        "profile": ("0 or more", lambda value: value >= 0),
        "devices": ("1 or more", lambda value: value is None or value >= 1),
        "coordinator": (
            "HOST:PORT",
            lambda value: value is None or all(value.rpartition(":")) and value.rpartition(":")[2].isdigit(),
        ),
        "num_processes": ("1 or more", lambda value: value is None or value >= 1),
        "peer_timeout": ("1 or more", lambda value: value >= 1),
        "seed": ("a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
        "data.validation": ("a fraction in [0, 1)", lambda value: 0 <= value < 1),
        "data.feature_scales": (
            "two numbers > 0, the lower one first, or none",
            lambda value: not value or len(value) == 2 and 0 < value[0] <= value[1] < math.inf,
        ),
        "data.crop": ("0 or more", lambda value: value >= 0),
        "data.shift": ("0 or more", lambda value: value >= 0),
        "data.device_gib": ("0 or more", lambda value: value >= 0),
        "model.widths": ("widths >= 1", lambda value: min(value, default=1) >= 1),
        "model.norm_momentum": ("a number in [0, 1]", lambda value: 0 <= value <= 1),
        "model.virtual_batch_size": ("1 or more", lambda value: value >= 1),
        "model.kernel_std": ("0 or more", lambda value: 0 <= value < math.inf),
        "model.norm_groups": ("1 or more", lambda value: value >= 1),
        "optimizer.learning_rate": ("a number > 0", lambda value: 0 < value < math.inf),
        "optimizer.base_batch_size": ("0 or more", lambda value: value >= 0),
        "optimizer.momentum": ("a number in [0, 1)", lambda value: 0 <= value < 1),
        "optimizer.weight_decay": ("0 or more", lambda value: 0 <= value < math.inf),
        "optimizer.warmup_steps": ("0 or more", lambda value: 0 <= value < 2**31),
        "optimizer.milestones": (
            "fractions in (0, 1), growing",
            lambda value: all(a < b for a, b in zip((0, *value), (*value, 1))),
        ),
        "optimizer.milestone_factor": ("a number > 0", lambda value: 0 < value < math.inf),
        "optimizer.clip_norm": ("0 or more", lambda value: 0 <= value < math.inf),
        "optimizer.accumulate": ("1 or more", lambda value: value >= 1),
        "optimizer.average": ("a number in [0, 1)", lambda value: 0 <= value < 1),
        "optimizer.label_smoothing": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    }
    if (config.steps is None) == (config.epochs is None):
        raise UserError(f"steps = {config.steps} and epochs = {config.epochs}; wanted one of the two.")
    for key, (wanted, holds) in rules.items():
        if not holds(values[key]):
            raise UserError(f"{key} = {values[key]!r}; wanted {wanted}.")
    _check_together(config)


def _check_together(config: Config) -> None:
    accumulate = config.optimizer.accumulate
    if config.batch_size % accumulate:
        raise UserError(
            f"batch_size = {config.batch_size} and optimizer.accumulate = {accumulate}; wanted parts of one "
            f"size: a batch_size of {accumulate * max(1, config.batch_size // accumulate)}, say."
        )
    if accumulate > 1 and config.model.norm == "flax":
        raise UserError(
            f"optimizer.accumulate = {accumulate} and model.norm = 'flax', whose running statistics cannot "
            "pool the parts of a batch; wanted model.norm = 'batch', or optimizer.accumulate = 1."
        )
    if config.model.norm_inputs and config.model.norm not in ("batch", "ghost", "flax"):
        raise UserError(
            f"model.norm_inputs = true and model.norm = {config.model.norm!r}; wanted one that normalizes "
            "each feature by itself: 'batch', 'ghost' or 'flax'."
        )
    if config.early_stopping and not config.data.validation:
        raise UserError(
            f"early_stopping = {config.early_stopping} and data.validation = 0; wanted a part of the "
            "training data to judge by, data.validation = 0.1, say."
        )
    processes = (config.coordinator, config.num_processes, config.process_id)
    if processes != (None, 1, None) and 0 < processes.count(None) < 3:
        raise UserError(
            "coordinator = {!r}, num_processes = {!r}, process_id = {!r}; wanted all three, or none.".format(
                *processes
            )
        )
    if config.process_id is not None and not 0 <= config.process_id < config.num_processes:
        raise UserError(
            f"process_id = {config.process_id}; wanted a number from 0 to {config.num_processes - 1}."
        )
    if config.devices is not None and (config.num_processes or 1) > 1:
        raise UserError(
            f"devices = {config.devices} and num_processes = {config.num_processes}; wanted one of the two: "
            "several processes use all of their devices."
        )
