"""What the Flax modules share: from a layer's options and variables to one call of `jbn.batch_norm`.

Nothing here imports Flax. `jbn.linen` and `jbn.nnx` keep the variables, each in its own way, and call this.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jbn._axes import Axes, feature_axes
from jbn._batch_norm import batch_norm
from jbn._checks import as_decay, check_shape
from jbn._collectives import AxisName
from jbn._dtypes import promote
from jbn._functional import init
from jbn._params import Params
from jbn._running import UpdateRule, ema, keep
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
    """Convert integers to float32, as Flax's modules do, and nothing else."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(promote(jnp.float32, x))


def promoted_dtype(layer: Layer, *values: Any) -> np.dtype:
    """Return the dtype that the user chose, or what the values promote to: float32 if all are integers.

    The values are arrays, or `jax.ShapeDtypeStruct`.
    """
    if layer.dtype is not None:
        return jnp.dtype(layer.dtype)
    dtype = promote(*values)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else promote(jnp.float32, dtype)


def check_options(layer: Layer) -> None:
    """Check what is known in a constructor: the modes, and the momentum unless `update` replaces it.

    Raises:
      TypeError: a mode is not a Boolean, or the momentum is not a number.
      ValueError: the momentum is outside [0, 1].
    """
    check_mode(layer.use_running_average)
    if not isinstance(layer.frozen, bool | np.bool_):
        raise TypeError(f"frozen={layer.frozen!r}; expected True or False.")
    if layer.momentum is not None or layer.update is None:
        as_decay("momentum", layer.momentum)


def check_mode(use_running_average: Any) -> None:
    """Raise a TypeError unless it is a Boolean, traced or not, or None; 0 and 1 are Booleans."""
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
    """Return False if the layer will update nothing, and a traced Boolean if that depends on one."""
    if layer.frozen:
        return False
    if isinstance(use_running_average, jax.core.Tracer):
        return jnp.logical_not(use_running_average)
    return not use_running_average


def counts(update: UpdateRule | None) -> bool:
    """Return whether a layer with this rule has a count."""
    return update is not None and type(update) is not keep


def updates(layer: Layer, train: bool | jax.Array) -> bool:
    """Return whether a call may change the running statistics."""
    return train is not False and type(layer.update) is not keep


def required_statistics(layer: Layer, train: bool | jax.Array) -> tuple[str, ...]:
    """Return the names of the running statistics that a call needs: only a rule reads the count."""
    return Moments._fields if counts(layer.update) and train is not False else ("mean", "var")


def running_moments(stats: Mapping[str, jax.Array], shape: tuple[int, ...]) -> Moments:
    """Make moments of a layer's running statistics, with count 0 if it is not kept; without any, new ones."""
    return Moments(**{"count": np.float32(0), **stats}) if stats else init(shape)[1]


def initial_statistic(
    layer: Layer,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    initializer: Callable[..., jax.Array] | None,
    make_key: Callable[[], jax.Array],
) -> jax.Array:
    """Make the running mean, variance or count of a new layer, by `jbn.init` or by the user's initializer.

    A key is made for the user's initializer only, so that without one a layer draws the same keys as Flax's.
    """
    leaf = getattr(init(shape, dtype=dtype)[1], name)
    if name == "count":
        return jnp.full_like(leaf, layer.initial_count)
    return leaf if initializer is None else initializer(make_key(), shape, leaf.dtype)


def resolve_affine_param(
    layer: Layer, x: jax.Array, name: str, learnt: jax.Array | None, given: ArrayLike | None
) -> jax.Array | None:
    """Return the scale or bias that the layer learns, without gradient if it is frozen, or the one given.

    Raises:
      ValueError: there are both, or the one given does not fit `x`.
    """
    if learnt is None and given is not None:
        given, axes = jnp.asarray(given), feature_axes(x.ndim, layer.axis)
        check_shape(x, axes, name, given, "give one made for these features", may_broadcast=True)
        return given
    if learnt is None:
        return None
    if given is not None:
        raise ValueError(
            f"{name} was given in the call of a BatchNorm that learns one of its own; expected one of the "
            f"two. Build the layer with use_{name}=False."
        )
    return jax.lax.stop_gradient(learnt) if layer.frozen else learnt


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
    """Call `jbn.batch_norm` with the options of a layer; return `y` and the new running moments."""
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
def add_note_to(error_type: type[Exception], note: str) -> Iterator[None]:
    """Add to an error of Flax what it means for this layer, and the fix."""
    try:
        yield
    except error_type as error:
        error.add_note(note)
        raise
