"""Merging the running statistics of whole models: replicas, federated clients, checkpoints."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbn._dtypes import arithmetic_dtype
from jbn._statistics import Moments, merge
from jbn._tools.paths import Path, named_leaves

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# With a program for each shape, the first merge of a network of 50 layers takes 2 s on a CPU, op by op 11 s.
# But of a thousand trees, and so a program of as many inputs, it takes twice as long as op by op.
_COMPILED = 128
_NEEDED, _NAMES = {"mean", "var"}, {*Moments._fields, "num_updates"}


def merge_trees(*trees: Any, counts: Sequence[ArrayLike] | None = None) -> Any:
    """Merge the moments of several models, layer by layer, as `jbn.merge` does: by count, exactly.

    The leaves of a tree are `jbn.Moments`, or the `mean`, `var` and perhaps `count` of a layer of Flax: the
    collection "batch_stats", or `nnx.state(model, nnx.BatchStat)`. The variance includes the spread between
    the trees, which an average of variances drops.

    Weights are the leaves' counts, or `counts`: how many samples each tree is made of. Running statistics of
    Flax have no count, and that of `jbn.ema` and `jbn.cumulative` is no number of samples: give `counts`. A
    layer whose own count is 0 was never updated, and counts for nothing beside others that were.

    | its `count` is | of | merged |
    |---|---|---|
    | that of `Moments`, without `counts` | samples | the sum |
    | more than 1 in some tree | samples of `jbn.pooled`, batches of other rules | the sum |
    | at most 1 in all trees | `jbn.ema(decay, debias=True)` | its average, by weight: at most 1 |

    The `num_updates` of a layer with a schedule of `renorm` is the largest of the trees'.

    Args:
      *trees: one or more trees with the same paths and shapes; NumPy or JAX.
      counts: one number >= 0 for each tree, which may be traced.

    Returns:
      A tree in the structure of the first: moments in float32 at least, variables of layers in their dtype,
      unless that is one of integers.

    Raises:
      TypeError: a leaf is neither `Moments` nor running statistics.
      ValueError: there are no trees, their paths or shapes differ, or counts are missing, too many, or < 0.

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> clients = [{"norm": {"mean": part.mean(0), "var": part.var(0)}} for part in (x[:2], x[2:])]
    >>> print(jbn.merge_trees(*clients, counts=(2, 3)))
    {'norm': {'mean': Array([4., 5.], dtype=float32), 'var': Array([8., 8.], dtype=float32)}}
    """
    if not trees:
        raise ValueError("merge_trees got no trees; expected one or more.")
    if counts is not None:
        counts = _checked(counts, len(trees))
    leaves, structure = named_leaves(trees[0])
    of_trees = [_layers(tree) for tree in trees]
    for layers in of_trees:
        _check_alike(of_trees[0], layers)
    merged = {path: _merge([layers[path] for layers in of_trees], path, counts) for path in of_trees[0]}
    found = [merged[path[:-1]][path[-1]] for path, _ in leaves]
    return jax.tree.unflatten(structure, found)


class _Layer(dict[str, Any]):
    """The statistics of one layer, by name."""

    is_moments = False


def _layers(tree: Any) -> dict[Path, _Layer]:
    layers: dict[Path, _Layer] = {}
    for path, leaf in named_leaves(tree)[0]:
        layers.setdefault(path[:-1], _Layer())[path[-1] if path else ""] = leaf
    for path, leaf in named_leaves(tree, is_leaf=lambda node: isinstance(node, Moments))[0]:
        if isinstance(leaf, Moments):
            layers[path].is_moments = True
    for path, layer in layers.items():
        if not _NEEDED <= layer.keys() <= _NAMES:
            raise TypeError(
                f"'{_join(path)}' has {', '.join(sorted(layer))}; expected jbn.Moments, or the mean and var "
                'of a layer: pass variables["batch_stats"], or nnx.state(model, nnx.BatchStat).'
            )
    return layers


def _check_alike(first: dict[Path, _Layer], other: dict[Path, _Layer]) -> None:
    shapes, theirs = (
        {(*path, name): np.shape(leaf) for path, layer in layers.items() for name, leaf in layer.items()}
        for layers in (first, other)
    )
    for path in sorted(shapes.keys() | theirs.keys()):
        if path not in shapes or path not in theirs:
            raise ValueError(f"'{_join(path)}' is not in all trees; expected the same paths in all.")
        expected = shapes[path if path[-1] == "num_updates" else (*path[:-1], "mean")]
        for shape in (shapes[path], theirs[path]):
            if shape != expected and not (path[-1] == "count" and shape == ()):
                raise ValueError(
                    f"'{_join(path)}' has shape {shape}; expected {expected}, as the first mean."
                )


def _merge(parts: list[_Layer], path: Path, counts: list[jax.Array] | None) -> dict[str, Any]:
    if "count" not in parts[0] and counts is None:
        raise ValueError(
            f"'{_join(path)}' has no count; expected counts=, how many samples each of the {len(parts)} "
            "trees is made of."
        )
    merge_parts = _compiled if len(parts) <= _COMPILED else _merged
    updates = [part.pop("num_updates") for part in parts if "num_updates" in part]
    merged = merge_parts([dict(part) for part in parts], counts, parts[0].is_moments)
    return merged | ({"num_updates": jnp.stack(updates).max(0)} if updates else {})


def _merged(parts: list[dict[str, Any]], counts: list[jax.Array] | None, is_moments: bool) -> dict[str, Any]:
    own = None
    if "count" in parts[0]:
        wide, features = arithmetic_dtype(parts[0]["var"]), np.shape(parts[0]["var"])
        own = [jnp.broadcast_to(jnp.asarray(part["count"], wide), features) for part in parts]
    if own is None or counts is None:
        weights = counts or own or []
    else:
        uncounted = jnp.stack(own).max(0) == 0
        weights = [
            jnp.where((count > 0) | uncounted, weight.astype(count.dtype), 0)
            for count, weight in zip(own, counts)
        ]
    whole = merge(*(Moments(part["mean"], part["var"], weight) for part, weight in zip(parts, weights)))
    if own is not None and not (is_moments and counts is None):
        # Averaged by weight as a mean is. The largest decides, so that sums are those of the pooled rule.
        zeros = jnp.zeros_like(whole.var)
        average = merge(*(Moments(zeros + count, zeros, weight) for count, weight in zip(own, weights))).mean
        whole = whole._replace(count=jnp.where(jnp.stack(own).max(0) > 1, sum(own), average))
    if is_moments:
        return whole._asdict()
    # A layer that no tree has updated stays as new, with a variance of 1.
    seen = jnp.stack([jnp.broadcast_to(weight, whole.var.shape) for weight in weights]).max(0) > 0
    whole = whole._replace(
        mean=jnp.where(seen, whole.mean, jnp.asarray(parts[0]["mean"], whole.mean.dtype)),
        var=jnp.where(seen, whole.var, jnp.asarray(parts[0]["var"], whole.var.dtype)),
    )
    given = {name: jnp.result_type(leaf) for name, leaf in parts[0].items()}
    kept = {name: dtype for name, dtype in given.items() if jnp.issubdtype(dtype, jnp.inexact)}
    return {name: getattr(whole, name).astype(kept.get(name, whole.var.dtype)) for name in given}


_compiled = jax.jit(_merged, static_argnums=2)


def _checked(counts: Any, trees: int) -> list[jax.Array]:
    if getattr(counts, "ndim", 1) != 1 or not hasattr(counts, "__len__") or len(counts) != trees:
        listed = ": a list of trees is given as merge_trees(*trees, ...)" * (trees == 1)
        raise ValueError(f"counts={counts}; expected one number for each of {trees} trees{listed}.")
    for count in counts:
        if isinstance(count, jax.core.Tracer) and count.shape == ():
            continue
        if np.shape(count) or not np.isreal(count) or not (count == 0 or _SMALLEST <= count <= _LARGEST):
            raise ValueError(f"counts={counts}; expected one finite number >= 0, in float32, for each tree.")
    return [jnp.asarray(count, jnp.float32) for count in counts]


def _join(path: Path) -> str:
    return "/".join(path) or "the tree itself"
