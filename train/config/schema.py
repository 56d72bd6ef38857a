"""The keys of a job, their types and their ranges: the schema for files, flags and a run's config.json alike.

Pydantic checks types and ranges; tyro makes the flags.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(ge=1, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0, le=1e38, allow_inf_nan=False)]  # as float32 holds it
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

# Each name is a line of a table too: READERS in train/data/formats/readers.py, NETWORKS in
# train/models/build.py, NORMS in train/models/norms.py, LOSSES in train/training/losses.py and RENDERINGS in
# train/data/renderings.py. They stand here because flags and --help must not wait for JAX.
DataName = Literal["digits", "mnist", "cifar10", "npz", "csv", "folder"]
NetworkName = Literal["mlp", "nnx_mlp", "cnn", "resnet20", "resnet56", "resnet18", "resnet50"]
NormName = Literal["batch", "none", "renorm", "ghost", "layer", "group", "flax"]
LossName = Literal["cross_entropy", "squared_error"]
OF_NUMBERS: tuple[LossName, ...] = ("squared_error",)  # the losses whose labels are no classes
RenderingName = Literal["original", "inverted", "brightness", "blur", "noise"]


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
    renderings: tuple[RenderingName, ...] = ()
    """How images are shown: as they are, with black for white, lighter, blurred, or with noise. Of several,
    each is that of an equal share of every batch; evaluation takes each example in every one."""
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
    """What normalizes the input of each activation: batch norm, nothing, batch renormalization, batch norm of
    virtual batches, or Flax's layer norm, group norm, or batch norm."""
    norm_momentum: Share = 0.9
    """The weight of the old value in the running statistics (PyTorch's momentum is 1 minus this)."""
    norm_debias: bool = True
    """Whether the running statistics leave their initial values (mean 0, variance 1) out of account."""
    norm_inputs: bool = False
    """Whether the inputs are normalized too, feature by feature, before the first layer."""
    norm_r_max: Annotated[float, Field(ge=1, le=1e38, allow_inf_nan=False)] = 3.0
    """How far norm = "renorm" corrects a batch's standard deviation towards the running one: at most by this
    ratio (Ioffe 2017: 3)."""
    norm_d_max: NonNegativeFloat = 5.0
    """Likewise its mean: at most by so many running standard deviations (Ioffe 2017: 5)."""
    norm_plain: Share = 0.04
    """The fraction of the job in which norm = "renorm" is plain batch norm (Ioffe 2017: 5,000 steps)."""
    norm_ramp: Share = 0.27
    """The fraction of the job in which its limits then grow, that of the mean in 4/7 of it (Ioffe 2017:
    35,000 steps and 20,000); with 0 they are there at once."""
    domains: Count = 1
    """With 2 or more, each of data.renderings, or clean and adversarial examples, are normalized with
    statistics of their own; predict and export have those of the first. With 1 all share theirs."""
    affine_by_domain: bool = False
    """Whether each of the domains has its own scale and bias too."""
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
    adversarial: NonNegativeFloat = 0.0
    """How far each input of an example is moved, by the sign of its gradient, for an adversarial one that is
    trained on beside it; 0 makes none. With model.domains = 2 these have statistics of their own (Xie et al.
    2020)."""


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
