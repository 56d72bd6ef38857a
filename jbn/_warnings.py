"""The warning of batches that are too small to train on."""

import math
import os
import sys
import warnings
from pathlib import Path

import jax

from jbn._axes import other_axes
from jbn._collectives import NamedAxes, smallest_group, spell


class OneValueWarning(UserWarning):
    """A feature has a single value in training, which is its own mean: every output is the bias."""


def warn_if_single_value(x: jax.Array, axes: tuple[int, ...], parts: int | None, over: NamedAxes) -> None:
    """Warn if a feature has a single value in the smallest batch that is normalized with its own moments.

    Positions are counted, which are known while tracing; a mask is ignored.
    """
    sizes, where = [x.shape[a] for a in other_axes(x.ndim, axes)], ""
    if parts is not None:
        sizes[0] //= parts
        where = f", in {parts} virtual batches"
    elif over.names:
        sizes.append(smallest_group(over))
        where = (
            f", counted over axis_name={spell(over.names)}"
            + (over.groups is not None) * " in the smallest group"
        )
    if math.prod(sizes) == 1:
        warnings.warn(
            f"x of shape {x.shape} has one value per feature{where}. It is its own mean, so that in training "
            "every output is the bias. Train on larger batches, or with the running moments (train=False, or "
            "use_running_average=True in the Flax modules).",
            OneValueWarning,
            stacklevel=_user_stacklevel(),
        )


def _user_stacklevel() -> int:
    """Return the `stacklevel` by which a warning points at the code that calls jbn, Flax or JAX.

    Python 3.12 has `skip_file_prefixes` for it.
    """
    packages = [sys.modules[name] for name in ("jbn", "flax", "jax") if name in sys.modules]
    folders = tuple(f"{Path(str(package.__file__)).parent}{os.sep}" for package in packages)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(folders):
        frame, level = frame.f_back, level + 1
    return level
