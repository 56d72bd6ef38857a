"""PyTorch's weights in an NNX model."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jbn._tools.paths import named_leaves
from jbn._tools.torch_layers import Names, Variable, fill

_TRANSIENT = nnx.Any(nnx.RngState, nnx.Cache, nnx.Intermediate)


def load_torch(
    model: nnx.Module, state: Mapping[str, Any], names: Names, *, transposed: Collection[str] | str = ()
) -> None:
    """Fill the parameters and statistics of an NNX model with weights from PyTorch, in place.

    The docstring of `jbn.linen.load_torch` has the tables of layers, and of what no file tells. As there,
    each key is used exactly once and every variable is filled, but for random keys, caches and intermediates;
    nothing is changed if anything does not fit. `nnx.ConvTranspose` is known by its class, and so is an
    `nnx.Conv` with `input_dilation`, which is how Flax writes a grouped transposed convolution.

    Args:
      model: the network, or one of shapes alone, by `nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))`.
      state: PyTorch's names and arrays, as a `state_dict`, `safetensors.numpy.load_file` or an .npz file has
        them: arrays of NumPy or JAX, or tensors.
      names: the path of every module that has variables, such as "blocks/0/conv", and the name of the same
        layer in PyTorch, such as "layer1.0.conv1". The modules of an `nnx.Sequential` are "layers/0" and so
        on. For layers that `nnx.vmap` stacks along a first axis, a list of the names of all.
      transposed: paths of other modules that have the kernel of a transposed convolution.

    Raises:
      TypeError: `state` is not a mapping of arrays, or `names` not one of names.
      ValueError: a key is not used, or twice; a variable gets no values, or of another shape, or such as are
        not finite. The message has all faults, with keys and shapes on both sides.

    >>> import jax.numpy as jnp, numpy as np, jbn.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    >>> state = {"fc.weight": np.array([[2.0, 3.0]]), "fc.bias": np.zeros(1)}
    >>> for leaf in "weight", "bias", "running_mean", "running_var":
    ...     state[f"bn.{leaf}"] = np.ones(1)
    >>> jbn.nnx.load_torch(model, state, {"layers/0": "fc", "layers/1": "bn"})
    >>> model.eval()
    >>> print(model(jnp.ones((1, 2))).round(3))
    [[5.]]
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model: expected an nnx.Module, got a {type(model).__name__}.")
    leaves, structure = named_leaves(nnx.state(model, nnx.Not(_TRANSIENT)))
    found = [Variable("/".join(path[:-1]), path[-1], leaf) for path, leaf in leaves]
    given = (transposed,) if isinstance(transposed, str) else transposed
    known = {"/".join(map(str, path)) for path, module in nnx.iter_modules(model) if _is_transposed(module)}
    nnx.update(model, jax.tree.unflatten(structure, fill(found, state, names, known.union(given))))


def _is_transposed(module: Any) -> bool:
    """Return whether its kernel is that of a transposed convolution, in Flax's order."""
    if isinstance(module, nnx.ConvTranspose):
        return not module.transpose_kernel
    return isinstance(module, nnx.Conv) and bool(np.any(np.greater(module.input_dilation or 1, 1)))
