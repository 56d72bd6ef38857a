"""Checks of arguments: each error names the argument, what it was, what was expected, and the fix."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jbn._axes import feature_shape
from jbn._dtypes import arithmetic_dtype, real_dtype


def as_array(x: ArrayLike) -> jax.Array:
    """Return a JAX array; one that is given untouched, because `jax_debug_nans` looks at every operation."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def as_samples(x: ArrayLike) -> jax.Array:
    """Return `x` as a JAX array of floating point or complex numbers.

    Raises:
      TypeError: `x` holds integers or Booleans.
    """
    x = as_array(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"x has dtype {x.dtype}; expected a floating point or complex dtype. "
            "Convert it first, as in x.astype(jnp.float32)."
        )
    return x


def as_weights(mask: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """Return `mask` with as many axes as `x`, without a gradient, Boolean or real; None stays None.

    Raises:
      ValueError: `mask` does not broadcast to `x`, is ambiguous about the axes that it lacks, or holds a
        weight that is negative or not finite (checked only outside `jit`).
      TypeError: `mask` is complex.
    """
    if mask is None:
        return None
    real = real_dtype(arithmetic_dtype(x))
    known = None if isinstance(mask, jax.core.Tracer) else np.asarray(mask)
    if np.issubdtype(jnp.result_type(mask), np.complexfloating):
        raise TypeError(f"mask has dtype {jnp.result_type(mask)}; expected Booleans or real weights.")
    if known is not None and not np.all((known >= 0) & (known <= float(jnp.finfo(real).max))):
        raise ValueError(f"mask holds a weight that is negative or not finite in {real}; expected >= 0.")
    mask = jnp.asarray(mask)
    ones = (1,) * (x.ndim - mask.ndim)
    last, first = ones + mask.shape, mask.shape + ones
    fits_last, fits_first = (_broadcasts(shape, x.shape) for shape in (last, first))
    as_first = f"mask[{', '.join(['...', *['None'] * len(ones)])}]"
    if not fits_last:
        expected = (
            f"the last axes of x, but its axes are the first ones: pass {as_first}"
            if fits_first
            else f"at most {x.ndim} axes, each as long as that axis of x, or of size 1 where its positions "
            "share a value"
        )
        raise ValueError(
            f"mask of shape {mask.shape} does not broadcast to x of shape {x.shape}; expected {expected}."
        )
    if fits_first and first != last:
        raise ValueError(
            f"mask of shape {mask.shape} fits the last axes of x of shape {x.shape}, and the first as well; "
            f"expected an unambiguous one: {as_first} for the first axes, mask.reshape{last} for the last."
        )
    mask = mask.reshape(last)
    return jax.lax.stop_gradient(mask if mask.dtype == bool else mask.astype(real))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) == len(to) and all(m in (1, n) for m, n in zip(shape, to))


def as_shape(name: str, features: Any) -> tuple[int, ...]:
    """Return the shape of the feature axes, of which a number is the only one.

    Raises:
      TypeError: it is neither a number nor a sequence of them.
      ValueError: one is negative.
    """
    try:
        shape = tuple(map(operator.index, features if isinstance(features, Sequence) else (features,)))
    except TypeError:
        raise TypeError(
            f"{name}={features!r}; expected the number of features, or the shape of the feature axes."
        ) from None
    if min(shape, default=0) < 0:
        raise ValueError(f"{name}={features!r}; expected >= 0.")
    return shape


def as_float(value: Any) -> float:
    """Return a Python float, as `float` does, but not of text; a TypeError or ValueError of what is none."""
    if isinstance(value, str | bytes):
        raise TypeError
    return float(value)


def as_epsilon(epsilon: float, *values: Any) -> float:
    """Return `epsilon` as a Python float, a normal number of the dtype that `values` are computed in.

    Raises:
      TypeError: it is not a number, or is traced.
      ValueError: it is out of range.
    """
    try:
        epsilon = as_float(epsilon)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise TypeError(f"epsilon={epsilon!r}; expected a number > 0 that is not traced.") from None
    dtype = real_dtype(arithmetic_dtype(*jax.tree.leaves(values)))
    smallest, most = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).max)
    if not smallest <= epsilon <= most:
        raise ValueError(
            f"epsilon={epsilon}; expected a number from {smallest:.8g}, below which it is 0 in {dtype} "
            f"arithmetic, to {most:.8g}, such as 1e-5."
        )
    return epsilon


def as_decay(name: str, decay: Any) -> float | jax.Array:
    """Return the weight of the old value as a Python float, which is hashable; a traced one as it is.

    Raises:
      TypeError: it is not a number.
      ValueError: it is outside [0, 1], or an array of several.
    """
    if np.shape(decay) != ():
        raise ValueError(f"{name} has shape {np.shape(decay)}; expected one number for all features.")
    if isinstance(decay, jax.core.Tracer):
        return decay
    if decay is None:
        raise TypeError(
            f"{name}=None; expected a number in [0, 1]. The average of all batches, None in PyTorch, is "
            "update=jbn.cumulative()."
        )
    try:
        number = as_float(decay)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={decay!r}; expected a number in [0, 1].") from None
    if not 0 <= number <= 1:
        raise ValueError(
            f"{name}={number} is outside [0, 1]; expected the weight of the old value. PyTorch's momentum m "
            f"is {name}=1 - m here."
        )
    return number


