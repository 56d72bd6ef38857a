"""How a loss and its gradient change along the gradient: how far the gradient predicts the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn._dtypes import arithmetic_dtype
from jbn.inspection._vectors import as_vector, norm, subtract


class Landscape(NamedTuple):
    """A loss at some parameters, and at points along its gradient there.

    Results of many training steps, stacked along first axes, have `loss_range` and `smoothness` of each.
    """

    loss: jax.Array  # (), at the parameters
    gradient_norm: jax.Array  # (), >= 0: ||g||, over all parameters
    losses: jax.Array  # (k,), at each point
    gradient_changes: jax.Array  # (k,), >= 0: ||grad(point) - g||
    distances: jax.Array  # (k,), >= 0: |step_size| * ||g||, from the parameters to each point

    @property
    def loss_range(self) -> jax.Array:
        """The largest loss minus the smallest, over the points and the parameters themselves: ()."""
        visited = jnp.concatenate([self.loss[..., None], self.losses], axis=-1)
        return jnp.max(visited, -1) - jnp.min(visited, -1)

    @property
    def smoothness(self) -> jax.Array:
        """The "effective" beta-smoothness, the largest change of the gradient over the distance: ().

        Small means that the gradient stays valid over a long step. It is 0 if the gradient is 0.
        """
        apart = self.distances != 0
        ratios = jnp.where(apart, self.gradient_changes / jnp.where(apart, self.distances, 1), 0)
        return jnp.max(ratios, -1, initial=0)


def along_gradient(loss: Callable[[Any], jax.Array], params: Any, step_sizes: ArrayLike) -> Landscape:
    """Step from `params` against the gradient, and measure loss and gradient at each step size.

        g               = grad(loss)(params)
        point           = params - step_size * g
        losses          = loss(point)
        gradient_change = ||grad(loss)(point) - g||
        distance        = |step_size| * ||g||

    Every point starts from `params`. Step sizes around the learning rate show what the paper's figure 4
    shows: `loss_range` is its (a), `gradient_changes` its (b), and `smoothness` its (c).

    Args:
      loss: a function of the parameters alone, such as the training loss of one batch, to a real scalar.
      params: any pytree of real floating point arrays.
      step_sizes: (k,), real.

    Returns:
      Landscape, in float32, or in the widest dtype of `params` where that is wider. `loss` gets each
      parameter in its own dtype, to which the points are rounded. Values that are not finite stay so.

    Raises:
      TypeError: a leaf of `params` is complex, or an integer array; or `loss` is not real and scalar.
      ValueError: `step_sizes` does not have one axis, or `params` has no leaves.

    Reference: Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?", section 3.1 and
    figure 4.

    >>> import jax.numpy as jnp
    >>> from jbn import inspection
    >>> walk = inspection.along_gradient(lambda w: 2 * jnp.sum(w**2), jnp.array([3.0, 4.0]), (0.125, 0.25))
    >>> print(walk.loss, walk.gradient_norm.round(4), walk.losses)
    50.0 20.0 [12.5  0. ]
    >>> print(walk.distances.round(4), walk.gradient_changes.round(4))
    [2.5 5. ] [10. 20.]
    >>> print(walk.loss_range, walk.smoothness.round(4))  # the second derivative is 4
    50.0 4.0
    """
    params = as_vector("params", params)
    wide = arithmetic_dtype(*jax.tree.leaves(params))
    step_sizes = jnp.asarray(step_sizes, wide)
    if step_sizes.ndim != 1:
        raise ValueError(f"step_sizes has shape {step_sizes.shape}; expected one axis, as in (0.1, 0.2).")

    def visit(gradient, step):
        first, step_size = step

        def move(p, g):
            return (p.astype(wide) - step_size * g.astype(wide)).astype(p.dtype)

        value, here = jax.value_and_grad(loss)(jax.tree.map(move, params, gradient))
        gradient = jax.tree.map(lambda new, old: jnp.where(first, new, old), here, gradient)
        return gradient, (value.astype(wide), norm(subtract(here, gradient)))

    # Iteration 0, with step size 0, is at `params` itself, so that the program contains the loss once.
    steps = jnp.arange(step_sizes.size + 1) == 0, jnp.pad(step_sizes, (1, 0))
    gradient, (losses, changes) = jax.lax.scan(visit, jax.tree.map(jnp.zeros_like, params), steps)
    length = norm(gradient)
    return Landscape(losses[0], length, losses[1:], changes[1:], jnp.abs(step_sizes) * length)
