"""What compilers are told. No value depends on it; all of it comes from reading compiled programs.

What is best depends on what is known only when a program is lowered: the platform, and whether the compiler
spreads arrays over devices. So what is here decides then, as primitives of JAX, which take less time to trace
and to lower than branches that `jax.lax.platform_dependent` chooses from. The programs are those that jax
0.10.2 makes; `python -m benchmarks compiled` shows whether a later one still needs to be told.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

PLATFORMS = ("cpu", "cuda", "rocm", "tpu", None)  # None: any other


class Target(NamedTuple):
    """Where a program is to run."""

    platform: str | None  # one of PLATFORMS
    sharded: bool  # whether the compiler spreads arrays over several devices


def decided_at_lowering(
    f: Callable[..., Any], *, derivative: Callable[..., Any], batch: Callable[..., Any]
) -> Callable[..., Any]:
    """Makes a function of `f(target, options, *arrays)` that is called without the target.

    Args:
      f: returns a tuple of arrays, of the same shapes for each target, and for None, which only asks for
        them; `options` are hashable.
      derivative: that for a change of the first array: `(options, arrays, change, results) -> changes`.
      batch: what `vmap` does: `(function, options, arrays, axes) -> (results, axes)`.
    """
    primitive = _primitive(f.__name__, lambda *arrays, options: f(None, options, *arrays), many=True)
    bind = lambda options, *arrays: tuple(primitive.bind(*arrays, options=options))
    # By jit, layers of one shape share what was traced and lowered.
    lowered = jax.jit(f, static_argnums=(0, 1))
    eager = jax.jit(bind, static_argnums=0)

    def run(*arrays, options):
        # `jax_disable_jit` and `jax_debug_nans`, where it finds some, run functions without jit, and would
        # come back here.
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            return eager(options, *arrays)

    def jvp(arrays, changes, *, options):
        results = bind(options, *arrays)
        if isinstance(changes[0], ad.Zero):
            return results, [ad.Zero.from_primal_value(result) for result in results]
        return results, derivative(options, arrays, changes[0], results)

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


def sum_together(*arrays: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Adds up arrays over the same axes, in one reduction of XLA.

    XLA for GPUs splits the reduction of many rows in two, and fuses the first halves of several. Of one
    reduction of several arrays the second half is one kernel, too:

        fusion.1 = f32[128,128], f32[128,128] fusion(x)       fusion.1 = f32[128,128], f32[128,128] fusion(x)
        fusion.2 = f32[128] fusion(fusion.1)             ->   fusion.2 = f32[128], f32[128] fusion(fusion.1)
        fusion.3 = f32[128] fusion(fusion.1)

    Few rows it does not split, and writes out first what they share; so they are split here.
    """
    add = lambda a, b: tuple(p + q for p, q in zip(a, b))
    zeros = tuple(jnp.zeros((), array.dtype) for array in arrays)
    if len(axes) > 1 and _are_few(arrays[0].shape, axes):
        # Without a barrier, XLA would make one sum of the two.
        arrays = prevent_cse(tuple(jax.lax.reduce(arrays, zeros, add, axes[1:])))
        axes = axes[:1]
    return jax.lax.reduce(arrays, zeros, add, axes)


def prevent_cse(values: Any, *, times: int = 1) -> Any:
    """Returns values that the compiler cannot know to be the same, unless they are so as many `times`.

    XLA for CPU fuses a reduction with the arithmetic before it, but what two reductions share it first writes
    out. If it does not know that they share, sum(x - c) and sum((x - c)**2) are two passes that read `x`:

        fusion.1 = x - c                        fusion.1 = sum(x - c)
        fusion.2 = sum(fusion.1)          ->    fusion.2 = sum((x' - c')**2)
        fusion.3 = sum(fusion.1**2)
    """
    for _ in range(times):
        # One by one, for in a `shard_map` some may vary over devices and others not.
        values = jax.tree.map(jax.lax.optimization_barrier, values)
    return values


def unshared_on_cpu(x: jax.Array, *, times: int = 1) -> jax.Array:
    """Returns `x`, of which XLA for CPU does not know that what the gradient sums is made of the same `x`."""
    return _unshared.bind(x, times=times)


