"""The parameters of a network as a sequence of layers, in the order in which it uses them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jbn.inspection._first_use import order_of_use


@dataclass(frozen=True)
class Layers:
    """How parameters are split into layers, as `split_layers` returns it.

    Equal and hashed by value, so that it may be a static argument of `jit`.
    """

    names: tuple[str, ...]  # of each layer's kernel, "Dense_0/kernel"
    members: tuple[tuple[int, ...], ...]  # of each layer, the numbers of its leaves in the flattened params
    structure: Any  # the tree structure of the params

    def split(self, params: Any) -> tuple[tuple[jax.Array, ...], ...]:
        """Split parameters, or gradients, into a tuple of layers, each a tuple of leaves.

        Raises:
          ValueError: `params` has another structure.
        """
        leaves, structure = jax.tree.flatten(params)
        if structure != self.structure:
            raise ValueError(f"params has structure {structure}; expected {self.structure}.")
        return tuple(tuple(leaves[i] for i in layer) for layer in self.members)

    def join(self, layers: Sequence[Sequence[jax.Array]]) -> Any:
        """Join layers again: `join(split(params))` is `params`.

        Raises:
          ValueError: the numbers of leaves are not those that `split` returns.
        """
        sizes, expected = [[len(layer) for layer in layers_] for layers_ in (layers, self.members)]
        if sizes != expected:
            raise ValueError(f"layers have {sizes} leaves; expected {expected}, as split returns them.")
        leaves = {i: leaf for layer, members in zip(layers, self.members) for leaf, i in zip(layer, members)}
        return jax.tree.unflatten(self.structure, [leaves[i] for i in range(len(leaves))])


def split_layers(apply: Callable[[Any], Any], params: Any) -> Layers:
    """Find the layers of a network, in the order in which it uses them.

    Names do not give the order: Flax sorts them, `BatchNorm_0` before `Dense_0`. So `apply` is traced, and
    leaves are ordered by where each first meets data or another leaf; those that are never used go last.
    A leaf with two axes or more, a kernel, starts a new layer. Leaves with fewer, such as biases and the
    scales of batch normalization, belong to the layer before them, or to the first layer if there is none.

    Args:
      apply: a function of the parameters alone that runs the network, on any inputs, and returns any pytree
        of arrays. A penalty on the parameters should not come before the network in it.
      params: any pytree of arrays, or of `jax.ShapeDtypeStruct`.

    Returns:
      Layers, whose `split(params)` and `join(layers)` convert. A layer without kernel has the name of its
      first leaf.

    Raises:
      ValueError: `params` has no leaves.

    Reference: for the layers of Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?",
    definition 2.1.

    >>> import jax.numpy as jnp
    >>> from jbn import inspection
    >>> params = {"bias": jnp.ones(3), "first": jnp.ones((2, 3)), "last": jnp.ones((3, 1))}
    >>> x = jnp.ones((4, 2))
    >>> apply = lambda params: (x @ params["first"] + params["bias"][None]) @ params["last"]
    >>> layers = inspection.split_layers(apply, params)
    >>> print(layers.names)
    ('first', 'last')
    >>> print([[leaf.shape for leaf in layer] for layer in layers.split(params)])
    [[(2, 3), (3,)], [(3, 1)]]
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    if not paths:
        raise ValueError("params has no leaves; expected a pytree with one array or more.")
    order = order_of_use(lambda *leaves: apply(jax.tree.unflatten(structure, leaves)), [x for _, x in paths])
    members: list[list[int]] = [[]]
    kernels: list[int] = []
    for i in order:
        if np.ndim(paths[i][1]) >= 2:
            if kernels:
                members.append([])
            kernels.append(i)
        members[-1].append(i)
    names = [_name(paths[i][0]) for i in kernels or order[:1]]
    return Layers(tuple(names), tuple(map(tuple, members)), structure)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
