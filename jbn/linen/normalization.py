"""Batch normalization as a Flax Linen module."""

from collections.abc import Sequence
from dataclasses import KW_ONLY
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jbn.axes import Axes, feature_axes
from jbn.collectives import AxisName
from jbn.dtypes import arithmetic_dtype, promote
from jbn.functional import batch_norm, init, normalize
from jbn.normalization import Params
from jbn.running import UpdateRule, ema
from jbn.statistics import moments


class BatchNorm(nn.Module):
    """Batch normalization with its parameters and running statistics in Flax collections.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    A shell over `jbn.batch_norm`, with defaults and variables as in `flax.linen.BatchNorm`:
    `scale` and `bias` in the collection "params", `mean` and `var` in "batch_stats", all in the features'
    shape. In training the moments are the batch's, and "batch_stats" must be mutable; `init` leaves the
    running moments as they start. In inference they are the running ones.

    Attributes:
      use_running_average: True in inference, False in training; here or in the call.
      axis: the feature axis or axes; statistics reduce over every other axis.
      momentum: the weight of the old running value, `update=jbn.ema(momentum)`. PyTorch's momentum m is
        1 - m here.
      epsilon: added to the variance; > 0.
      dtype: the result's dtype; if None, what `x`, scale and bias promote to. The arithmetic and the running
        moments are float32 at least.
      param_dtype: the dtype of scale and bias.
      use_bias: learn a bias.
      use_scale: learn a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name or names of the mapped axes that share one batch; not used in `init`.
      axis_index_groups: a partition of the indices along the named axes; only members of one group share.
      update: another rule for the running moments, in place of `momentum`: `jbn.cumulative()`,
        `jbn.ema(0.9, debias=True)`, or any function `(running, batch) -> running`. A further variable `count`
        then stands in "batch_stats", which is what such rules average by.
      virtual_batch_size: in training, normalize ceil(N / virtual_batch_size) parts of the N examples each
        with its own moments, as `jbn.batch_norm` tells.

    Raises:
      ValueError: `use_running_average` is missing, or given twice; and what `jbn.batch_norm` raises.

    >>> import jax, jax.numpy as jnp, jbn.linen
    >>> layer = jbn.linen.BatchNorm(momentum=0.5)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> print(y.round(4))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(updated["batch_stats"]["mean"], updated["batch_stats"]["var"])
    [ 1. 10.] [ 1.  50.5]
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: ArrayLike = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    _: KW_ONLY
    update: UpdateRule | None = None
    virtual_batch_size: int | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
          x: samples, of any shape; floating point or complex.
          use_running_average: True in inference, False in training; here or in the constructor.
          mask: which positions count in the statistics: Booleans, or real weights >= 0, broadcastable to `x`.

        Returns:
          An array of the shape of `x`.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = jnp.asarray(x)
        shape = tuple(x.shape[a] for a in feature_axes(x.ndim, self.axis))
        _, initial = init(shape, dtype=arithmetic_dtype(x) if jnp.iscomplexobj(x) else jnp.float32)
        names = initial._fields if self.update else ("mean", "var")
        stats = {name: self.variable("batch_stats", name, partial(getattr, initial, name)) for name in names}
        params = Params(
            scale=self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None,
            bias=self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None,
        )
        dtype = self.dtype or promote(x, *jax.tree.leaves(params))
        if self.is_initializing() and not use_running_average:
            # `init` updates nothing, has no axis bound, and warns of no small batch: its input is an example.
            batch = moments(x, axis=self.axis, mask=mask)
            return normalize(x, batch, params, axis=self.axis, epsilon=self.epsilon, dtype=dtype)
        y, running = batch_norm(
            x,
            params,
            initial._replace(**{name: stat.value for name, stat in stats.items()}),
            train=not use_running_average,
            axis=self.axis,
            epsilon=self.epsilon,
            update=self.update or ema(self.momentum),
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            dtype=dtype,
        )
        if not use_running_average:
            for name, stat in stats.items():
                stat.value = getattr(running, name)
        return y
