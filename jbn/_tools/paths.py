"""Names of a tree's leaves, whatever it is made of: dicts, Flax's states and boxes, named tuples."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.tree_util import GetAttrKey

Path: TypeAlias = tuple[str, ...]


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[Path, Any]], Any]:
    """Return each leaf with the names that lead to it, and the tree's structure.

    The box of a leaf (`nn.Partitioned`, `nnx.Param`) is no part of its name.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(_names(keys), leaf) for keys, leaf in leaves], structure


def _names(keys: tuple[Any, ...]) -> Path:
    if len(keys) > 1 and keys[-1] == GetAttrKey("value"):
        keys = keys[:-1]
    return tuple(name for key in keys for name in _names_of(key))


def _names_of(key: Any) -> Path:
    if isinstance(getattr(key, "key", None), tuple):  # as of `flax.traverse_util.flatten_dict`
        return tuple(map(str, key.key))
    return (jax.tree_util.keystr((key,), simple=True),)
