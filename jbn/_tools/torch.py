"""One batch norm's weights and running statistics, from PyTorch and to it. Nothing here imports PyTorch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn._dtypes import arithmetic_dtype
from jbn._params import Params
from jbn._statistics import Moments


def from_torch(state: Mapping[str, Any], prefix: str = "") -> tuple[Params, Moments]:
    """Take one batch norm's parameters and running moments out of weights from PyTorch.

        scale, bias, mean, var = weight, bias, running_mean, running_var

    The running variance is taken over as it is. PyTorch averages the unbiased one, n/(n-1) * var, and its
    evaluation divides by the root of that, as `jbn.batch_norm(..., train=False)` then does; training goes on
    alike with `update=jbn.ema(0.9, unbiased=True)`. epsilon and momentum are in no file: the docstring of
    `jbn.linen.load_torch` has a table of what they usually are.

    The count is 1, which marks the moments as complete for `jbn.ema(decay, debias=True)`. For
    `jbn.cumulative()` set the number of batches that they are an average of: `running._replace(count=n)`,
    where n is `state[prefix + ".num_batches_tracked"]`; for `jbn.pooled()` the number of samples.

    Args:
      state: PyTorch's names and arrays, as a `state_dict` or a safetensors file has them: arrays of NumPy or
        JAX, or tensors. Other keys than the layer's are ignored.
      prefix: the layer's name, such as "layer1.0.bn1", with or without a dot at its end; "" if `state` is the
        layer's own.

    Returns:
      `Params` in the dtype they have, whose leaves are None for a layer with `affine=False`, and `Moments` in
      float32 at least.

    Raises:
      TypeError: `state` is not a mapping of arrays.
      ValueError: the running moments are missing, as with `track_running_stats=False`, or an array is of
        another shape, not of floating point, or not finite.

    >>> import numpy as np, jbn
    >>> state = {"bn1.weight": np.ones(2), "bn1.bias": np.zeros(2)}
    >>> state |= {"bn1.running_mean": np.array([1.0, 2.0]), "bn1.running_var": np.array([4.0, 9.0])}
    >>> params, running = jbn.from_torch(state, "bn1")
    >>> print(running.mean, running.var, running.count)
    [1. 2.] [4. 9.] [1. 1.]
    """
    check_state(state)
    at = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    given = {name: state[at + name] for name in ("weight", "bias") if at + name in state}
    for name in ("running_mean", "running_var"):
        if at + name not in state:
            raise ValueError(_missing(state, at, name, given))
        given[name] = state[at + name]
    arrays: dict[str, Any] = {name: as_array(value) for name, value in given.items()}
    features = arrays["running_mean"].shape
    if len(features) != 1:
        raise ValueError(f"{at}running_mean: expected (features,), the shape of a layer's, got {features}.")
    for name, array in arrays.items():
        if array.shape != features:
            raise ValueError(
                f"{at}{name}: expected {features}, the shape of {at}running_mean, got {array.shape}."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{at}{name}: expected floating-point numbers, got {array.dtype}.")
        with np.errstate(over="ignore"):  # refused in the next line
            array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        if not np.isfinite(array).all() or (name == "running_var" and (array < 0).any()):
            raise ValueError(
                f"{at}{name}: expected finite {array.dtype}{' >= 0' * (name == 'running_var')}, got others."
            )
        arrays[name] = jnp.asarray(array)
    mean, var = (
        arrays[name].astype(arithmetic_dtype(arrays[name])) for name in ("running_mean", "running_var")
    )
    return Params(arrays.get("weight"), arrays.get("bias")), Moments(mean, var, jnp.ones_like(var))


def _missing(state: Mapping[str, Any], at: str, name: str, given: Mapping[str, Any]) -> str:
    what = f"'{at}{name}': expected an array, got no such key"
    if given:
        return (
            f"{what}. A layer with track_running_stats=False has no running moments: make them by "
            "jbn.init(features), and always call jbn.batch_norm with train=True and update=jbn.keep()."
        )
    there = sorted(
        key.removesuffix("running_var").rstrip(".") for key in state if key.endswith("running_var")
    )
    more = ", ..." * (len(there) > 8)
    return f"{what}. Batch norms are at {', '.join(map(repr, there[:8])) + more or 'no prefix'}."


def to_torch(params: Params | None, running: Moments, prefix: str = "") -> dict[str, np.ndarray]:
    """Name one batch norm's parameters and running moments as PyTorch does.

        weight, bias, running_mean, running_var = scale, bias, mean, var

    `load_state_dict(strict=True)` takes them for a `BatchNorm1d`, `2d` or `3d`:

        {key: torch.from_numpy(value) for key, value in jbn.to_torch(params, running).items()}

    PyTorch keeps the unbiased variance, as `update=jbn.ema(decay, unbiased=True)` does; its momentum is
    1 - decay, and epsilon goes into its constructor. `num_batches_tracked`, which it reads with
    `momentum=None` only, is the largest count, rounded up: the number of batches by `jbn.ema` and
    `jbn.cumulative`. `jbn.pooled` counts samples; set the number of batches by `running._replace(count=n)`.

    Args:
      params: the parameters. With None for both, the names are those of a layer with `affine=False`; with
        None for one, it becomes ones or zeros, because PyTorch's layer has both or neither.
      running: the running moments.
      prefix: the layer's name, with or without a dot at its end; "" for its own `state_dict`.

    Returns:
      Arrays of NumPy, in the dtypes of `params` and `running`; bfloat16 becomes float32. No memory is shared.

    Raises:
      TypeError: `params` or `running` is of another type.
      ValueError: there is not one feature axis, shapes differ, or numbers are complex.

    >>> import jbn
    >>> for key, value in jbn.to_torch(*jbn.init(2), "bn1").items():
    ...     print(key, value)
    bn1.weight [1. 1.]
    bn1.bias [0. 0.]
    bn1.running_mean [0. 0.]
    bn1.running_var [1. 1.]
    bn1.num_batches_tracked 0
    """
    at = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    if not isinstance(running, Moments) or not isinstance(params, Params | None):
        got = f"{type(params).__name__} and {type(running).__name__}"
        raise TypeError(f"params, running: expected jbn.Params or None and jbn.Moments, got {got}.")
    features = np.shape(running.mean)
    if len(features) != 1:
        raise ValueError(
            f"running.mean has shape {features}; expected (features,), as PyTorch's layers have."
        )
    scale, bias = params or (None, None)
    arrays = {"running_mean": running.mean, "running_var": running.var}
    for name, value in (arrays | {"scale": scale, "bias": bias}).items():
        if value is not None and (np.shape(value) not in ((), features) or jnp.iscomplexobj(value)):
            what = f"{jnp.result_type(value)} of shape {np.shape(value)}"
            raise ValueError(f"{name}: expected real numbers, {features} as running.mean, got {what}.")
    if scale is not None or bias is not None:
        scale = jnp.ones_like(running.var) if scale is None else scale
        arrays = {"weight": scale, "bias": jnp.zeros_like(scale) if bias is None else bias} | arrays
    named = {at + name: _for_torch(value, features) for name, value in arrays.items()}
    batches = np.ceil(np.max(np.asarray(running.count), initial=0))
    return named | {f"{at}num_batches_tracked": np.array(batches, np.int64)}


def _for_torch(value: Any, features: tuple[int, ...]) -> np.ndarray:
    array = np.array(value)  # a copy that may be written to, or torch.from_numpy warns
    array = array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
    return np.broadcast_to(array, features).copy()


def check_state(state: Any) -> None:
    """Raise a TypeError unless it is a mapping, and that of the arrays and not one around it."""
    if not isinstance(state, Mapping):
        how = ": pass its state_dict()" if hasattr(state, "state_dict") else ""
        how = f": pass safetensors.numpy.load_file({str(state)!r})" if hasattr(state, "strip") else how
        raise TypeError(
            f"state is a {type(state).__name__}; expected a mapping of PyTorch's names to arrays{how}."
        )
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"state has the key {key!r}; expected PyTorch's names, which are strings.")
        if isinstance(value, Mapping):
            raise TypeError(
                f"state[{key!r}] is a mapping; expected an array: pass state[{key!r}] in its place."
            )


def as_array(value: Any) -> np.ndarray:
    """Return an array of NumPy, also of a tensor that has a gradient, is on a GPU, or is of bfloat16."""
    for method in ("detach", "cpu"):
        value = getattr(value, method, lambda value=value: value)()
    try:
        return np.asarray(value)
    except TypeError:  # a tensor of bfloat16, which PyTorch cannot give to NumPy
        value = getattr(value, "contiguous", lambda: value)()
        return np.asarray(jnp.from_dlpack(value))
