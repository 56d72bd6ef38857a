"""What looks like a mistake in a job, and is said before it trains."""

from collections.abc import Iterator

import numpy as np

from train.config import Config, Data
from train.data import Dataset
from train.errors import shortened
from train.models import NORMS

CHANNELS = (1, 2, 3, 4)  # as images have them
LARGE = 10  # times the inputs that a network is made for
EXAMPLES = 1024  # of the training data, that are looked at


def likely(config: Config, dataset: Dataset, *, steps: int) -> Iterator[str]:
    """Yield a sentence for each thing in a job of so many steps that is allowed but rarely meant."""
    yield from _of_inputs(config, dataset)
    yield from _of_labels(config, dataset)
    yield from of_statistics(config)
    if config.optimizer.warmup_steps >= steps:
        yield (
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} of {steps} steps in all: the learning "
            "rate never reaches its peak."
        )
    over_batch = NORMS[config.model.norm].over_batch and config.model.frozen == "none"
    part = config.batch_size // config.optimizer.accumulate
    ghost = config.model.norm == "ghost" and config.model.virtual_batch_size == 1
    if over_batch and (part == 1 or ghost):
        which = "model.virtual_batch_size = 1" if ghost else f"batch_size = {config.batch_size}"
        parts = (
            f" in {config.optimizer.accumulate} parts"
            if config.optimizer.accumulate > 1 and not ghost
            else ""
        )
        yield (
            f"{which}{parts}: a batch of one example has no variance, and batch norm of vectors lets no "
            "gradient through; use larger batches, or model.norm = 'layer' or 'group'."
        )


def _of_inputs(config: Config, dataset: Dataset) -> Iterator[str]:
    shape, some = dataset.example_shape, dataset.train.take(slice(EXAMPLES)).inputs
    if len(shape) == 3 and shape[-1] not in CHANNELS and shape[0] in CHANNELS:
        yield (
            f"images of shape {list(shape)} look as if their channels came first; expected (height, width, "
            "channels): save x.transpose(0, 2, 3, 1)."
        )
    if config.data.image_size and config.data.name != "folder":
        yield (
            f"data.image_size = {config.data.image_size} changes nothing with data.name = "
            f"{config.data.name!r}: only the images of a folder are scaled."
        )
    if config.data.label != Data.label and config.data.name != "csv":
        yield (
            f"data.label = {config.data.label!r} changes nothing with data.name = {config.data.name!r}: only "
            "tables have columns."
        )
    usual = config.data.normalize or config.data.feature_scales or config.model.norm_inputs
    largest, of_bytes = float(np.abs(dataset.preprocessing(some)).max()), some.dtype == np.uint8
    if not usual and (largest > LARGE or 0 < largest < 1 / LARGE):
        yield (
            f"inputs go up to {largest:.4g}{' (bytes over 255)' * of_bytes}, where networks expect a mean of "
            "0 and a deviation of 1; set data.normalize = true"
            + (", or save bytes as uint8." if largest > LARGE and len(shape) == 3 else ".")
        )
    if len(some) > 1 and (some == some[:1]).all():
        yield f"all of the first {len(some)} training inputs are equal."


def _of_labels(config: Config, dataset: Dataset) -> Iterator[str]:
    labels = dataset.labels
    present = [index for index, count in enumerate(labels.counts) if count]
    absent = [labels.name(index) for index, count in enumerate(labels.counts) if not count]
    if len(present) == 1:
        only = labels.name(present[0])
        yield f"all training examples are of one class, {only!r}: there is nothing to learn."
    elif absent and not labels.names and present == list(range(1, len(labels.counts))):
        yield (
            f"labels go from 1 to {present[-1]} and 0 never comes, so that one output of the network is for "
            "nothing; subtract 1 from the labels."
        )
    elif absent:
        yield f"no training example is of class {shortened(absent)}."
    if not labels.counts and labels.std == 0:
        yield f"all training labels are {labels.mean:g}: there is nothing to learn."
    split = dataset.validation
    if config.data.validation and not len(split):
        yield (
            f"data.validation = {config.data.validation:g} of {len(dataset.train)} examples is none: the "
            "last checkpoint counts as the best."
        )


def of_statistics(config: Config) -> Iterator[str]:
    """Yield a sentence for each choice that leaves running statistics wrong, or has none to change."""
    frozen, norm = config.model.frozen, config.model.norm
    has_statistics = NORMS[norm].over_batch
    if frozen == "body" and config.init_from is None:
        yield (
            "model.frozen = 'body' without init_from: all but the last layer stays as it is drawn at random. "
            "Give init_from."
        )
    elif frozen != "none" and has_statistics and config.init_from is None:
        yield (
            f"model.frozen = {frozen!r} without init_from: running statistics stay at mean 0 and variance 1, "
            "with which nothing is normalized. Give init_from."
        )
    if config.recalibrate and not has_statistics:
        yield f"recalibrate = true with model.norm = {norm!r}, which has no running statistics."
    elif config.recalibrate and frozen != "none":
        yield (
            f"recalibrate = true with model.frozen = {frozen!r}: the running statistics that training keeps, "
            "and that the weights are trained for, are replaced at the end."
        )
