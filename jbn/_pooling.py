"""Measure the inputs of a model's layers over batches, for the tools of both of Flax's APIs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn._dtypes import arithmetic_dtype, real_dtype
from jbn._flax import Layer, as_inexact
from jbn._running import UpdateRule, apply_update_rule, pooled
from jbn._statistics import Moments, moments


class Options(NamedTuple):
    """What a layer was made with, as far as its running statistics depend on it."""

    epsilon: float
    update: UpdateRule | None  # None for `jbn.ema(momentum)`
    momentum: Any
    frozen: bool


class Inputs(NamedTuple):
    """The moments of what a layer was called with, in the shape of its mean."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    nonfinite: (
        jax.Array
    )  # Boolean: whether there were samples whose moments are not finite; they count as none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Measured:
    """What the layers that one or more batches went through were called with."""

    inputs: dict[str, Inputs]  # path of the layer -> of all its inputs together
    options: tuple[tuple[str, Options], ...] = field(metadata={"static": True})  # by path, in order of calls


def options_of(layer: Layer) -> Options:
    """Return the options of a layer of Flax's or ours."""
    return Options(
        layer.epsilon, getattr(layer, "update", None), layer.momentum, getattr(layer, "frozen", False)
    )


def no_samples(mean: jax.Array) -> Inputs:
    """Return the identity of `jbn.merge` in the shape of a running mean, in float32 at least."""
    dtype = arithmetic_dtype(mean)
    real = jnp.zeros(mean.shape, real_dtype(dtype))
    return Inputs(jnp.zeros(mean.shape, dtype), real, real, jnp.zeros(mean.shape, bool))


def input_moments(layer: Layer, x: ArrayLike, mask: ArrayLike | None) -> Moments:
    """Measure what a layer is called with, over all members of the axes of its `axis_name` that are bound."""
    names: Any = layer.axis_name or ()
    bound = tuple(name for name in ((names,) if isinstance(names, str) else names) if _is_bound(name))
    return moments(
        as_inexact(jnp.asarray(x)),
        axis=layer.axis,
        mask=mask,
        axis_name=bound or None,
        axis_index_groups=layer.axis_index_groups if bound else None,
    )


def add(old: Inputs, new: Inputs | Moments) -> Inputs:
    """Merge two sets of samples; a feature of the new one that is not finite counts as none."""
    nonfinite = (new.count > 0) & ~(jnp.isfinite(new.mean) & jnp.isfinite(new.var))
    if isinstance(new, Inputs):
        nonfinite |= new.nonfinite
    both = apply_update_rule(pooled(), Moments(*old[:3]), Moments(*new[:3]))
    return Inputs(*both, old.nonfinite | nonfinite)


def add_measured(old: Measured | None, new: Measured) -> Measured:
    """Merge what was measured, layer by layer."""
    if old is None:
        return new
    both = {path: add(old.inputs.get(path, no_samples(m.mean)), m) for path, m in new.inputs.items()}
    return Measured(old.inputs | both, tuple((dict(old.options) | dict(new.options)).items()))


def new_statistics(options: Options, found: Inputs, old: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return a layer's running statistics with the moments found, in the dtypes of the old ones.

    A feature without samples keeps the old ones. The count, which only rules have, becomes the number of
    samples for `jbn.pooled()`, and else 1, which marks the others as complete for `jbn.ema(debias=True)`.
    """
    counts_samples = isinstance(options.update, pooled)
    new = found._replace(count=found.count if counts_samples else jnp.ones_like(found.count))._asdict()
    return {
        name: jnp.where(found.count > 0, new[name], value).astype(value.dtype) for name, value in old.items()
    }


def sweep_over(
    batches: Iterable[Any], sweeps: int, add_batch: Callable[[int, Measured | None, Any], Measured]
) -> Iterator[Measured]:
    """Yield what was measured over all batches, once for each sweep.

    Raises:
      ValueError: there are no batches, an iterator that can be gone through only once, or no batch norm.
    """
    if sweeps < 1:
        raise ValueError(f"sweeps={sweeps}; expected 1 or more.")
    if sweeps > 1 and iter(batches) is batches:
        raise ValueError(
            f"sweeps={sweeps}, but batches is a {type(batches).__name__}, which can be gone through once; "
            "expected a list of batches, or another object that can be gone through again."
        )
    for sweep in range(sweeps):
        measured = None
        for batch in batches:
            measured = add_batch(sweep, measured, batch)
            jax.block_until_ready(measured)  # or batches that wait would fill the memory
        if measured is None:
            raise ValueError("batches is empty; expected at least one batch.")
        yield measured


def _is_bound(name: Any) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True
