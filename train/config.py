"""What a job is: the schema, as dataclasses.

Files and flags become a `Config` in train/parsing.py; train/checks.py has what its values have to satisfy.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from train.errors import UserError


@dataclass(frozen=True)
class Data:
    name: Literal["digits", "mnist", "cifar10", "npz"] = "digits"
    """Which data: scikit-learn's handwritten digits (embedded), MNIST, CIFAR-10, or arrays of your own."""
    path: str | None = None
    """The file or folder; if not given, $JBN_DATA. Digits need none."""
    validation: float = 0.1
    """The fraction of the training data to hold out for choosing the best checkpoint; 0 holds out none."""
    normalize: bool = False
    """Whether the network sees inputs less their mean, divided by their standard deviation, both over the
    training data: of each channel of images, of each feature of vectors."""
    feature_scales: tuple[float, ...] = ()
    """Lowest and highest of the scales with which each feature (each pixel of images) is multiplied, drawn
    log-uniformly once and for all: data that nobody normalized. If empty, none are."""
    flip: bool = False
    """Whether to mirror each training image with probability 1/2."""
    crop: int = 0
    """Pixels by which to pad training images with their reflection, to cut their size out again anywhere."""
    shift: int = 0
    """Pixels by which to move training images at most, in both directions; what comes in is black."""
    device_gib: float = 1.0
    """Data of up to this many GiB stay on the devices; of larger data they get one batch at a time."""


@dataclass(frozen=True)
class Model:
    name: Literal["mlp", "nnx_mlp", "cnn", "resnet20", "resnet56", "resnet18", "resnet50"] = "mlp"
    """A multi-layer perceptron in Flax Linen or in NNX, a small convolutional network, a residual network for
    small images (20, 56) or for large ones (18, 50)."""
    norm: Literal["batch", "none", "ghost", "layer", "group", "flax"] = "batch"
    """What normalizes the input of each activation: batch norm, nothing, batch norm of virtual batches, or
    Flax's layer norm, group norm, or batch norm."""
    norm_momentum: float = 0.9
    """The weight of the old value in the running statistics (PyTorch's momentum is 1 minus this)."""
    norm_debias: bool = True
    """Whether the running statistics leave their initial values (mean 0, variance 1) out of account."""
    norm_inputs: bool = False
    """Whether the inputs are normalized too, feature by feature, before the first layer."""
    virtual_batch_size: int = 32
    """Examples in each virtual batch of norm = "ghost"."""
    norm_groups: int = 8
    """Groups of channels of norm = "group"."""
    widths: tuple[int, ...] = ()
    """Features of each hidden layer, channels of each stage; if empty, the network's usual ones."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """The activation of each hidden layer."""
    kernel_std: float = 0.0
    """The standard deviation of Gaussian initial weights; 0 takes the network's usual ones."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of activations. Parameters, statistics and loss are float32."""


@dataclass(frozen=True)
class Optimizer:
    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    """SGD with Nesterov momentum, AdamW, and LARS and LAMB for large batches."""
    learning_rate: float = 0.1
    """The peak learning rate."""
    base_batch_size: int = 0
    """The batch_size that learning_rate is meant for; at others it is in proportion (Goyal et al. 2017). 0
    takes it as it is."""
    momentum: float = 0.9
    """Momentum of SGD and LARS; 0 is plain SGD."""
    weight_decay: float = 0.0
    """Decay of the weights; never applied to scales and biases."""
    schedule: Literal["constant", "cosine", "linear", "step"] = "cosine"
    """The learning rate after warm-up: held, taken to 0 by a cosine or a line, or reduced at milestones."""
    warmup_steps: int = 0
    """Steps in which the learning rate grows linearly from 0."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the job after which schedule = "step" multiplies the rate with milestone_factor."""
    milestone_factor: float = 0.1
    """What the learning rate is multiplied with at each milestone."""
    clip_norm: float = 0.0
    """The norm of all gradients together to which larger ones are scaled down; 0 does not."""
    accumulate: int = 1
    """Parts of each batch whose gradients are computed one after the other, for batches that memory would not
    hold. Batch norm normalizes each part by itself; its running statistics are those of the whole batch."""
    average: float = 0.0
    """The weight of the old value in a moving average of weights and running statistics, which is what is
    evaluated, best around 0.99; 0 keeps none."""
    label_smoothing: float = 0.0
    """The probability that training gives to all classes alike."""


@dataclass(frozen=True)
class Config:
    """Train a network. The run directory receives metrics, checkpoints, a summary; a second call resumes."""

    run_dir: str
    """Where the run's files go."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    seed: int = 0
    """Initial weights, augmentation and the order of the data follow from it."""
    steps: int | None = None
    """How long to train, in steps; replaces epochs."""
    epochs: float | None = None
    """How long to train, in passes over the training data; replaces steps."""
    batch_size: int = 128
    """Examples in a step, over all devices."""
    eval_every: int = 100
    """Steps between evaluations; each is followed by a checkpoint. The last step is always evaluated."""
    inspect: bool = False
    """Whether to measure at step 0 and at each evaluation what the layers see, and how loss and gradients
    change along a step: into inspection.jsonl. It takes as long as ten steps, and one more for each layer."""
    early_stopping: int = 0
    """Evaluations without a better one, by validation, after which the job is finished; 0 goes to its end."""
    init_from: str | None = None
    """A run directory from whose best checkpoint parameters and running statistics start."""
    profile: int = 0
    """Steps to trace into the run directory's profile/, once the program is compiled; 0 traces none."""
    devices: int | None = None
    """How many of this machine's devices to use; if not given, all devices of all processes."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where Slurm, Kubernetes, MPI or a TPU pod do not tell."""
    num_processes: int | None = None
    """How many processes train together; 1 asks no cluster."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    peer_timeout: int = 100
    """Seconds after which a process that does not come, or is silent, is given up, and the job with it."""


# How and where a job runs does not change what it computes, but for rounding.
NOT_COMPARED = (
    *("run_dir", "data.path", "profile", "devices"),
    *("coordinator", "num_processes", "process_id", "peer_timeout"),
)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Returns how many steps the job has."""
    steps = config.steps if config.steps is not None else math.ceil(config.epochs * steps_per_epoch)
    if steps >= 2**31:
        raise UserError(
            f"The job has {steps} steps; wanted fewer than 2**31, which is how far steps are counted."
        )
    return steps


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names the values of nested tables as files and flags do: `data.path`."""
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
