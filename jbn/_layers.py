"""What the Flax modules share: from a layer's options and variables to one call of `jbn.batch_norm`.

Nothing here knows Flax. `jbn.linen` and `jbn.nnx` keep the variables, each in its own way, and call this.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jbn._axes import Axes
from jbn._checks import as_decay
from jbn._collectives import AxisName
from jbn._dtypes import promote
from jbn._functional import batch_norm, init
from jbn._normalization import Params
from jbn._running import UpdateRule, ema
from jbn._statistics import Moments


class Layer(Protocol):
    """The options that both modules have, under the same names."""

    use_running_average: bool | None
    axis: Axes
    momentum: ArrayLike
    epsilon: float
    dtype: DTypeLike | None
    axis_name: AxisName | None
    axis_index_groups: Sequence[Sequence[int]] | None
    use_fast_variance: bool
    update: UpdateRule | None
    virtual_batch_size: int | None
    initial_count: float
    frozen: bool


def as_inexact(x: jax.Array) -> jax.Array:
    """Converts integers to float32, as Flax's modules do, and nothing else."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(promote(jnp.float32, x))


def result_dtype(layer: Layer, *values: ArrayLike) -> np.dtype:
    """Returns the dtype that the user wants, or what the values promote to: float32 if all are integers."""
    if layer.dtype is not None:
        return jnp.dtype(layer.dtype)
    dtype = promote(*values)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else promote(jnp.float32, dtype)


def check_options(layer: Layer) -> None:
    """Checks what a constructor can: the mode, and the momentum, which another rule makes unnecessary.

    Raises:
      TypeError: the mode is no Boolean, or the momentum is no number.
      ValueError: the momentum is outside [0, 1].
    """
    check_mode(layer.use_running_average)
    if layer.momentum is not None or layer.update is None:
        as_decay("momentum", layer.momentum)


def check_mode(use_running_average: Any) -> None:
    """Raises a TypeError unless it is a Boolean, traced or not, or None; 0 and 1 are Booleans."""
    shape, dtype = np.shape(use_running_average), getattr(use_running_average, "dtype", None)
    if use_running_average is None or (shape, dtype) == ((), bool):
        return
    if isinstance(use_running_average, int) and use_running_average in (0, 1):
        return
    what = (
        f"={use_running_average!r}" if dtype is None else f" is an array of dtype {dtype} and shape {shape}"
    )
    raise TypeError(
        f"use_running_average{what}; expected True, False, or a traced Boolean scalar. It is the second "
        "argument of a call, where arrays are given by name (mask=, scale=, bias=), and the first of a Linen "
        "layer, which takes no number of features."
    )


def is_training(layer: Layer, use_running_average: ArrayLike) -> bool | jax.Array:
    """Returns False if the layer will update nothing, and a traced Boolean if that is not known yet."""
    if layer.frozen:
        return False
    if isinstance(use_running_average, jax.core.Tracer):
        return jnp.logical_not(use_running_average)
    return not use_running_average


def statistics_of(layer: Layer, train: bool | jax.Array) -> tuple[str, ...]:
    """Returns which running statistics a call needs: Flax's two, and the count that only a rule reads."""
    return ("mean", "var") if layer.update is None or train is False else Moments._fields


def running_moments(stats: Mapping[str, jax.Array]) -> Moments:
    """Makes moments of a layer's running statistics; of 0 batches, where the count is not kept."""
    return Moments(**{"count": np.float32(0), **stats})


def initial_statistic(
    layer: Layer,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    initializer: Callable[..., jax.Array] | None,
    make_key: Callable[[], jax.Array],
) -> jax.Array:
    """Makes the running mean, variance or count of a new layer: those of `jbn.init`, or what the user wants.

    A key is made for the user's initializer only: without one, a layer draws the keys that Flax's draws.
    """
    leaf = getattr(init(shape, dtype=dtype)[1], name)
    if name == "count":
        return jnp.full_like(leaf, layer.initial_count)
    return leaf if initializer is None else initializer(make_key(), shape, leaf.dtype)


def learnt_or_given(
    layer: Layer, name: str, is_learnt: bool, learnt: Callable[[], jax.Array], given: ArrayLike | None
) -> jax.Array | None:
    """Returns the scale or bias that the layer learns, unless it is frozen, or the one given in this call.

    Raises:
      ValueError: there are both.
    """
    if is_learnt and given is not None:
        raise ValueError(
            f"{name} was given in the call of a BatchNorm that learns one of its own; wanted one of the two. "
            f"Build the layer with use_{name}=False."
        )
    if is_learnt:
        return jax.lax.stop_gradient(learnt()) if layer.frozen else learnt()
    return None if given is None else jnp.asarray(given)


def apply_layer(
    layer: Layer,
    x: jax.Array,
    params: Params,
    running: Moments,
    *,
    train: ArrayLike,
    mask: ArrayLike | None,
    dtype: DTypeLike,
) -> tuple[jax.Array, Moments]:
    """Calls `jbn.batch_norm` as the layer's options say; returns `y` and the new running moments."""
    return batch_norm(
        x,
        params,
        running,
        train=train,
        axis=layer.axis,
        epsilon=layer.epsilon,
        update=ema(as_decay("momentum", layer.momentum)) if layer.update is None else layer.update,
        mask=mask,
        axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
        virtual_batch_size=layer.virtual_batch_size,
        exact=not layer.use_fast_variance,
        dtype=dtype,
    )


@contextmanager
def explained(kind: type[Exception], explanation: str) -> Iterator[None]:
    """Adds to an error of Flax's what it means for this layer, and the fix."""
    try:
        yield
    except kind as error:
        error.add_note(explanation)
        raise
