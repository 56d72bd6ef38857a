"""What a job as a whole has to be, beyond the types and ranges of its values."""

import dataclasses
import re

from train.config.parsing import parse
from train.config.schema import OF_NUMBERS, Config
from train.config.values import flatten
from train.errors import UserError


def check(config: Config) -> None:
    """Raise a UserError for a value outside its range, or for values that contradict each other."""
    for key, value in flatten(dataclasses.asdict(config)).items():
        if isinstance(value, str):
            check_text(key, value)
    parse(dataclasses.asdict(config))
    accumulate, scales = config.optimizer.accumulate, config.data.feature_scales
    milestones = config.optimizer.milestones
    processes = (config.coordinator, config.num_processes, config.process_id)
    if (config.steps is None) == (config.epochs is None):
        raise UserError(
            f"expected either steps or epochs, got steps = {config.steps}, epochs = {config.epochs}."
        )
    if scales and (len(scales) != 2 or scales[0] > scales[1]):
        raise UserError(
            f"data.feature_scales: expected none, or the lowest and the highest, got {list(scales)}."
        )
    if scales and scales[0] < 1e-30:
        raise UserError(f"data.feature_scales: expected numbers from 1e-30 to 1e38, got {list(scales)}.")
    if list(milestones) != sorted(set(milestones)):
        raise UserError(f"optimizer.milestones: expected increasing fractions, got {list(milestones)}.")
    if config.batch_size % accumulate:
        multiple = accumulate * max(1, config.batch_size // accumulate)
        raise UserError(
            f"batch_size: expected a multiple of optimizer.accumulate = {accumulate}, such as {multiple}, "
            f"got {config.batch_size}."
        )
    if config.early_stopping and not config.data.validation:
        raise UserError(
            f"data.validation: expected a fraction > 0 with early_stopping = {config.early_stopping}, which "
            "judges by it, got 0."
        )
    if config.model.loss in OF_NUMBERS:
        for key, value in (
            ("model.class_weights", config.model.class_weights),
            ("optimizer.label_smoothing", config.optimizer.label_smoothing),
        ):
            if value:
                raise UserError(
                    f"{key}: expected none with model.loss = {config.model.loss!r}, which has no classes, "
                    f"got {list(value) if isinstance(value, tuple) else repr(value)}."
                )
    _check_domains(config)
    if config.coordinator is not None and not re.fullmatch(r".+:\d+", config.coordinator):
        raise UserError(f"coordinator: expected HOST:PORT, got {config.coordinator!r}.")
    if processes != (None, 1, None) and 0 < processes.count(None) < 3:
        raise UserError(
            "expected all of coordinator, num_processes and process_id, or none of them, got {!r}, {!r} and "
            "{!r}.".format(*processes)
        )
    count = config.num_processes or 1
    if config.process_id is not None and not 0 <= config.process_id < count:
        raise UserError(f"process_id: expected 0 to {count - 1}, got {config.process_id}.")
    if config.devices is not None and count > 1:
        raise UserError(
            f"devices: expected none with num_processes = {config.num_processes}, because several "
            f"processes use all of their devices, got {config.devices}."
        )


def _check_domains(config: Config) -> None:
    renderings, adversarial = list(config.data.renderings), config.optimizer.adversarial
    domains = config.model.domains
    if len(set(renderings)) < len(renderings):
        raise UserError(f"data.renderings: expected each once, got {renderings}.")
    if adversarial and len(renderings) > 1:
        raise UserError(
            f"optimizer.adversarial: expected 0 with several data.renderings, {renderings}, got "
            f"{adversarial:g}."
        )
    number = 2 if adversarial else max(1, len(renderings))
    kinds = "clean and adversarial examples" if adversarial else f"data.renderings = {renderings}"
    if domains not in (1, number):
        expected = "1" if number == 1 else f"1 or {number}"
        raise UserError(f"model.domains: expected {expected} with {kinds}, got {domains}.")
    if config.model.affine_by_domain and domains == 1:
        raise UserError("model.affine_by_domain: expected false with model.domains = 1, got true.")


def check_text(key: str, text: str) -> None:
    """Raise a UserError for text that no file can be named with, or that JSON cannot hold."""
    if not text:
        raise UserError(f"{key}: expected a value, got ''.")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{key}: expected text in UTF-8 without NUL characters, got {text!r}.")
