"""Fold the norms of a trained model into the layers before them, and run it without them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

import jbn._tools.folding as pure
from jbn._dtypes import promote
from jbn._params import Params
from jbn._statistics import Moments
from jbn.linen._calls import calls, calls_batch_norm, intercept
from jbn.linen._folding.pairs import LAYERS, NormPath

_OF_NORM = "scale", "bias", "mean", "var", "count", "num_updates"  # a subclass may have more, which stay


def fold(variables: Any, pairs: Mapping[str, str], *, epsilon: float | None = None) -> Any:
    """Fold norms into the layers before them by `jbn.fold`, and return the variables without those norms.

    Run them in `jbn.linen.without_norms(pairs)`, or with a model that has no norms, and a bias in the layers.

    Args:
      variables: {"params": ..., "batch_stats": ...} and other collections, which stay.
      pairs: {path of the layer: path of its norm}, as `find_pairs` returns it, or by hand. Only `find_pairs`
        sees what a model does with the layers: pairs by hand are folded, whatever else reads them, and
        with the last axis of the kernel as that of the outputs.
      epsilon: of the norms of pairs by hand; those of `find_pairs` know their own.

    Returns:
      Variables in which each layer has a kernel and a bias, in the kernel's dtype, and the norms have none.
      Metadata of `nn.Partitioned` stay; a new bias is partitioned as the kernel's outputs. Variables that are
      stacked by `nn.scan` or `nn.vmap`, along their first axes, are folded one by one.

    Raises:
      TypeError: `pairs` is no such mapping.
      ValueError: a path has no such layer or norm, shapes differ, two layers have one norm, or an epsilon
        is missing or another than the norm's. The message has all faults, a line each.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen
    >>> model = nn.Sequential([nn.Dense(4, use_bias=False), nn.BatchNorm(use_running_average=True)])
    >>> x = jnp.ones((3, 5))
    >>> variables = model.init(jax.random.key(0), x)
    >>> pairs = jbn.linen.find_pairs(model.apply, variables, x)
    >>> folded = jbn.linen.fold(variables, pairs)
    >>> print(jax.tree.map(jnp.shape, folded))
    {'params': {'layers_0': {'bias': (4,), 'kernel': (5, 4)}}}
    >>> with jbn.linen.without_norms(pairs):
    ...     y = model.apply(folded, x)
    >>> print(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
    True
    """
    _check_pairs(pairs)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError('variables: expected {"params": ..., "batch_stats": ...}, got no "params" in them.')
    params, stats = (
        flatten_dict(unfreeze(variables.get(name, {})), keep_empty_nodes=True)
        for name in ("params", "batch_stats")
    )
    faults = [
        f"{norm}: expected one layer before it, got several"
        for norm in dict.fromkeys(pairs.values())
        if list(pairs.values()).count(norm) > 1
    ]
    new = {}
    for layer, norm in pairs.items():
        try:
            new |= _fold_pair(params, stats, layer, norm, epsilon)
        except (TypeError, ValueError) as fault:
            faults.append(f"{layer}, {norm}: {fault}")
    if faults:
        raise ValueError("\n".join(faults))
    gone = {(*_keys(norm), name) for norm in pairs.values() for name in _OF_NORM}
    folded = dict(variables)
    for name, flat in (("params", params | new), ("batch_stats", stats)):
        left = unflatten_dict({keys: value for keys, value in flat.items() if keys not in gone})
        folded[name] = freeze(left) if isinstance(variables.get(name), FrozenDict) else left
    if not folded["batch_stats"]:
        del folded["batch_stats"]
    return freeze(folded) if isinstance(variables, FrozenDict) else folded


def _fold_pair(params, stats, layer, norm, epsilon) -> dict[tuple[str, ...], Any]:
    """Return the kernel and the bias of one layer by their paths."""
    at, of_norm = _keys(layer), _keys(norm)
    boxes = params.get((*at, "kernel")), params.get((*at, "bias"))
    kernel, bias = map(nn.meta.unbox, boxes)
    scale, beta = (nn.meta.unbox(params.get((*of_norm, name))) for name in ("scale", "bias"))
    mean, var = (nn.meta.unbox(stats.get((*of_norm, name))) for name in ("mean", "var"))
    missing = [name for name, value in {"kernel": kernel, "mean": mean, "var": var}.items() if value is None]
    if missing:
        raise ValueError(f"expected a layer with a kernel and a norm with mean and var, got no {missing[0]}")
    known = norm.epsilon if isinstance(norm, NormPath) else epsilon
    if known is None:
        raise ValueError("expected epsilon=..., that of the norm, which no variable tells, got none")
    if epsilon not in (None, known):
        raise ValueError(f"expected epsilon={known}, that of the norm, got {epsilon}")
    axis = norm.axis if isinstance(norm, NormPath) else -1
    named = {"kernel": kernel, "bias": bias, "mean": mean, "var": var, "scale": scale, "norm's bias": beta}
    shapes = {name: np.shape(leaf) for name, leaf in named.items() if leaf is not None}
    stacked = max(np.ndim(mean) - 1, 0)
    if len({shape[:stacked] for shape in shapes.values()}) > 1 or np.ndim(kernel) < stacked + 2:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"expected axes that variables are stacked over to be the first of all, got {listed}"
        )
    f = partial(pure.fold, epsilon=known, axis=axis)
    for _ in range(stacked):
        f = jax.vmap(f)
    new = f(kernel, bias, Params(scale, beta), Moments(mean, var, jnp.zeros_like(var)))
    return {
        (*at, "kernel"): _box_like(boxes[0], new[0]),
        (*at, "bias"): _box_bias(boxes, new[1], stacked, axis),
    }


def _keys(path: str) -> tuple[str, ...]:
    return tuple(filter(None, path.split("/")))


def _box_like(old: Any, value: jax.Array) -> Any:
    return old.replace_boxed(value) if isinstance(old, nn.meta.AxisMetadata) else value


def _box_bias(boxes: tuple[Any, Any], value: jax.Array, stacked: int, axis: int) -> Any:
    """Keep the metadata of a bias; give a new one those of the kernel's outputs."""
    kernel, bias = boxes
    if bias is None and isinstance(kernel, nn.Partitioned):
        return kernel.replace(value=value, names=(*kernel.names[:stacked], kernel.names[axis]))
    return _box_like(bias, value)


@contextmanager
def without_norms(pairs: Mapping[str, str]) -> Iterator[None]:
    """Run a model, whoever wrote it, with the variables that `jbn.linen.fold` returns, in this context.

    The norms of `pairs` return what they are given, in the dtype of what they would return, in any mode, and
    the layers before them add their bias though they may have been built without one. Functions that were
    compiled outside are compiled anew inside. To have one that is folded wherever it is called, enter the
    context in it.

    Args:
      pairs: those that the variables were folded with.

    Raises:
      TypeError: `pairs` is no such mapping.
      ValueError: the variables are not folded (in the call of the model).

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen
    >>> model = nn.Sequential([nn.Dense(2, use_bias=False), nn.BatchNorm(use_running_average=True)])
    >>> pairs = {"layers_0": "layers_1"}
    >>> @jax.jit
    ... def predict(folded, x):
    ...     with jbn.linen.without_norms(pairs):
    ...         return model.apply(folded, x)
    >>> folded = {"params": {"layers_0": {"kernel": jnp.eye(2), "bias": jnp.array([1.0, 2.0])}}}
    >>> print(predict(folded, jnp.ones((1, 2))))
    [[2. 3.]]
    """
    _check_pairs(pairs)
    norms = set(pairs.values())

    def interceptor(call, args, kwargs, context):
        module = context.module
        if calls_batch_norm(context) and "/".join(module.path) in norms:
            _require(not module.has_variable("batch_stats", "mean"), module, "no running statistics")
            x = args[0] if args else kwargs["x"]
            affine = [module.param_dtype] if module.use_scale or module.use_bias else []
            return jnp.asarray(x, module.dtype or promote(x, *affine))
        y = call(*args, **kwargs)
        if calls(context, *LAYERS) and "/".join(module.path) in pairs and not module.use_bias:
            _require(module.has_variable("params", "bias"), module, "a bias")
            bias = nn.meta.unbox(module.get_variable("params", "bias"))
            return y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))
        return y

    # Programs that were traced with other pairs are others.
    key = sha256(repr(sorted(pairs.items())).encode()).hexdigest()[:16]
    with intercept(interceptor, f"without_norms {key}"):
        yield


def _check_pairs(pairs: Any) -> None:
    if not isinstance(pairs, Mapping) or not all(isinstance(path, str) for path in [*pairs, *pairs.values()]):
        raise TypeError(f"pairs: expected {{path of the layer: path of its norm}}, got {pairs!r:.80}.")


def _require(holds: bool, module: nn.Module, what: str) -> None:
    if not holds:
        at = f"{what} at '{'/'.join(module.path)}'"
        raise ValueError(f"variables: expected those that fold returns for these pairs, {at}, got others.")