def check_train(train: Any) -> None:
    """Raise a TypeError unless `train` is a Boolean scalar."""
    boolean = isinstance(train, bool) or getattr(train, "dtype", None) == np.dtype(bool)
    if not boolean or np.shape(train) != ():
        raise TypeError(f"train={train!r}; expected True, False, or a traced Boolean scalar.")


def check_exact(exact: Any) -> None:
    """Raise a TypeError unless `exact` is a Boolean that is not an array."""
    if not isinstance(exact, bool | np.bool_):
        raise TypeError(
            f"exact={exact!r}; expected True or False. It selects a program, so that it cannot be traced: "
            "make it a static argument of jax.jit."
        )


def check_update(update: Any) -> None:
    """Raise a TypeError unless `update` is a rule."""
    if isinstance(update, type) or not callable(update):
        raise TypeError(f"update={update!r}; expected a rule, such as jbn.ema(0.9).")


def as_dtype(name: str, dtype: Any) -> np.dtype:
    """Return `dtype` as NumPy has it; a TypeError if it is none."""
    try:
        return jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{name}={dtype!r}; expected a dtype, such as jnp.float32.") from None


def check_learnable(name: str, dtype: Any) -> None:
    """Raise a TypeError unless parameters of `dtype` can be learnt."""
    if not jnp.issubdtype(as_dtype(name, dtype), jnp.inexact):
        raise TypeError(f"{name}={jnp.dtype(dtype)}; expected a floating point or complex dtype.")


def result_dtype(x: jax.Array, dtype: DTypeLike | None) -> np.dtype:
    """Return `dtype`, or the dtype of `x` if that is None.

    Raises:
      TypeError: `dtype` cannot hold a normalized `x`.
    """
    result = as_dtype("dtype", x.dtype if dtype is None else dtype)
    kind = jnp.complexfloating if jnp.iscomplexobj(x) else jnp.inexact
    if not jnp.issubdtype(result, kind):
        expected = "a complex dtype" if jnp.iscomplexobj(x) else "a floating point or complex dtype"
        raise TypeError(
            f"dtype={result} cannot hold the result for x of dtype {x.dtype}; expected {expected}."
        )
    return result


def check_features(
    x: jax.Array,
    axes: tuple[int, ...],
    name: str,
    value: NamedTuple,
    kind: type,
    *,
    may_broadcast: bool = False,
    domains: int | None = None,
) -> None:
    """Check that an argument is of a type and each leaf has the shape of the features of `x`.

    A count may be a scalar. If `may_broadcast`, a leaf may be None or a scalar, or have all axes of `x` and
    broadcast to it. With `domains`, a leaf has a leading axis of as many, or, if `may_broadcast`, may have.

    Raises:
      TypeError: it is of another type.
      ValueError: a leaf has another shape.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected jbn.{kind.__name__}, as jbn.init returns it."
        )
    for field, leaf in value._asdict().items():
        if leaf is None:
            if not may_broadcast:
                raise TypeError(f"{name}.{field} is None; expected an array in the shape of the features.")
        elif not (field == "count" and np.shape(leaf) == ()):
            fix = f"pass {name} made for these features (jbn.init), or another axis"
            check_shape(x, axes, f"{name}.{field}", leaf, fix, may_broadcast=may_broadcast, domains=domains)


def check_shape(
    x: jax.Array,
    axes: tuple[int, ...],
    name: str,
    value: Any,
    fix: str,
    *,
    may_broadcast: bool,
    domains: int | None = None,
) -> None:
    """Raise a ValueError for a value in another shape than the features of `x`, after an axis of `domains`.

    If `may_broadcast`, the domains may share it, it may be a scalar, or have all axes of `x` and broadcast to
    it.
    """
    shape, features = np.shape(value), feature_shape(x, axes)
    by_domain = features if domains is None else (domains, *features)
    if shape == by_domain:
        return
    if may_broadcast and (shape in (features, ()) or _broadcasts(shape, x.shape)):
        return
    or_all_axes = f" To differ by position, give it all {x.ndim} axes of x." if may_broadcast else ""
    axis = axes[0] if len(axes) == 1 else axes
    which = "that of" if domains is None else f"that of {domains} domains and"
    raise ValueError(
        f"{name} has shape {shape}; expected {by_domain}, {which} the features of x of shape {x.shape} on "
        f"axis {axis}: {fix}.{or_all_axes}"
    )


def count_domains(domain: Any, axes: tuple[int, ...], running: Any) -> int | None:
    """Return how many domains the running moments have, if `domain` is given; the shapes are checked later.

    Raises:
      ValueError: they have no axis of domains.
    """
    if domain is None:
        return None
    shape = np.shape(getattr(running, "mean", ()))
    if hasattr(running, "mean") and len(shape) != len(axes) + 1:
        raise ValueError(
            f"domain is given, and running.mean has shape {shape}; expected a leading axis of domains before "
            "the features, as jbn.init((domains, features)) makes it."
        )
    return shape[0] if shape else 1
