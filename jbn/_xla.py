"""What compilers are told. Nothing here changes a value; all of it was found by reading compiled programs.

What is best depends on what is known only when a program is lowered: the platform, and whether the compiler is
to spread arrays over devices. So the functions made here decide then, each as one primitive of JAX, which
takes less time to trace and to lower than branches that `jax.lax.platform_dependent` chooses from.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class Target(NamedTuple):
    """Where a program is to run."""

    platform: str | None  # "cpu", "cuda", "rocm", "tpu"; None for others
    sharded: bool  # whether the compiler spreads arrays over several devices


def decided_at_lowering(
    f: Callable[..., Any], *, derivative: Callable[..., Any], batch: Callable[..., Any]
) -> Callable[..., Any]:
    """Makes a function `(*arrays, **static)` of `f(target, *arrays, **static)`, which returns a tuple of arrays.

    `f` returns the same shapes for each target, and for None, which is asked what they are. `derivative` is its
    derivative for a change of the first array: `(arrays, change, results, **static) -> changes of the results`.
    `batch` is what `vmap` does: `(function, arrays, axes, **static) -> (arrays, axes)`.
    """
    primitive = Primitive(f.__name__)
    primitive.multiple_results = True
    staged = jax.jit(
        lambda static, target, *arrays: f(target, *arrays, **dict(static)), static_argnums=(0, 1)
    )

    def bind(*arrays, **static):
        return tuple(primitive.bind(*arrays, **static))

    @lru_cache(maxsize=1024)
    def shapes(static, *avals):
        return jax.make_jaxpr(lambda *arrays: f(None, *arrays, **dict(static)))(*avals).out_avals

    def lower(platform, context, *values, **static):
        target = Target(platform, _is_sharded(context.module_context.axis_context))
        staged_here = partial(staged, tuple(static.items()), target)
        return mlir.lower_fun(staged_here, multiple_results=True)(context, *values)

    def jvp(arrays, changes, **static):
        results = bind(*arrays, **static)
        if isinstance(changes[0], ad.Zero):
            return results, [ad.Zero.from_primal_value(result) for result in results]
        return results, derivative(arrays, changes[0], results, **static)

    primitive.def_abstract_eval(lambda *avals, **static: shapes(tuple(static.items()), *avals))
    primitive.def_impl(lambda *arrays, **static: jax.jit(lambda *arrays: bind(*arrays, **static))(*arrays))
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = partial(batch, bind)
    for platform in ("cpu", "cuda", "rocm", "tpu", None):
        mlir.register_lowering(primitive, partial(lower, platform), platform=platform)
    return bind


def _is_sharded(axis_context: Any) -> bool:
    manual = getattr(axis_context, "manual_axes", None)
    if manual is not None:
        return set(manual) != set(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) > 1


def prevent_cse(values: Any, *, times: int = 1) -> Any:
    """Returns values that the compiler cannot know to be the same, unless they are so as many `times`.

    XLA for CPU fuses a reduction with the arithmetic before it, but what two reductions share it first writes
    out. So `sum(x - c)` and `sum((x - c)**2)` take one pass to write `x - c`, and two to read it;

        fusion.1 = fusion(x, c), calls=subtract        ->   fusion.1 = fusion(x, c), calls=subtract_reduce
        fusion.2 = fusion(fusion.1), calls=reduce           fusion.2 = fusion(x, c), calls=subtract_multiply_reduce
        fusion.3 = fusion(fusion.1), calls=multiply_reduce

    where they do not know that they share, two to read `x`. Other compilers compute both at once, if they know.
    """
    for _ in range(times):
        # One by one, for in a `shard_map` some may vary over devices and others not.
        values = jax.tree.map(jax.lax.optimization_barrier, values)
    return values


def unshared_on_cpu(x: jax.Array) -> jax.Array:
    """Returns `x`, of which XLA for CPU does not know that what the gradient sums is made of the same `x`."""
    return _unshared.bind(x)


_unshared = Primitive("unshared_on_cpu")
_unshared.def_impl(lambda x: x)
_unshared.def_abstract_eval(lambda x: x)
ad.deflinear2(_unshared, lambda cotangent, _: [cotangent])
batching.defvectorized(_unshared)
mlir.register_lowering(_unshared, lambda _, x: [x])
# Three times, for measuring copies once and twice.
mlir.register_lowering(
    _unshared, mlir.lower_fun(partial(prevent_cse, times=3), multiple_results=False), platform="cpu"
)


def spread(values: jax.Array, scale: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Broadcasts `values * scale` along new axes. Its derivative is a sum that GPUs take of scaled samples.

    XLA for an H100 fuses the derivative of ReLU with one sum, but not with two that read the same: it then
    writes it out, and reads it twice more. Of three sums, two read nothing else, and the third is alone:

        fusion.1 = select(y > 0, dy, 0)                    fusion.1 = select(y > 0, dy, 0), sum(fusion.1 * x^)
        fusion.2 = sum(fusion.1), sum(fusion.1 * x^)  ->   fusion.2 = sum(fusion.1), sum(fusion.1 * scale)
    """
    return _spread.bind(values, scale, shape=shape, axes=axes)


def _make_bilinear(name, f, **of_platform):
    primitive = Primitive(name)
    shapes = lru_cache(1024)(
        lambda static, *avals: jax.make_jaxpr(partial(f, **dict(static)))(*avals).out_avals[0]
    )
    primitive.def_impl(f)
    primitive.def_abstract_eval(lambda *avals, **static: shapes(tuple(static.items()), *avals))
    batching.primitive_batchers[primitive] = lambda arrays, dims, **static: (
        jax.vmap(partial(f, **static), dims)(*arrays),
        0,
    )
    for platform, lowered in {None: f, **of_platform}.items():
        mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=False), platform=platform)
    return primitive


def _sum_scaled(samples, scale, *, shape, axes):
    return jax.numpy.sum(samples * jax.numpy.expand_dims(scale, axes), axes)


_spread = _make_bilinear(
    "spread",
    lambda values, scale, *, shape, axes: jax.numpy.broadcast_to(
        jax.numpy.expand_dims(values * scale, axes), shape
    ),
)
_total = _make_bilinear(
    "scaled_sum",
    lambda samples, scale, *, shape, axes: jax.numpy.sum(samples, axes) * scale,
    cuda=_sum_scaled,
    rocm=_sum_scaled,
)
# Each is the other's transpose.
ad.defbilinear(
    _spread,
    lambda cotangent, _, scale, **static: _total.bind(cotangent, scale, **static),
    lambda cotangent, values, _, **static: _total.bind(cotangent, values, **static),
)
ad.defbilinear(
    _total,
    lambda cotangent, _, scale, **static: _spread.bind(cotangent, scale, **static),
    lambda cotangent, samples, _, **static: _total.bind(samples, cotangent, **static),
)


def sum_together(*arrays: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Adds up arrays over the same axes, in one reduction of XLA.

    XLA for GPUs splits the reduction of many rows in two, and fuses the first halves of several. Of one
    reduction of several arrays the second half is one kernel, too:

        input_reduce_fusion.1 = (f32[128,128], f32[128,128]) fusion(x)        first half
        input_reduce_fusion.2 = f32[128] fusion(...)                     ->   (f32[128], f32[128]) fusion(...)
        input_reduce_fusion.3 = f32[128] fusion(...)
    """
    zeros = [jax.numpy.zeros((), array.dtype) for array in arrays]
    add = lambda a, b: tuple(p + q for p, q in zip(a, b))
    return jax.lax.reduce(arrays, tuple(zeros), add, axes)
