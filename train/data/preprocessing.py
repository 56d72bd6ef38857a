"""The training examples -> how raw inputs become a network's."""

import functools
from collections.abc import Iterator

import numpy as np

import jbn
from train.config import Data
from train.data.dataset import Preprocessing, Split
from train.errors import UserError

CHUNK = 2**26  # bytes


def fitting(config: Data, split: Split) -> Preprocessing:
    """Return what a job asks for, measured on its training split."""
    mean, std = np.float32(0), np.float32(255 if split.inputs.dtype == np.uint8 else 1)
    if config.normalize:
        mean, std = _mean_and_std(split)
    if config.feature_scales:
        shape = split.inputs.shape[1:]
        # The same for every job.
        low, high = np.log(config.feature_scales)
        scales = np.exp(np.random.RandomState(0).uniform(low, high, shape))
        std = std / scales.astype(np.float32)
    return Preprocessing(np.asarray(mean), np.asarray(std))


def chunks(examples: np.ndarray, count: int) -> Iterator[slice]:
    """Yield slices that cover `count` such examples, each of up to 64 MiB as float32 or of one."""
    size = max(1, CHUNK // (4 * examples[0].size))
    return (slice(start, start + size) for start in range(0, count, size))


def _mean_and_std(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Measure the split over all axes but the last, in chunks, for it may be larger than memory."""
    parts = (
        jbn.moments(split.take(positions).inputs.astype(np.float32, copy=False))
        for positions in chunks(split.inputs, len(split))
    )
    whole = functools.reduce(jbn.merge, parts)
    mean, std = np.asarray(whole.mean), np.sqrt(np.asarray(whole.var))
    if not np.isfinite(std).all():
        raise UserError(
            "data.normalize: expected inputs whose standard deviation float32 can hold, got larger ones; "
            "scale them, or set data.normalize = false."
        )
    # What is measured of a constant is rounding.
    varies = std > np.finfo(np.float32).eps * np.abs(mean)
    return mean, np.where(varies, std, np.float32(1))
