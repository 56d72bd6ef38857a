"""PyTorch's weights for the variables of Flax's layers: other names, and axes in another order.

`jbn.linen` and `jbn.nnx` find the variables, each in its own way, and call this. Nothing here imports Flax.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn._tools.torch import as_array, check_state

# Flax's name of a leaf -> PyTorch's; others are the same in both.
_LEAVES = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_OURS = {"count": 1, "num_updates": 0}  # in no file of PyTorch
_IGNORED = "num_batches_tracked"  # PyTorch reads it only to average all batches with momentum=None

Names = Mapping[str, str | Sequence[str]]


class Variable(NamedTuple):
    """A variable of a Flax layer that is to be filled."""

    module: str  # path of the layer, such as "stem/Conv_0"
    name: str  # such as "kernel"
    like: Any  # what it holds now, of which only shape, dtype and sharding matter

    @property
    def path(self) -> str:
        return f"{self.module}/{self.name}" if self.module else self.name


def fill(
    variables: Sequence[Variable],
    state: Mapping[str, Any],
    names: Names,
    transposed: Collection[str],
    faults: Sequence[str] = (),
) -> list[jax.Array]:
    """Return what the variables hold with PyTorch's weights, as `jbn.linen.load_torch` describes.

    `faults` are those that the caller has found.

    Raises:
      TypeError: `state` is not a mapping of arrays, or `names` not one of names.
      ValueError: what does not fit, all in one message, a line each: there may be hundreds.
    """
    check_state(state)
    _check_names(names)
    modules = {variable.module for variable in variables}
    norms = {variable.module for variable in variables if variable.name == "var"}
    unused = {key for key in state if key.rpartition(".")[2] != _IGNORED}
    taken, missing, faults, filled = {}, [], [*faults], []
    for variable in variables:
        module, name, like = variable
        if module not in names:
            faults.append(f"{variable.path} {like.shape}: expected PyTorch's name of '{module}', got none")
            continue
        if name in _OURS and module in norms:
            filled.append(_place(np.full(like.shape, _OURS[name], like.dtype), like))
            continue
        layers, rows = names[module], []
        layers, stacked = ([layers], False) if isinstance(layers, str) else ([*layers], True)
        if stacked and like.shape[:1] != (len(layers),):
            what = f"{variable.path} {like.shape}"
            faults.append(f"{what}: expected as many names as its first axis is long, got {len(layers)}")
        for layer in layers:
            key = ".".join(filter(None, (layer.rstrip("."), _LEAVES.get(name, name))))
            unused.discard(key)
            if key in taken:
                faults.append(f"{key}: expected one use, got {taken[key]} and {variable.path}")
            elif key in state:
                value, fault = _convert(state[key], variable, like.shape[stacked:], module in transposed)
                faults += [f"{key}: {fault}"] * bool(fault)
                rows.append(value)
            else:
                missing.append(key)
                expected = _expected(name, like.shape[stacked:], module in transposed)
                parts = sorted(part for part in unused if _is_part(part, key))
                unused.difference_update(parts)
                got = f"{', '.join(parts)}: remove its parametrization in PyTorch" if parts else "no such key"
                faults.append(f"{key}: expected {expected} for {variable.path} {like.shape}, got {got}")
            taken[key] = variable.path
        if not faults:
            filled.append(_place(np.stack(rows) if stacked else rows[0], like))
    more = {key.removesuffix(name) for name in missing for key in unused if key.endswith(f".{name}")}
    less = {name.removesuffix(key) for name in missing for key in unused if name.endswith(f".{key}")}
    for begin, with_it, without in ((more, "keys", "names"), (less, "names", "keys")):
        if len(begin) == 1:
            faults.insert(
                0, f"{with_it} begin with '{min(begin)}', and {without} do not: expected both alike"
            )
    shapes = {key: tuple(np.shape(state[key])) for key in sorted(unused)}
    faults += [f"{key}: expected no such key, got one of shape {shape}" for key, shape in shapes.items()]
    unknown = [module for module in names if module not in modules]
    faults += [f"{module}: expected a module with variables, got none" for module in unknown]
    unknown = [module for module in transposed if module not in modules]
    faults += [f"transposed: expected modules with variables, got '{module}'" for module in unknown]
    if faults:
        raise ValueError("\n".join(faults))
    return filled


def _check_names(names: Any) -> None:
    if not isinstance(names, Mapping):
        raise TypeError(
            f"names: expected a mapping of paths to PyTorch's names, got a {type(names).__name__}."
        )
    for path, name in names.items():
        each = name if isinstance(name, list | tuple) else [name]
        if not all(isinstance(name, str) for name in each):
            raise TypeError(f"names[{path!r}]: expected PyTorch's name, or a list of names, got {name!r}.")


def _expected(name: str, shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """Return the shape of PyTorch's array for Flax's in this shape."""
    if name != "kernel" or len(shape) < 2:
        return shape
    *size, into, out = shape
    return (into, out, *size) if transposed else (out, into, *size)


def _fits(theirs: tuple[int, ...], name: str, shape: tuple[int, ...], transposed: bool) -> bool:
    expected = _expected(name, shape, transposed)
    if not transposed or name != "kernel" or len(theirs) != len(shape) or not all(theirs):
        return theirs == expected
    # A grouped one: PyTorch has (in, out / groups), Flax (in / groups, out).
    groups, rest = divmod(theirs[0], expected[0])
    return rest == 0 and (theirs[1] * groups, *theirs[2:]) == expected[1:]


def _convert(
    value: Any, variable: Variable, shape: tuple[int, ...], transposed: bool
) -> tuple[np.ndarray, str]:
    """Return PyTorch's array in the order of Flax's axes, and what is wrong with it, or ""."""
    value, (module, name, like) = as_array(value), variable
    if not _fits(value.shape, name, shape, transposed):
        hint = ""
        if not transposed and _fits(value.shape, name, shape, True):
            hint = f", the shape of a transposed one: pass transposed=('{module}',)"
        expected = _expected(name, shape, transposed)
        return value, f"expected {expected} for {variable.path} {like.shape}, got {value.shape}{hint}"
    for dtype in (value.dtype, like.dtype):
        if not jnp.issubdtype(dtype, jnp.floating):
            return value, f"expected floating-point numbers on both sides, got {dtype} for {variable.path}"
    if name == "kernel" and len(shape) >= 2:
        value = (
            _transposed_kernel(value, shape) if transposed else value.transpose(*range(2, len(shape)), 1, 0)
        )
    with np.errstate(over="ignore"):  # refused in the next line
        value = value.astype(like.dtype)
    if not np.isfinite(value).all() or (name == "var" and (value < 0).any()):
        return value, f"expected finite {like.dtype}{' >= 0' * (name == 'var')}, got other values"
    return value, ""


def _transposed_kernel(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turn (in, out / groups, *size) into (*size, in / groups, out), reversed in space.

    PyTorch's layer is the derivative of a convolution, y[stride * i + k] += weight[k] * x[i], and Flax's a
    convolution of `x` with zeros between, which takes the last weight first.
    """
    *size, into, _ = shape
    groups = weight.reshape(-1, into, *weight.shape[1:])  # (groups, in / groups, out / groups, *size)
    kernel = groups.transpose(*range(3, groups.ndim), 1, 0, 2).reshape(shape)
    return np.flip(kernel, tuple(range(len(size))))


def _is_part(key: str, weight: str) -> bool:
    """Return whether weight norm or spectral norm keep this array in place of a weight."""
    module, _, name = weight.rpartition(".")
    parts = [f"{name}_{part}" for part in ("g", "v", "orig", "u")]
    return key.startswith(f"{module}.parametrizations.{name}.".lstrip(".")) or key in [
        f"{module}.{part}".lstrip(".") for part in parts
    ]


def _place(value: np.ndarray, like: Any) -> jax.Array:
    """Return a JAX array, on the devices of what it replaces if those were chosen."""
    sharding = getattr(like, "sharding", None) if getattr(like, "committed", True) else None
    return jax.device_put(value, sharding)
