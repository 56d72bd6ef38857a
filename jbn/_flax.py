"""What the Flax modules share: from a layer's options and variables to one call of `jbn.batch_norm`.

Nothing here imports Flax. `jbn.linen` and `jbn.nnx` keep the variables, each in its own way, and call this.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jbn._axes import Axes, feature_axes
from jbn._batch_norm import batch_norm, batch_renorm
from jbn._blending import check_prior, normalize_blended
from jbn._checks import as_decay, check_shape
from jbn._collectives import AxisName
from jbn._dtypes import promote
from jbn._functional import init
from jbn._params import Params
from jbn._renorm import Limits, Schedule, as_limits
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
    renorm: Sequence[ArrayLike] | Schedule | None
    domains: int | None
    affine_by_domain: bool
    blend: ArrayLike | None


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
    """Check what is known in a constructor: all but what `jbn.batch_norm` checks.

    Raises:
      TypeError: a mode is not a Boolean, or another option is not of its type.
      ValueError: the momentum is outside [0, 1], unless `update` replaces it, a limit of `renorm` or `blend`
        is out of range, or `domains` is.
    """
    check_mode(layer.use_running_average)
    for name in ("frozen", "affine_by_domain"):
        if not isinstance(getattr(layer, name), bool | np.bool_):
            raise TypeError(f"{name}={getattr(layer, name)!r}; expected True or False.")
    if layer.momentum is not None or layer.update is None:
        as_decay("momentum", layer.momentum)
    as_renorm(layer.renorm)
    if layer.blend is not None:
        check_prior("blend", layer.blend)
    number = layer.domains
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"domains={layer.domains!r}; expected a number of domains >= 1, or None.")
    if layer.affine_by_domain and layer.domains is None:
        raise ValueError("affine_by_domain=True needs domains, which is None; expected their number.")


def as_renorm(renorm: Any) -> Limits | Schedule | None:
    """Return limits with their names, and a schedule or None as it is.

    Raises:
      TypeError, ValueError: it is none of these, or a limit is out of range.
    """
    if renorm is None or (callable(renorm) and not isinstance(renorm, type)):
        return cast(Schedule | None, renorm)
    return _as_pair(f"renorm={renorm!r}", renorm)


def _as_pair(what: str, limits: Any) -> Limits:
    if not isinstance(limits, tuple | list) or len(limits) != 2:
        raise TypeError(
            f"{what}; expected a pair of limits (r_max, d_max), such as (3.0, 5.0), or a function of the "
            "number of updates that returns one, such as jbn.renorm_limits()."
        )
    return as_limits(*limits)


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


def check_domain(layer: Layer, domain: ArrayLike | None) -> None:
    """Raise a ValueError if a call has an index of domains and the layer has none, or the reverse."""
    if (domain is None) != (layer.domains is None):
        given = "no domain" if domain is None else "a domain"
        raise ValueError(
            f"{given} was given in the call of a BatchNorm with domains={layer.domains}; expected domain=, "
            "the index of each example's domain, in the calls of a layer that has domains, and of no other."
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


def shapes_of(layer: Layer, features: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the running statistics and of scale and bias."""
    by_domain = features if layer.domains is None else (layer.domains, *features)
    return by_domain, by_domain if layer.affine_by_domain else features


def counts_updates(layer: Layer, train: bool | jax.Array) -> bool:
    """Return whether a call counts as an update, for a schedule of `renorm`."""
    return callable(layer.renorm) and updates(layer, train)


def no_updates(shape: tuple[int, ...] = ()) -> jax.Array:
    """Return the number of updates that a schedule of `renorm` starts from, one for each layer of a stack."""
    return jnp.zeros(shape, jnp.int32)


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
        fix = "give one made for these features"
        check_shape(x, axes, name, given, fix, may_broadcast=True, domains=layer.domains)
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
    train: bool | jax.Array,
    mask: ArrayLike | None,
    dtype: DTypeLike,
    domain: ArrayLike | None = None,
    num_updates: jax.Array | None = None,
) -> tuple[jax.Array, Moments]:
    """Call `jbn.batch_norm` or `jbn.batch_renorm` with a layer's options.

    Args:
      num_updates: how many there were, for a schedule of `renorm`; None for none.

    Returns:
      `y` and the new running moments.
    """
    axes = dict(axis=layer.axis, axis_name=layer.axis_name, axis_index_groups=layer.axis_index_groups)
    shared: Any = dict(mask=mask, domain=domain, epsilon=layer.epsilon, dtype=dtype, **axes)
    blended = None
    if layer.blend is not None and train is not True:
        blended = normalize_blended(x, params, running, prior=layer.blend, **shared)
        if train is False:
            return blended, running
    if layer.renorm is None or train is False:
        apply = batch_norm
    else:
        limits = as_renorm(layer.renorm)
        if callable(limits):
            limits = limits(no_updates() if num_updates is None else num_updates)
            limits = _as_pair(f"renorm={layer.renorm!r} returned {limits!r}", limits)
        apply = partial(batch_renorm, **cast(Limits, limits)._asdict())
    y, new = apply(
        x,
        params,
        running,
        train=train,
        update=ema(as_decay("momentum", layer.momentum)) if layer.update is None else layer.update,
        virtual_batch_size=layer.virtual_batch_size,
        exact=not layer.use_fast_variance,
        **shared,
    )
    return y if blended is None else jnp.where(train, y, blended), new


@contextmanager
def add_note_to(error_type: type[Exception], note: str) -> Iterator[None]:
    """Add to an error of Flax what it means for this layer, and the fix."""
    try:
        yield
    except error_type as error:
        error.add_note(note)
        raise
