"""How much the training of earlier layers changes the gradient of a later one: internal covariate shift."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbn._dtypes import arithmetic_dtype
from jbn.inspection._vectors import as_vector, cosine, norm, subtract


class GradientShift(NamedTuple):
    """How the gradient of each layer changes when the layers before it make their step."""

    distance: jax.Array  # (layers,), >= 0: ||G - G'||
    cosine: jax.Array  # (layers,), from -1 to 1: of the angle between G and G'; 1 means no shift


def gradient_shift(
    loss: Callable[[tuple], jax.Array], before: Sequence[Any], after: Sequence[Any]
) -> GradientShift:
    """Measure internal covariate shift as the change of each layer's gradient between two steps.

        G_i  = d loss(before_0, ..., before_n) / d layer_i
        G'_i = d loss(after_0, ..., after_{i-1}, before_i, ..., before_n) / d layer_i
        distance_i = ||G_i - G'_i||;  cosine_i = <G_i, G'_i> / (||G_i|| ||G'_i||)

    Layer i is updated by G_i. But the layers before it are updated at the same time, after which its gradient
    is G'_i. Distance 0 and cosine 1 mean that this made no difference, as is always so for the first layer.

    Args:
      loss: a function of a tuple of layers to a real scalar, such as the training loss of one batch.
      before: the layers, in the order of the network: each any pytree of real floating point arrays.
        `jbn.inspection.split_layers` makes them from a model's parameters.
      after: the same layers after the training step, or after any other change.

    Returns:
      GradientShift, in float32, or in the widest dtype of a layer where that is wider. Where both gradients
      are the same, both 0 too, the cosine is 1; where one of the two is 0 it is 0.

    Raises:
      TypeError: a leaf is complex, or an integer array; or `loss` is not real and scalar.
      ValueError: there are no layers, a layer has no leaves, or `before` and `after` differ in structure,
        shapes or dtypes.

    Reference: Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?", section 2.2,
    definition 2.1.

    >>> import jax.numpy as jnp
    >>> from jbn import inspection
    >>> loss = lambda layers: layers[0] * layers[1]  # the gradients are the other layer
    >>> before, after = (jnp.array(2.0), jnp.array(3.0)), (jnp.array(1.5), jnp.array(2.5))
    >>> shift = inspection.gradient_shift(loss, before, after)
    >>> print(shift.distance, shift.cosine)
    [0.  0.5] [1. 1.]
    """
    before, after = (
        tuple(as_vector(f"{name}[{i}]", layer) for i, layer in enumerate(layers))
        for name, layers in (("before", before), ("after", after))
    )
    _check_layers(before, after)
    wide = arithmetic_dtype(*jax.tree.leaves(before))

    def visit(gradients, i):
        def mix(j):
            return jax.tree.map(lambda new, old: jnp.where(j < i, new, old), after[j], before[j])

        mixed = jax.grad(loss)(tuple(map(mix, range(len(before)))))
        gradients = jax.tree.map(lambda new, old: jnp.where(i == 0, new, old), mixed, gradients)
        pairs = list(zip(gradients, mixed))
        distance = jnp.stack([norm(subtract(a, b)).astype(wide) for a, b in pairs])
        angle = jnp.stack([cosine(a, b).astype(wide) for a, b in pairs])
        return gradients, (distance[i], jnp.where(distance[i] == 0, 1, angle[i]))

    # Iteration 0 is at `before` itself, so that the program contains the loss once, whatever the depth.
    start = jax.tree.map(jnp.zeros_like, before)
    _, shift = jax.lax.scan(visit, start, jnp.arange(len(before)))
    return GradientShift(*shift)


def _check_layers(before: tuple, after: tuple) -> None:
    if not before:
        raise ValueError("before has no layers; expected one or more.")
    ours, theirs = jax.tree.structure(before), jax.tree.structure(after)
    if ours != theirs:
        raise ValueError(f"after has structure {theirs}; expected that of before, {ours}.")
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after))
    for (path, old), new in pairs:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"after{jax.tree_util.keystr(path)} has shape {new.shape} and dtype {new.dtype}; "
                f"expected those of before, {old.shape} and {old.dtype}."
            )
