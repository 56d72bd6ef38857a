"""Workarounds for XLA. No value depends on them; each shows the program that it changes, before and after.

What is best depends on what is known only when a program is lowered: the platform, and whether the compiler
spreads arrays over devices. So the choices are made then, in primitives of JAX, which trace and lower faster
than the branches of `jax.lax.platform_dependent`. The programs shown are those of jax 0.10.2. With a later
version, remove a workaround and run `python -m benchmarks compiled`, and for CPUs
`tests/library/programs/test_programs.py`: if neither counts more, delete it.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

PLATFORMS = ("cpu", "cuda", "rocm", "tpu", None)  # None: any other


class Target(NamedTuple):
    """Where a program is to run."""

    platform: str | None  # one of PLATFORMS
    sharded: bool  # whether the compiler spreads arrays over several devices


def decided_at_lowering(
    f: Callable[..., Any], *, derivative: Callable[..., Any], batch: Callable[..., Any]
) -> Callable[..., Any]:
    """Make a function of `f(target, options, *arrays)` that is called without the target.

    Args:
      f: returns a tuple of arrays, of the same shapes for every target; also for None, where only the shapes
        matter. `options` are hashable.
      derivative: for a tangent of the first array: `(options, arrays, tangent, results) -> tangents`.
      batch: the rule for `vmap`: `(function, options, arrays, axes) -> (results, axes)`.

    Delete it when `jax.lax.platform_dependent` can branch on sharding too, and adds no more than this to the
    time to trace and lower: of 20 layers with their gradients, 0.28 s instead of 0.73 s.
    """
    primitive = _primitive(f.__name__, lambda *arrays, options: f(None, options, *arrays), many=True)
    bind = lambda options, *arrays: tuple(primitive.bind(*arrays, options=options))
    # By jit, layers of one shape share what was traced and lowered.
    lowered = jax.jit(f, static_argnums=(0, 1))
    eager = jax.jit(bind, static_argnums=0)

    def run(*arrays, options):
        # `jax_disable_jit`, and `jax_debug_nans` where it finds NaN, run functions without jit, which would
        # lead back to this function.
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            return eager(options, *arrays)

    def jvp(arrays, tangents, *, options):
        results = bind(options, *arrays)
        return results, derivative(options, arrays, ad.instantiate_zeros(tangents[0]), results)

    def lower(platform, context, *values, options):
        target = Target(platform, _is_sharded(context.module_context.axis_context))
        return mlir.lower_fun(partial(lowered, target, options), multiple_results=True)(context, *values)

    primitive.def_impl(run)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = lambda arrays, axes, *, options: batch(
        bind, options, arrays, axes
    )
    for platform in PLATFORMS:
        mlir.register_lowering(primitive, partial(lower, platform), platform=platform)
    return bind


def members_first(arrays: Sequence[jax.Array], axes: Sequence[int | None]) -> list[jax.Array]:
    """Move the axis of a `vmap` to the front of each array, and repeat those that have none."""
    mapped = [jnp.moveaxis(array, axis, 0) for array, axis in zip(arrays, axes) if axis is not None]
    size, names = mapped[0].shape[0], jax.typeof(mapped[0]).sharding.spec[0]

    def repeat(array):
        spec = jax.typeof(array).sharding.spec
        like_mapped = None if names is None else P(names, *spec)
        return jax.lax.broadcast(array, (size,), out_sharding=like_mapped)

    moved = iter(mapped)
    return [repeat(array) if axis is None else next(moved) for array, axis in zip(arrays, axes)]


def sum_together(*arrays: jax.Array, axes: tuple[int, ...]) -> Sequence[jax.Array]:
    """Add up arrays over the same axes, in one reduction of XLA.

    XLA for GPUs splits the reduction of many rows into two, and fuses the first halves of several reductions,
    but not the second halves. The second half of one reduction of several arrays is one kernel:

        fusion.1 = f32[128,128], f32[128,128] fusion(x)       fusion.1 = f32[128,128], f32[128,128] fusion(x)
        fusion.2 = f32[128] fusion(fusion.1)             ->   fusion.2 = f32[128], f32[128] fusion(fusion.1)
        fusion.3 = f32[128] fusion(fusion.1)

    A reduction of few rows is not split, and its operands are written to memory first; so it is split here.

    Delete it when XLA for GPUs fuses both halves of `[jnp.sum(array, axes) for array in arrays]`.
    """
    add = lambda a, b: tuple(p + q for p, q in zip(a, b))
    zeros = tuple(jnp.zeros((), array.dtype) for array in arrays)
    if len(axes) > 1 and _are_few(arrays[0].shape, axes):
        # Without a barrier, XLA would combine the two sums into one.
        arrays = prevent_cse(tuple(jax.lax.reduce(arrays, zeros, add, axes[1:])))
        axes = axes[:1]
    return jax.lax.reduce(arrays, zeros, add, axes)


def prevent_cse(values: Any, *, times: int = 1) -> Any:
    """Return copies that the compiler cannot know to be equal to copies made another number of `times`.

    XLA for CPU fuses a reduction with the arithmetic before it, unless two reductions share that arithmetic:
    then it is written to memory first. If XLA does not know that they share it, sum(x - c) and
    sum((x - c)**2) are two passes that read `x`:

        fusion.1 = x - c                        fusion.1 = sum(x - c)
        fusion.2 = sum(fusion.1)          ->    fusion.2 = sum((x' - c')**2)
        fusion.3 = sum(fusion.1**2)

    Delete it when XLA for CPU fuses a producer into each of several reductions. Without it, the tests today
    count more passes of a training step over its input.
    """
    for _ in range(times):
        # One by one, because in a `shard_map` some may vary over devices and others not.
        values = jax.tree.map(jax.lax.optimization_barrier, values)
    return values


def unshared_on_cpu(x: jax.Array, *, times: int = 1) -> jax.Array:
    """Return `prevent_cse(x, times=times)` on CPUs, and `x` elsewhere. Derivatives pass unchanged.

    It is for the backward pass, whose sums share operands with the forward pass. Delete it together with
    `prevent_cse`.
    """
    return _unshared.bind(x, times=times)


def for_each_part(values: jax.Array, parts: int) -> jax.Array:
    """Repeat values along a new first axis, so that their gradient is the sum of the sums over each part.

    XLA would combine this sum of sums into one, and then reduce over all samples twice, for which it writes
    the common operand to memory:

        fusion.1 = dy * x^, sum(dy * x^, of each part)     fusion.1 = sum(dy * x^, of each part)
        fusion.2 = sum(dy * x^)                       ->   fusion.2 = sum(fusion.1)

    Delete it, in favour of `jnp.broadcast_to`, when XLA does not combine a sum of sums whose inner sum is
    used elsewhere too. Without it, the tests today count four more passes for ghost batches.
    """
    return jax.lax.optimization_barrier(jnp.broadcast_to(values, (parts, *values.shape)))


def take_rows(values: jax.Array, index: jax.Array) -> jax.Array:
    """Take the rows of `values` (number, ...) at `index` (N,); NaN where it is out of range."""
    return _take_rows.bind(values, index, number=values.shape[0])


def add_rows(rows: jax.Array, index: jax.Array, number: int) -> jax.Array:
    """Add up `rows` (N, ...) of the same index (N,), into (number, ...); without those out of range.

    XLA for GPUs makes a scatter of `jax.ops.segment_sum`: each row is added in memory as it comes, in any
    order, and a sum over positions before it is computed by as many threads as there are rows and features.
    Elsewhere than on CPUs it is a sum over all rows for each index, in which the other rows are 0.

    Delete it with `take_rows`, whose derivative it is, when XLA for GPUs reduces before it scatters.
    """
    return _add_rows.bind(rows, index, number=number)


def prefers_spread(shape: tuple[int, ...], axes: tuple[int, ...], dtype: np.dtype) -> bool:
    """Return whether `spread` pays off: for 16-bit samples, so many that XLA for GPUs splits their sums.

    Delete it with `spread`.
    """
    return jnp.finfo(dtype).bits < 32 and not _are_few(shape, axes)


def spread(
    values: jax.Array, scale: jax.Array, *, shape: tuple[int, ...], new_axes: tuple[int, ...]
) -> jax.Array:
    """Broadcast `values * scale` along new axes, so that on GPUs the transpose sums scaled samples.

    XLA for an H100 fuses the derivative of ReLU with one sum, but not with two sums that read the same: it
    writes it to memory, and reads it twice. Here two of three sums read nothing else, and it is fused with
    the third:

        fusion.1 = select(y > 0, dy, 0)                    fusion.1 = select(y > 0, dy, 0), sum(fusion.1 * x^)
        fusion.2 = sum(fusion.1), sum(fusion.1 * x^)  ->   fusion.2 = sum(fusion.1), sum(fusion.1 * scale)

    Delete it, in favour of the broadcast that other dtypes take, when XLA for GPUs fuses a select with two
    sums that read it.
    """
    return _spread.bind(values, scale, shape=shape, new_axes=new_axes)


def _are_few(shape, axes):
    """Return whether XLA for an H100 sums over some axes without splitting; a size may be symbolic."""
    rows = math.prod(shape[axis] for axis in axes)
    return isinstance(rows, int) and rows <= 8192


def _primitive(name: str, f: Callable[..., Any], *, many: bool = False) -> Primitive:
    """Make a primitive whose results have the types of those of a function, whatever it is lowered to."""
    primitive = Primitive(name)
    primitive.multiple_results = many

    @lru_cache(maxsize=1024)
    def results_of(avals, static):
        # Traced, because then they have their sharding, and the axes over which they vary in a `shard_map`.
        results = jax.make_jaxpr(partial(f, **dict(static)))(*avals).out_avals
        return results if many else results[0]

    primitive.def_abstract_eval(lambda *avals, **static: results_of(avals, tuple(static.items())))
    return primitive


def _computed_by(name, f, **of_platform):
    """Make a primitive of a function, with other implementations for some platforms."""
    primitive = _primitive(name, f)
    primitive.def_impl(f)
    for platform, lowered in {None: f, **of_platform}.items():
        mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=False), platform=platform)
    return primitive


def _bilinear(name, f, **of_platform):
    """Make such a primitive of `f(array, array, *, shape, new_axes)`, and its rule for `vmap`."""
    primitive = _computed_by(name, f, **of_platform)

    def batch(arrays, axes, *, shape, new_axes):
        arrays = members_first(arrays, axes)
        shape = (arrays[0].shape[0], *shape)
        return primitive.bind(*arrays, shape=shape, new_axes=tuple(axis + 1 for axis in new_axes)), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


def _broadcast(values, scale, *, shape, new_axes):
    return jnp.broadcast_to(jnp.expand_dims(values * scale, new_axes), shape)


def _sum_and_scale(samples, scale, *, shape, new_axes):
    return jnp.sum(samples, new_axes) * scale


def _scale_and_sum(samples, scale, *, shape, new_axes):
    return jnp.sum(samples * jnp.expand_dims(scale, new_axes), new_axes)


def _linear(name, f, **of_platform):
    """Make such a primitive of `f(array, index, *, number)`, linear in the array, and its rule for `vmap`.

    An index of more than one axis has one for each member, along its first axes.
    """

    def over_members(f):
        def mapped(array, index, *, number):
            g = partial(f, number=number)
            for _ in range(index.ndim - 1):
                g = jax.vmap(g)
            return g(array, index)

        return mapped

    of_platform = {platform: over_members(other) for platform, other in of_platform.items()}
    primitive = _computed_by(name, over_members(f), **of_platform)

    def batch(arrays, axes, *, number):
        return primitive.bind(*members_first(arrays, axes), number=number), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


def _take(values, index, *, number):
    ours, theirs = jax.typeof(values).sharding, jax.typeof(index).sharding
    # On an explicit mesh the rows are sharded as the index is.
    like_index = None if not any(theirs.spec) else NamedSharding(theirs.mesh, P(*theirs.spec, *ours.spec[1:]))
    return values.at[index].get(mode="fill", fill_value=jnp.nan, out_sharding=like_index)


def _add(rows, index, *, number):
    if any(jax.typeof(rows).sharding.spec):
        return _add_where(rows, index, number=number)
    return jax.ops.segment_sum(rows, index, number)


def _add_where(rows, index, *, number):
    is_row = jnp.arange(number, dtype=index.dtype)[:, None] == index[None]
    is_row = jnp.expand_dims(is_row, range(2, rows.ndim + 1))
    return jnp.sum(jnp.where(is_row, rows[None], 0), 1)


_take_rows = _linear("take_rows", _take)
_add_rows = _linear("add_rows", _add_where, cpu=_add)
# Each is the other's transpose.
ad.defbilinear(_take_rows, lambda ct, values, index, **static: _add_rows.bind(ct, index, **static), None)
ad.defbilinear(_add_rows, lambda ct, rows, index, **static: _take_rows.bind(ct, index, **static), None)
_unshared = _computed_by("unshared_on_cpu", lambda x, *, times: x, cpu=prevent_cse)
ad.deflinear2(_unshared, lambda cotangent, x, *, times: [cotangent])
batching.defvectorized(_unshared)
_spread = _bilinear("spread", _broadcast)
_summed = _bilinear("summed", _sum_and_scale, cuda=_scale_and_sum, rocm=_scale_and_sum)
# Each is the other's transpose.
ad.defbilinear(
    _spread,
    lambda cotangent, values, scale, **static: _summed.bind(cotangent, scale, **static),
    lambda cotangent, values, scale, **static: _summed.bind(cotangent, values, **static),
)
ad.defbilinear(
    _summed,
    lambda cotangent, samples, scale, **static: _spread.bind(cotangent, scale, **static),
    lambda cotangent, samples, scale, **static: _summed.bind(samples, cotangent, **static),
)


def _is_sharded(axis_context: Any) -> bool:
    """Return whether the compiler spreads arrays over devices, from JAX's context of lowering."""
    manual = getattr(axis_context, "manual_axes", None)
    if manual is None:
        return getattr(axis_context, "num_devices", 1) > 1
    return set(manual) != set(axis_context.mesh.axis_names)
