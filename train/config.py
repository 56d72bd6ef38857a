"""The job: its keys, their ranges, and how a TOML file and flags become one.

The dataclasses are the schema for files, flags and a run's config.json alike. Pydantic checks types and
ranges; tyro makes the flags.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from train.errors import UserError

Count = Annotated[int, Field(ge=1, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0, le=1e38, allow_inf_nan=False)]  # as float32 holds it
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# Each name is a line of a table too: READERS in train/data/formats/readers.py, NETWORKS in
# train/models/build.py, NORMS in train/models/norms.py and LOSSES in train/training/losses.py. They stand
# here because flags and --help must not wait for JAX.
DataName = Literal["digits", "mnist", "cifar10", "npz", "csv", "folder"]
NetworkName = Literal["mlp", "nnx_mlp", "cnn", "resnet20", "resnet56", "resnet18", "resnet50"]
NormName = Literal["batch", "none", "ghost", "layer", "group", "flax"]
LossName = Literal["cross_entropy", "squared_error"]


@dataclass(frozen=True)
class Data:
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: DataName = "digits"
    """Which data: scikit-learn's handwritten digits (embedded), MNIST, CIFAR-10, or data of your own: arrays,
    a table, or a folder of images, one folder a class."""
    path: str | None = None
    """The file or folder; if not given, $JBN_DATA. Digits need none."""
    label: str = "label"
    """The column of a table (name = "csv") that is to be predicted; all others are features."""
    image_size: NonNegative = 0
    """Pixels to which the shorter side of the images in a folder is scaled, before their middle square is
    cut out; 0 takes them as they are, if all have one size."""
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The fraction of the examples to hold out for testing, where the data have no test split."""
    validation: Fraction = 0.1
    """The fraction of the training data to hold out for choosing the best checkpoint, where they have no
    validation split of their own; 0 holds out none."""
    normalize: bool = False
    """Whether the network sees inputs less their mean, divided by their standard deviation, both over the
    training data: of each channel of images, of each feature of vectors."""
    feature_scales: tuple[Positive, ...] = ()
    """Lowest and highest of the scales with which each feature (each pixel of images) is multiplied, drawn
    log-uniformly once and for all: data that nobody normalized. If empty, none are."""
    flip: bool = False
    """Whether to mirror each training image with probability 1/2."""
    crop: NonNegative = 0
    """Pixels by which to pad training images with their reflection, to cut their size out again anywhere."""
    shift: NonNegative = 0
    """Pixels by which to move training images at most, in both directions; what comes in is black."""
    device_gib: NonNegativeFloat = 1.0
    """Data of up to this many GiB stay on the devices; of larger data they get one batch at a time."""
    cache: str | None = None
    """The folder for images once decoded; if not given, data-cache beside the run directory."""


@dataclass(frozen=True)
class Model:
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: NetworkName = "mlp"
    """A multi-layer perceptron in Flax Linen or in NNX, a small convolutional network, a residual network for
    small images (20, 56) or for large ones (18, 50)."""
    norm: NormName = "batch"
    """What normalizes the input of each activation: batch norm, nothing, batch norm of virtual batches, or
    Flax's layer norm, group norm, or batch norm."""
    norm_momentum: Annotated[float, Field(ge=0, le=1)] = 0.9
    """The weight of the old value in the running statistics (PyTorch's momentum is 1 minus this)."""
    norm_debias: bool = True
    """Whether the running statistics leave their initial values (mean 0, variance 1) out of account."""
    norm_inputs: bool = False
    """Whether the inputs are normalized too, feature by feature, before the first layer."""
    virtual_batch_size: Count = 32
    """Examples in each virtual batch of norm = "ghost"."""
    norm_groups: Count = 8
    """Groups of channels of norm = "group"."""
    widths: tuple[Count, ...] = ()
    """Features of each hidden layer, channels of each stage; if empty, the network's usual ones."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """The activation of each hidden layer."""
    kernel_std: NonNegativeFloat = 0.0
    """The standard deviation of Gaussian initial weights; 0 takes the network's usual ones."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of activations. Parameters, statistics and loss are float32."""
    frozen: Literal["none", "norms", "statistics", "body"] = "none"
    """What does not learn: with "norms" the running statistics, which training then normalizes with, and the
    scale and bias of every norm; with "statistics" only those; with "body" everything but the last layer."""
    loss: LossName = "cross_entropy"
    """What training minimizes: cross_entropy of classes, or squared_error of numbers."""
    class_weights: Literal["balanced"] | tuple[NonNegativeFloat, ...] = ()
    """The weight of each class in the loss, in their order; "balanced" gives all classes the same weight
    together, however many examples they have. If empty, all examples weigh the same."""


