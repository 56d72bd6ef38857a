"""PyTorch's weights in a Linen model."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax

from jbn._tools.paths import named_leaves
from jbn._tools.torch_layers import Names, Variable, fill


def load_torch(
    variables: Any, state: Mapping[str, Any], names: Names, *, transposed: Collection[str] | str | None = None
) -> Any:
    """Fill the variables of a network in Flax with weights from PyTorch, each key and variable exactly once.

    | layer | PyTorch | Flax |
    |---|---|---|
    | convolution, 1-d to 3-d | weight (out, in / groups, *size) | kernel (*size, in / groups, out) |
    | linear | weight (out, in) | kernel (in, out) |
    | transposed convolution | weight (in, out, *size) | kernel (*size, in, out), reversed in space |
    | with `transpose_kernel=True` | weight (in, out, *size) | kernel (*size, out, in) |
    | norm | weight, bias, running_mean, running_var | scale, bias, mean, var |
    | embedding | weight | embedding |

    Outputs equal PyTorch's if the networks do, of which no file tells:

    | what | there | here |
    |---|---|---|
    | epsilon of batch norm: PyTorch, most of timm | 1e-5 | 1e-5, the default |
    | of weights made by TensorFlow: timm's `tf_*`, Inception | 1e-3 | `epsilon=1e-3` |
    | momentum: PyTorch, most of timm | 0.1 | `momentum=0.9` |
    | of networks that follow TensorFlow's training | 0.01 | 0.99, the default |
    | running variance: Bessel's, n/(n-1) * var | always | `update=jbn.ema(0.9, unbiased=True)` |
    | epsilon of LayerNorm: PyTorch, transformers | 1e-5, 1e-6, 1e-12 | 1e-6, Flax's default |
    | padding | the same on both sides | "SAME" pads others where strides are 2: give numbers |
    | features of a flattened image | channels first | channels last: transpose before `reshape` |

    Padding is the usual culprit if outputs differ, and not batch norm. That of a transposed convolution with
    `padding=p, output_padding=o, dilation=d` is `[(d * (size - 1) - p, d * (size - 1) - p + o)]` in Flax.

    The running variance is taken over as it is. A `count` of jbn's layers becomes 1, which marks the moments
    as complete for `jbn.ema(decay, debias=True)`; a `num_updates` becomes 0. `num_batches_tracked` is
    ignored.

    Args:
      variables: what Flax's `init` or `jax.eval_shape(model.init, ...)` returns, {"params": ...,
        "batch_stats": ...}; only shapes, dtypes and shardings matter.
      state: PyTorch's names and arrays, as a `state_dict`, `safetensors.numpy.load_file` or an .npz file has
        them: arrays of NumPy or JAX, or tensors.
      names: the path of every Flax module that has variables, such as "stem/Conv_0", and the name of the same
        layer in PyTorch, such as "conv1". For layers that `nn.scan` or `nn.vmap` stacks along a first axis,
        a list of the names of all.
      transposed: paths of the transposed convolutions without `transpose_kernel=True`. Variables do not tell:
        where there are as many features before as after, nothing but this argument distinguishes them from
        convolutions. `nn.Conv` with `input_dilation` belongs here too; with `feature_group_count` it is a
        grouped transposed convolution, which Flax has no other layer for.

    Returns:
      The variables with PyTorch's values, in their structure and dtypes.

    Raises:
      TypeError: `state` is not a mapping of arrays, or `names` not one of names.
      ValueError: a key is not used, or twice; a variable gets no values, or of another shape, or such as are
        not finite. The message has all faults, with keys and shapes on both sides.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, jbn.linen
    >>> model = nn.Sequential([nn.Dense(1), nn.BatchNorm(use_running_average=True)])
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2)))
    >>> state = {"fc.weight": np.array([[2.0, 3.0]]), "fc.bias": np.zeros(1)}
    >>> for leaf in "weight", "bias", "running_mean", "running_var":
    ...     state[f"bn.{leaf}"] = np.ones(1)
    >>> loaded = jbn.linen.load_torch(variables, state, {"layers_0": "fc", "layers_1": "bn"})
    >>> print(model.apply(loaded, jnp.ones((1, 2))).round(3))
    [[5.]]
    """
    leaves, structure = named_leaves(variables)
    collections = {path[0] for path, _ in leaves}
    if not collections & {"params", "batch_stats"}:
        raise ValueError(
            'variables: expected what init returns, {"params": ..., "batch_stats": ...}, got a tree of '
            f"{', '.join(sorted(collections)) or 'nothing'}."
        )
    found = [Variable("/".join(path[1:-1]), path[-1], leaf) for path, leaf in leaves]
    faults = _of_unknown_order(found) if transposed is None else []
    transposed = (transposed,) if isinstance(transposed, str) else transposed or ()
    return jax.tree.unflatten(structure, fill(found, state, names, transposed, faults))


def _of_unknown_order(variables: list[Variable]) -> list[str]:
    """Say of what Flax names ConvTranspose that its shape does not tell the order of its axes."""
    return [
        f"{module}: expected transposed=('{module}',), or transposed=() if it has transpose_kernel=True, got "
        "neither, and as many features before as after"
        for module, name, like in variables
        if re.search(r"(^|/)ConvTranspose_\d+$", module)
        and name == "kernel"
        and like.shape[-1] == like.shape[-2]
    ]
