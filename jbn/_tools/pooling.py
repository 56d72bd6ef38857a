"""Measure the inputs of a model's layers over batches, for the tools of both of Flax's APIs."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike

from jbn._axes import feature_axes, other_axes
from jbn._checks import as_samples, as_weights
from jbn._collectives import named_axes
from jbn._domains import as_domain
from jbn._dtypes import arithmetic_dtype, real_dtype
from jbn._flax import Layer, as_inexact
from jbn._merging import Part, merge_named, merge_rows
from jbn._running import UpdateRule, cumulative, pooled
from jbn._samples import measure_samples
from jbn._statistics import Moments, in_units_of_1
from jbn._tools.progress import with_progress


class Options(NamedTuple):
    """What a layer was made with, as far as its running statistics depend on it."""

    epsilon: float
    update: UpdateRule | None  # None for `jbn.ema(momentum)`
    momentum: Any
    frozen: bool


class Inputs(NamedTuple):
    """The moments of what a layer was called with, in the shape of its mean."""

    mean: jax.Array
    mean_low: jax.Array  # what the mean was rounded by, or thousands of batches would round it away
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    nonfinite: jax.Array  # Boolean: whether there were samples that are not finite; they count as none

    @property
    def moments(self) -> Moments:
        """The moments, with the mean rounded to one number."""
        return Moments(self.mean + self.mean_low, self.var, self.count)


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
    zeros = jnp.zeros(mean.shape, dtype)
    return Inputs(zeros, zeros, real, real, jnp.zeros(mean.shape, bool))


def measure_inputs(
    layer: Layer,
    mean: jax.Array,
    x: ArrayLike,
    mask: ArrayLike | None,
    domain: ArrayLike | None = None,
) -> Inputs:
    """Measure what a layer is called with, over all that share its running mean.

    Those are the members of the axes of its `axis_name` that are bound, and where the mean is not mapped, the
    members of any other `vmap`.
    """
    names: Any = layer.axis_name or ()
    bound = tuple(name for name in ((names,) if isinstance(names, str) else names) if _is_bound(name))
    over = named_axes(bound or None, layer.axis_index_groups if bound else None)
    x = jax.lax.stop_gradient(as_inexact(jnp.asarray(x)))

    def measure(mean, x, mask, domain):
        x = as_samples(x)
        weights, axes = as_weights(mask, x), feature_axes(x.ndim, layer.axis)
        index = None if domain is None else as_domain(domain, x, axes, len(mean))
        part = measure_samples(x, weights, other_axes(x.ndim, axes), shift=mean, index=index)
        return in_units_of_1(merge_named(part, over))

    part = (measure if bound else _over_maps(measure))(mean, x, mask, domain)
    finite = jnp.isfinite(part.mean) & jnp.isfinite(part.var)
    count = jnp.where(finite, part.count, 0)
    return Inputs(part.mean, part.mean_low, part.var, count, (part.count > 0) & ~finite)


def _over_maps(measure: Callable[..., Part]) -> Callable[..., Part]:
    """Let a function of a running mean, `x` and mask merge the members of a `vmap` that share the mean."""
    measure_mapped = custom_vmap(measure)

    @measure_mapped.def_vmap
    def over_one_map(_, are_mapped, *values):
        axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, tuple(are_mapped))
        members = jax.vmap(measure, axes)
        has_own = are_mapped[0]
        whole = members if has_own else lambda *values: merge_rows(members(*values))
        return _over_maps(whole)(*values), Part(*4 * (has_own,))

    return measure_mapped


def add(old: Inputs, new: Inputs) -> Inputs:
    """Merge two sets of samples."""
    pairs = [jnp.stack([a, b.astype(a.dtype)]) for a, b in zip(old[:4], new)]
    both = merge_rows(Part(*pairs))[:4]
    usable = jnp.isfinite(both[0]) & jnp.isfinite(both[2])  # their difference may overflow
    mean, mean_low, var, count = (jnp.where(usable, merged, leaf) for merged, leaf in zip(both, old))
    return Inputs(mean, mean_low, var, count, old.nonfinite | new.nonfinite | ~usable)


def add_measured(old: Measured | None, new: Measured) -> Measured:
    """Merge what was measured, layer by layer."""
    return new if old is None else _add_measured(old, new)


@jax.jit  # apart from the model, which is so compiled once for batches of one shape
def _add_measured(old: Measured, new: Measured) -> Measured:
    both = {path: add(old.inputs.get(path, no_samples(m.mean)), m) for path, m in new.inputs.items()}
    return Measured(old.inputs | both, tuple((dict(old.options) | dict(new.options)).items()))


def new_statistics(
    options: Options, found: Inputs, old: Mapping[str, jax.Array], batches: int = 1
) -> dict[str, jax.Array]:
    """Return a layer's running statistics with the moments found in a number of batches.

    They have the dtypes of the old ones, and a feature without samples keeps these. The count, which only
    rules have, is what they average by: of samples for `jbn.pooled()`, of batches for `jbn.cumulative()`, and
    else what it was, but at least 1, which marks the others as complete for `jbn.ema(debias=True)`.
    """
    new = found.moments._asdict()
    if isinstance(options.update, cumulative):
        new["count"] = jnp.full_like(found.count, batches)
    elif not isinstance(options.update, pooled) and "count" in old:
        new["count"] = jnp.maximum(old["count"], 1)
    return {
        name: jnp.where(found.count > 0, new[name], value).astype(value.dtype) for name, value in old.items()
    }


def check_batches(batches: Any) -> None:
    """Raise a TypeError for one array or mapping, whose rows or keys are no batches."""
    if isinstance(batches, (jax.Array, np.ndarray, Mapping)):
        raise TypeError(
            f"batches is a {type(batches).__name__}; expected a list of batches, or another iterable of "
            "them: [x] for a single one, list(x) for an array of batches."
        )


def sweep_over(
    batches: Iterable[Any], sweeps: int, add_batch: Callable[[int, Measured | None, Any], Measured]
) -> Iterator[Measured]:
    """Yield what was measured over all batches, once for each sweep.

    Raises:
      TypeError: `batches` is one array or mapping.
      ValueError: there are no batches, an iterator that can be gone through only once, or no batch norm.
    """
    check_batches(batches)
    if not isinstance(sweeps, int) or sweeps < 1:
        raise ValueError(f"sweeps={sweeps!r}; expected a whole number, 1 or more.")
    if sweeps > 1 and iter(batches) is batches:
        raise ValueError(
            f"sweeps={sweeps}, but batches is a {type(batches).__name__}, which can be gone through once; "
            "expected a list of batches, or another object that can be gone through again."
        )
    for sweep in range(sweeps):
        measured = None
        for batch in with_progress(batches, f"batches, sweep {sweep + 1} of {sweeps}"):
            last, measured = measured, add_batch(sweep, measured, batch)
            jax.block_until_ready(last)  # or batches that wait would fill the memory
        if measured is None:
            raise ValueError("batches is empty; expected at least one batch.")
        yield measured


def warn_of_unmeasured(path: str, kind: str) -> None:
    """Warn of a layer that was called, but by code of its own."""
    warnings.warn(
        f"'{path}' is of class {kind}, whose running statistics were not measured and stay as they are; "
        "expected Flax's BatchNorm or jbn's, or a subclass that calls super().__call__.",
        stacklevel=2,
    )


def _is_bound(name: Any) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True