@dataclass(frozen=True)
class Optimizer:
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    """SGD with Nesterov momentum, AdamW, and LARS and LAMB for large batches."""
    learning_rate: Positive = 0.1
    """The peak learning rate."""
    base_batch_size: NonNegative = 0
    """The batch_size that learning_rate is meant for; at others it is in proportion (Goyal et al. 2017). 0
    takes it as it is."""
    momentum: Fraction = 0.9
    """Momentum of SGD and LARS; 0 is plain SGD."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of the weights; never applied to scales and biases."""
    schedule: Literal["constant", "cosine", "linear", "step"] = "cosine"
    """The learning rate after warm-up: held, taken to 0 by a cosine or a line, or reduced at milestones."""
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Steps in which the learning rate grows linearly from 0."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Fractions of the job after which schedule = "step" multiplies the rate with milestone_factor."""
    milestone_factor: Positive = 0.1
    """What the learning rate is multiplied with at each milestone."""
    clip_norm: NonNegativeFloat = 0.0
    """The norm of all gradients together to which larger ones are scaled down; 0 does not."""
    accumulate: Count = 1
    """Parts of each batch whose gradients are computed one after the other, for batches that memory would not
    hold. Batch norm normalizes each part by itself; its running statistics are those of the whole batch."""
    average: Fraction = 0.0
    """The weight of the old value in a moving average of weights and running statistics, which is what is
    evaluated, best around 0.99; 0 keeps none."""
    label_smoothing: Fraction = 0.0
    """The probability that training gives to all classes alike."""


