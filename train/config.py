"""What a job is: the schema, and loading it from TOML files and command-line flags.

The dataclasses are the schema. A TOML file is turned into flags, and tyro parses file and command line alike,
so that both have the same keys, the same types and the same messages.
"""

import dataclasses
import math
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro


class UserError(Exception):
    """Something that the user can mend: a bad key, a missing file. The program prints it and exits with 2."""


@dataclass(frozen=True)
class Data:
    name: Literal["digits", "mnist", "npz"] = "digits"
    """Which data: scikit-learn's handwritten digits (embedded), MNIST, or arrays of your own."""
    path: str | None = None
    """The .npz file or its folder; if not given, $JBN_DATA. Digits need none."""
    validation: float = 0.1
    """The fraction of the training data to hold out for choosing the best checkpoint; 0 holds out none."""


@dataclass(frozen=True)
class Model:
    name: Literal["mlp", "cnn"] = "mlp"
    """A multi-layer perceptron, or a small convolutional network."""
    norm: Literal["batch", "none"] = "batch"
    """What normalizes the input of each activation."""
    norm_momentum: float = 0.9
    """The weight of the old value in the running statistics (PyTorch's momentum is 1 minus this)."""
    widths: tuple[int, ...] = (128, 128)
    """Features of each hidden layer; for the cnn, channels of each stage."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """The activation of each hidden layer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of activations. Parameters, statistics and loss are float32."""


@dataclass(frozen=True)
class Optimizer:
    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    learning_rate: float = 0.1
    """The peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD; 0 is plain SGD."""
    weight_decay: float = 0.0
    """Decay of the weights; never applied to scales and biases."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """The learning rate after warm-up: held, or taken to 0 along a cosine."""
    warmup_steps: int = 0
    """Steps in which the learning rate grows linearly from 0."""


@dataclass(frozen=True)
class Config:
    """Train a network. The run directory receives metrics, checkpoints, a summary; a second call resumes."""

    run_dir: str
    """Where the run's files go."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    seed: int = 0
    """Initial weights and the order of the data follow from it."""
    steps: int | None = None
    """How long to train, in steps; replaces epochs."""
    epochs: float | None = None
    """How long to train, in passes over the training data; replaces steps."""
    batch_size: int = 128
    """Examples in a step."""
    eval_every: int = 100
    """Steps between evaluations; each is followed by a checkpoint. The last step is always evaluated."""


def load(path: Path, overrides: Sequence[str]) -> Config:
    """Loads a job: the defaults, then the file (and the file that its `base` names), then the flags.

    Raises:
      UserError: the file cannot be read, or keys contradict each other.
      SystemExit: with code 2 for an unknown key or a wrong type, after tyro has printed which key was meant.
    """
    config = _parse(overrides, _from_file(path), f"python -m train {path}")
    _check(config)
    return config


def from_dict(values: dict[str, Any]) -> Config:
    """Rebuilds the config of a run from its config.json."""
    sections = {"data": Data, "model": Model, "optimizer": Optimizer}
    built = {key: sections[key](**value) if key in sections else value for key, value in values.items()}
    built["model"] = dataclasses.replace(built["model"], widths=tuple(built["model"].widths))
    return Config(**built)


def differences(a: Config, b: Config, *, ignore: Sequence[str] = ()) -> list[str]:
    """Lists the keys in which two jobs differ, each with both values."""
    flat_a, flat_b = (_flatten(dataclasses.asdict(config)) for config in (a, b))
    return [
        f"{key} = {flat_a[key]!r}, now {flat_b[key]!r}"
        for key in flat_a
        if key not in ignore and flat_a[key] != flat_b[key]
    ]


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Returns how many steps the job has."""
    steps = config.steps if config.steps is not None else math.ceil(config.epochs * steps_per_epoch)
    if steps >= 2**31:
        raise UserError(
            f"The job has {steps} steps; wanted fewer than 2**31, which is how far steps are counted."
        )
    return steps


def _from_file(path: Path, above: tuple[Path, ...] = ()) -> Config:
    if path.resolve() in above:
        raise UserError(f"{path} inherits from itself; wanted a `base` that does not lead back here.")
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `python -m train list` shows the configs.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from None
    default = Config(run_dir=f"runs/{path.stem}")
    if "base" in table:
        base = _from_file(path.parent / str(table.pop("base")), (*above, path.resolve()))
        default = dataclasses.replace(base, run_dir=default.run_dir)
    arguments = [text for key, value in _flatten(table).items() for text in _as_flag(key, value)]
    try:
        return _parse(arguments, default, f"python -m train {path}")
    except SystemExit:
        print(f"The mistake is in the file {path}.", file=sys.stderr)
        raise


def _parse(arguments: Sequence[str], default: Config, program: str) -> Config:
    config = tyro.cli(
        Config, args=list(arguments), default=default, prog=program, config=(tyro.conf.FlagConversionOff,)
    )
    # A length given here replaces the one given before.
    if config.epochs != default.epochs and config.steps == default.steps:
        return dataclasses.replace(config, steps=None)
    if config.steps != default.steps and config.epochs == default.epochs:
        return dataclasses.replace(config, epochs=None)
    return config


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _as_flag(key: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{key}", *map(str, values)]


def _check(config: Config) -> None:
    values = _flatten(dataclasses.asdict(config))
    if (config.steps is None) == (config.epochs is None):
        raise UserError(f"steps = {config.steps} and epochs = {config.epochs}; wanted one of the two.")
    length = "steps" if config.epochs is None else "epochs"
    rules = {
        length: ("a number > 0", lambda value: 0 < value < math.inf),
        "batch_size": ("1 or more", lambda value: value >= 1),
        "eval_every": ("1 or more", lambda value: value >= 1),
        "seed": ("a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
        "data.validation": ("a fraction in [0, 1)", lambda value: 0 <= value < 1),
        "model.widths": ("one width or more, each >= 1", lambda value: value and min(value) >= 1),
        "model.norm_momentum": ("a number in [0, 1]", lambda value: 0 <= value <= 1),
        "optimizer.learning_rate": ("a number > 0", lambda value: 0 < value < math.inf),
        "optimizer.momentum": ("a number in [0, 1)", lambda value: 0 <= value < 1),
        "optimizer.weight_decay": ("0 or more", lambda value: 0 <= value < math.inf),
        "optimizer.warmup_steps": ("0 or more", lambda value: 0 <= value < 2**31),
    }
    for key, (wanted, holds) in rules.items():
        if not holds(values[key]):
            raise UserError(f"{key} = {values[key]!r}; wanted {wanted}.")