def for_each_part(values: jax.Array, parts: int) -> jax.Array:
    """Repeats values along a new first axis, so that their gradient is a sum of the sums of each part.

    XLA makes one sum of a sum of sums, and then has two over all samples, for which it writes out what both
    add up:

        fusion.1 = dy * x^, sum(dy * x^, of each part)     fusion.1 = sum(dy * x^, of each part)
        fusion.2 = sum(dy * x^)                       ->   fusion.2 = sum(fusion.1)
    """
    return jax.lax.optimization_barrier(jnp.broadcast_to(values, (parts, *values.shape)))


def is_summed_apart(shape: tuple[int, ...], axes: tuple[int, ...], dtype: np.dtype) -> bool:
    """Tells whether `spread` pays: where samples have 16 bits, and are so many that GPUs split their sums."""
    return jnp.finfo(dtype).bits < 32 and not _are_few(shape, axes)


def spread(
    values: jax.Array, scale: jax.Array, *, shape: tuple[int, ...], new_axes: tuple[int, ...]
) -> jax.Array:
    """Broadcasts `values * scale` along new axes. Its transpose is a sum that GPUs take of scaled samples.

    XLA for an H100 fuses the derivative of ReLU with one sum, but not with two that read the same: it writes
    it out, and reads it twice more. Of three sums, two read nothing else, and it is fused with the third:

        fusion.1 = select(y > 0, dy, 0)                    fusion.1 = select(y > 0, dy, 0), sum(fusion.1 * x^)
        fusion.2 = sum(fusion.1), sum(fusion.1 * x^)  ->   fusion.2 = sum(fusion.1), sum(fusion.1 * scale)
    """
    return _spread.bind(values, scale, shape=shape, new_axes=new_axes)


def _are_few(shape, axes):
    """Tells whether XLA for an H100 does not split the sum over some axes; a size may be symbolic."""
    rows = math.prod(shape[axis] for axis in axes)
    return isinstance(rows, int) and rows <= 8192


def _primitive(name: str, f: Callable[..., Any], *, many: bool = False) -> Primitive:
    """Makes a primitive that returns arrays like those of a function, whatever it is lowered to."""
    primitive = Primitive(name)
    primitive.multiple_results = many

    @lru_cache(maxsize=1024)
    def results_of(avals, static):
        # Traced, they have the sharding, and the devices over which they vary in a `shard_map`.
        results = jax.make_jaxpr(partial(f, **dict(static)))(*avals).out_avals
        return results if many else results[0]

    primitive.def_abstract_eval(lambda *avals, **static: results_of(avals, tuple(static.items())))
    return primitive


def _computed_by(name, f, **of_platform):
    """Makes a primitive of a function, which some platforms compute in a way of their own."""
    primitive = _primitive(name, f)
    primitive.def_impl(f)
    for platform, lowered in {None: f, **of_platform}.items():
        mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=False), platform=platform)
    return primitive


def _bilinear(name, f, **of_platform):
    primitive = _computed_by(name, f, **of_platform)

    def batch(arrays, axes, *, shape, new_axes):
        size = next(array.shape[axis] for array, axis in zip(arrays, axes) if axis is not None)
        arrays = [
            jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)
            for array, axis in zip(arrays, axes)
        ]
        return primitive.bind(*arrays, shape=(size, *shape), new_axes=tuple(axis + 1 for axis in new_axes)), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


def _broadcast(values, scale, *, shape, new_axes):
    return jnp.broadcast_to(jnp.expand_dims(values * scale, new_axes), shape)


def _sum_and_scale(samples, scale, *, shape, new_axes):
    return jnp.sum(samples, new_axes) * scale


def _scale_and_sum(samples, scale, *, shape, new_axes):
    return jnp.sum(samples * jnp.expand_dims(scale, new_axes), new_axes)


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
    manual = getattr(axis_context, "manual_axes", None)
    if manual is None:
        return getattr(axis_context, "num_devices", 1) > 1
    return set(manual) != set(axis_context.mesh.axis_names)