@dataclass(frozen=True)
class Config:
    """Train a network. The run directory receives metrics, checkpoints, a summary; a second call resumes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    run_dir: str
    """Where the run's files go."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Initial weights, augmentation and the order of the data follow from it."""
    steps: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    """How long to train, in steps; replaces epochs."""
    epochs: Annotated[float | None, Field(gt=0, le=1e38, allow_inf_nan=False)] = None
    """How long to train, in passes over the training data; replaces steps."""
    batch_size: Count = 128
    """Examples in a step, over all devices."""
    eval_every: Count = 100
    """Steps between evaluations; each is followed by a checkpoint. The last step is always evaluated."""
    inspect: bool = False
    """Whether to measure at step 0 and at each evaluation what the layers see, and how loss and gradients
    change along a step: into inspection.jsonl. It takes as long as ten steps, and one more for each layer."""
    early_stopping: NonNegative = 0
    """Evaluations without a better one, by validation, after which the job is finished; 0 goes to its end."""
    init_from: str | None = None
    """Where parameters and running statistics start from: the best checkpoint of a run directory, or a
    .safetensors or .npz file of PyTorch's resnet18 or resnet50."""
    recalibrate: bool = False
    """Whether to pool the running statistics anew over the training data, at the end, for the best
    checkpoint: with the weights as they then are."""
    profile: NonNegative = 0
    """Steps to trace into the run directory's profile/, once the program is compiled; 0 traces none."""
    devices: Annotated[int | None, Field(ge=1)] = None
    """How many of this machine's devices to use; if not given, all devices of all processes."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where Slurm, Kubernetes, MPI or a TPU pod do not provide it."""
    num_processes: Annotated[int | None, Field(ge=1)] = None
    """How many processes train together; 1 asks no cluster."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    peer_timeout: Annotated[int, Field(ge=1, lt=10**6)] = 100
    """Seconds after which a process that does not come, or is silent, is given up, and the job with it."""


CONFIGS = Path(__file__).parent.parent / "configs"  # those that come with the program
LARGEST_FILE = 2**16  # bytes of TOML, which is parsed in a time that grows with their square

# How and where a job runs does not change what it computes, but for rounding.
NOT_COMPARED = (
    *("run_dir", "data.path", "data.cache", "profile", "devices"),
    *("coordinator", "num_processes", "process_id", "peer_timeout"),
)


def load(path: Path, overrides: Sequence[str]) -> Config:
    """Load a job: the defaults, then the file (and the file that its `base` names), then the flags.

    Raises:
      UserError: the file cannot be read, a key or a value is not valid, or two values contradict each other.
      SystemExit: with code 2 for an unknown flag or a wrong type, after tyro has printed which was meant.
    """
    default = parse(_read(path), where=f"{path}: ")
    for word in overrides:
        if re.fullmatch(r"(--[\w.-]+=)?[\d.e+-]+,[\d.e+,-]*", word):
            spaced = word.rpartition("=")[2].replace(",", " ").strip()
            raise UserError(
                f"expected spaces between the numbers of a list, `{spaced}`, got '{word}'; commas, between "
                "several values of a key, are for `python -m train sweep`."
            )
    config = tyro.cli(
        Config,
        args=list(overrides),
        default=default,
        prog=f"python -m train {path}",
        config=(tyro.conf.FlagConversionOff,),
    )
    config = dataclasses.replace(config, **_one_length(default, config))
    check(config)
    return config


def parse(values: dict[str, Any], *, where: str = "") -> Config:
    """Build a config from the values of a TOML or JSON file; errors begin with `where`."""
    try:
        # By way of JSON, where a list may become a tuple although all else is strict.
        return _SCHEMA.validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise UserError(where + _explained(error)) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # of thousands of digits, or lists in lists in lists
        raise UserError(f"{where}expected a job, got values that cannot be one: {error}.") from None


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
    if config.model.loss == "squared_error":
        for key, value in (
            ("model.class_weights", config.model.class_weights),
            ("optimizer.label_smoothing", config.optimizer.label_smoothing),
        ):
            if value:
                raise UserError(
                    f"{key}: expected none with model.loss = 'squared_error', which has no classes, got "
                    f"{list(value) if isinstance(value, tuple) else repr(value)}."
                )
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


def check_text(key: str, text: str) -> None:
    """Raise a UserError for text that no file can be named with, or that JSON cannot hold."""
    if not text:
        raise UserError(f"{key}: expected a value, got ''.")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{key}: expected text in UTF-8 without NUL characters, got {text!r}.")


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


def closest_config(word: str) -> str | None:
    """Return the config with a name like this, of those next to it and those that come with the program."""
    name = Path(word).name.lower().removesuffix(".toml")
    known = {
        path.stem.lower(): path for folder in (CONFIGS, Path(word).parent) for path in folder.glob("*.toml")
    }
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return os.path.relpath(known[close[0]]) if close else None


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a TOML file over those of its base."""
    try:
        resolved = path.resolve()
        if resolved in above:
            raise UserError(f"{path} inherits from itself: expected a `base` that does not lead back here.")
        if len(above) > 99:
            raise UserError(f"{path} is the base of more than 99 configs, one of the other: expected fewer.")
        size = path.stat().st_size
        if not path.is_file():  # A pipe may never end, nor a device.
            raise ValueError("it is a folder, a pipe or a device")
        if size > LARGEST_FILE:
            raise ValueError(f"it has {size:,} bytes, more than {LARGEST_FILE:,}")
        table = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        close = closest_config(str(path))
        meant = f"did you mean {close}?" if close else "`python -m train list` shows the configs."
        raise UserError(f"{path} does not exist; {meant}") from None
    # RuntimeError: of links that lead to each other, up to Python 3.12.
    except (OSError, ValueError, RecursionError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from None
    below, base = {}, table.pop("base", None)
    parse({"run_dir": ""} | table, where=f"{path}: ")  # by itself: its mistakes are not those of its base
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base: expected a string, got {_said(base)}.")
        below = _read(path.parent / base, (*above, resolved))
    if {"steps", "epochs"} & table.keys():
        below = {key: value for key, value in below.items() if key not in ("steps", "epochs")}
    sections = {
        key: below[key] | value
        for key, value in table.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | {"run_dir": f"runs/{path.stem}"} | table | sections


def _one_length(before: Config, after: Config) -> dict[str, None]:
    """Return which of steps and epochs to drop: a length given now replaces the other given before."""
    if (after.steps == before.steps) == (after.epochs == before.epochs):
        return {}
    return {"steps": None} if after.steps == before.steps else {"epochs": None}


# How pydantic names a problem -> what was expected.
_EXPECTED = {
    "missing": "a value",
    "dataclass_type": "a table",
    "tuple_type": "a list",
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "greater_than": "a number > {limit}",
    "greater_than_equal": "a number >= {limit}",
    "less_than": "a number < {limit}",
    "less_than_equal": "a number <= {limit}",
}


def _explained(error: ValidationError) -> str:
    """Say in one sentence what the first problem is."""
    first, *others = error.errors()
    # A value of several types has a problem with each: what is inside one of them says the most.
    same = [first, *(problem for problem in others if problem["loc"][:2] == first["loc"][:2])]
    problem = max(same, key=lambda problem: len(problem["loc"])) if _tagged(first["loc"]) else first
    kind, text = problem["type"], problem["msg"].removeprefix("Input should be ")
    loc = [part for part in problem["loc"] if not _tagged([part])] or [""]
    *section, _ = loc
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)[1:]
    if kind == "unexpected_keyword_argument":
        schema = _SECTIONS[str(section[0])] if section else Config
        return f"{key} is not a key; {_meant(key, [field.name for field in dataclasses.fields(schema)])}."
    limit = text.rpartition(" ")[2]
    if limit.isdigit() and len(limit) > 20:
        limit = f"{float(limit):g}"
    expected = _EXPECTED.get(kind, "{text}").format(text=text, limit=limit)
    expected += " or a list" * any(other["type"] == "tuple_type" for other in same if other is not problem)
    if kind == "json_invalid":  # which is nested too deeply
        return f"expected a job, got values that cannot be one: {text.rpartition(': ')[2]}."
    got = "none" if kind == "missing" else _said(problem["input"])
    return f"{key}: expected {expected}, got {got}.".removeprefix(": ")


def _said(value: Any) -> str:
    """Return a value as it is shown to a user, who knows it and needs no more of it than a line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _tagged(loc: Sequence[int | str]) -> bool:
    """Return whether the place of a problem is one of several types: ("class_weights", "tuple[...]")."""
    return any(re.match(r"(literal|tuple)\[", str(part)) for part in loc)


def _meant(key: str, names: list[str]) -> str:
    section, dot, name = key.rpartition(".")
    close = difflib.get_close_matches(name, names, n=1)
    return f"perhaps you meant {section}{dot}{close[0]}" if close else f"expected one of {', '.join(names)}"


_SCHEMA = TypeAdapter(Config)
_SECTIONS = {"data": Data, "model": Model, "optimizer": Optimizer}
