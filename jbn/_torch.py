"""PyTorch's weights as variables of Flax: other names, and axes in another order.

Pure functions of mappings of arrays. Nothing here imports PyTorch or Flax.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Flax's name of a leaf -> PyTorch's; others are the same in both.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_IGNORED = "num_batches_tracked"  # PyTorch reads it only to average all batches with momentum=None


def load(variables: Any, state: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """Fill the variables of a network in Flax with weights from PyTorch.

    | layer | PyTorch | Flax |
    |---|---|---|
    | convolution, 1-d to 3-d | weight (out, in / groups, *size) | kernel (*size, in / groups, out) |
    | linear | weight (out, in) | kernel (in, out) |
    | norm | weight, bias, running_mean, running_var | scale, bias, mean, var |

    Running moments are taken over as they are: PyTorch's variance is the unbiased one, n/(n-1) * var, and its
    evaluation divides by the root of that, as Flax's does here. A `count` of jbn's layers becomes 1, which
    marks them as complete for `jbn.ema(decay, debias=True)`. `num_batches_tracked` is ignored.

    Outputs equal PyTorch's if the networks do. No file tells of epsilon (1e-5 in both), of padding (where
    strides are 2 and sizes even, Flax's "SAME" pads other sides than PyTorch; give numbers), and of the order
    in which a linear layer gets the features of flattened images (channels come first in PyTorch).

    Args:
      variables: what Flax's `init` returns, {"params": ..., "batch_stats": ...}; of the leaves only shape and
        dtype matter.
      state: PyTorch's names and arrays, as a `state_dict` on the CPU or a safetensors file has them.
      names: the path of every Flax module that has variables, such as "stem/Conv_0", and the name of the same
        layer in PyTorch, such as "conv1".

    Returns:
      The variables with PyTorch's values, in their structure and dtypes.

    Raises:
      ValueError: a key is not used, or twice; a variable gets no values, or of another shape, or such as are
        not finite. The message has all faults, with keys and shapes on both sides.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
    unused = {key for key in state if key.rpartition(".")[2] != _IGNORED}
    modules, taken, faults, loaded = set(), {}, [], []
    for keys, leaf in leaves:
        _, _, path = jax.tree_util.keystr(keys, simple=True, separator="/").partition("/")
        module, _, name = path.rpartition("/")
        modules.add(module)
        if module not in names:
            faults.append(f"{path} {leaf.shape}: expected PyTorch's name of '{module}', got none")
            continue
        if name == "count":
            loaded.append(jnp.ones(leaf.shape, leaf.dtype))
            continue
        key = ".".join(filter(None, (names[module], _LEAVES.get(name, name))))
        unused.discard(key)
        axes = _axes(name, len(leaf.shape))
        expected = tuple(leaf.shape[axes.index(i)] for i in range(len(axes)))
        what = f"{key}: expected {expected} for {path} {leaf.shape}"
        value = _as_array(state[key]) if key in state else None
        if key in taken:
            faults.append(f"{key}: expected one use, got {taken[key]} and {path}")
        elif value is None:
            faults.append(f"{what}, got no such key")
        elif value.shape != expected:
            faults.append(f"{what}, got {value.shape}")
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            faults.append(f"{key}: expected floating-point numbers, got {value.dtype}")
        else:
            with np.errstate(over="ignore"):  # refused in the next line
                value = value.transpose(axes).astype(leaf.dtype)
            if not np.isfinite(value).all() or (name == "var" and (value < 0).any()):
                faults.append(
                    f"{key}: expected finite {leaf.dtype}{' >= 0' * (name == 'var')}, got other values"
                )
            loaded.append(jnp.asarray(value))
        taken[key] = path
    faults += [
        f"{key}: expected no such key, got one of shape {np.shape(state[key])}" for key in sorted(unused)
    ]
    faults += [
        f"{module}: expected a module with variables, got none" for module in names if module not in modules
    ]
    if faults:
        raise ValueError("; ".join(faults))
    return jax.tree_util.tree_unflatten(structure, loaded)


def _axes(name: str, ndim: int) -> tuple[int, ...]:
    """Return which axis of PyTorch's array each axis of Flax's is."""
    return (*range(2, ndim), 1, 0) if name == "kernel" else tuple(range(ndim))


def _as_array(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except TypeError:  # a tensor of bfloat16, which PyTorch cannot give to NumPy
        return np.asarray(jnp.from_dlpack(value))
