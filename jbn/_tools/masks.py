"""Which of a model's parameters are those of its norms. Nothing here imports Flax."""

from typing import Any

import jax

from jbn._tools.paths import Path, named_leaves

_AFFINE, _RUNNING = {"scale", "bias"}, {"mean", "var"}


def batch_norm_mask(params: Any) -> Any:
    """Tell the scales and biases of norms from other parameters, for optax.

    A norm is known by what its parameters are: a module whose only parameters are called `scale` and `bias`,
    or one of the two. So it holds for BatchNorm, LayerNorm, GroupNorm, RMSNorm and InstanceNorm, Flax's and
    jbn's, whatever they are called and of any rank, stacked by `nn.scan` too; not for the bias of a Dense
    layer, a layer that is called "scale", or one with a scale beside its kernel. (A module of your own that
    has nothing but a `scale` or a `bias` looks like a norm, and is taken for one.)

    Weight decay for all but the norms, and gradients for norms alone:

        optax.adamw(1e-3, mask=lambda p: jax.tree.map(operator.not_, jbn.linen.batch_norm_mask(p)))
        optax.masked(optax.sgd(1e-3), jbn.linen.batch_norm_mask)

    Note that `optax.masked` passes the other gradients on as they are.

    Args:
      params: `variables["params"]`, `nnx.state(model, nnx.Param)`, or `jbn.Params`; in boxes of metadata or
        without.

    Returns:
      Booleans in the structure of `params`: True for the scale and the bias of a norm.

    Raises:
      ValueError: there are running statistics beside them, as in `variables`.

    >>> import jax.numpy as jnp, jbn.linen
    >>> dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    >>> norm = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
    >>> jbn.linen.batch_norm_mask({"Dense_0": dense, "BatchNorm_0": norm})
    {'BatchNorm_0': {'bias': True, 'scale': True}, 'Dense_0': {'bias': False, 'kernel': False}}
    """
    leaves, structure = named_leaves(params)
    # With those that optax has masked, or that are None: a bias beside them is not alone.
    paths = {path for path, _ in named_leaves(params, is_leaf=_is_empty)[0]}
    children: dict[Path, set[str]] = {}
    for path in paths:
        for depth, name in enumerate(path):
            children.setdefault(path[:depth], set()).add(name)
    for module, names in children.items():
        if names >= _RUNNING and (names & _AFFINE or module[:1] == ("batch_stats",)):
            raise ValueError(
                f"params has the running statistics of '{'/'.join(module)}'; expected parameters alone: pass "
                'variables["params"], or nnx.state(model, nnx.Param).'
            )

    def is_of_norm(path):
        module = path[:-1]
        return children[module] <= _AFFINE and all((*module, name) in paths for name in children[module])

    return jax.tree.unflatten(structure, [bool(path) and is_of_norm(path) for path, _ in leaves])


def _is_empty(node: Any) -> bool:
    return node is None or (isinstance(node, tuple) and not node)
