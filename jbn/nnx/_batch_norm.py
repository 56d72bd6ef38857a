"""The layer."""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

try:
    from flax import nnx
    from flax.errors import TraceContextError
    from flax.nnx.nn.dtypes import promote_dtype as promote_to_one_dtype
    from flax.typing import Dtype, Initializer, PromoteDtypeFn
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flax":  # Flax is there, and lacks something itself
        raise
    raise ImportError('jbn.nnx needs Flax; install it with: pip install "jbn[flax]"') from error

from jbn._axes import Axes, feature_axes, feature_shape
from jbn._checks import as_array, as_shape
from jbn._collectives import AxisName
from jbn._dtypes import arithmetic_dtype, is_narrow
from jbn._flax import (
    add_note_to,
    apply_layer,
    as_inexact,
    as_renorm,
    check_domain,
    check_mode,
    check_options,
    counts,
    counts_updates,
    initial_statistic,
    is_training,
    no_updates,
    promoted_dtype,
    required_statistics,
    resolve_affine_param,
    running_moments,
    shapes_of,
    updates,
)
from jbn._params import Params
from jbn._renorm import Schedule
from jbn._running import UpdateRule
from jbn._spelling import explain_names
from jbn._statistics import cast

NOT_AN_ARGUMENT = (
    "BatchNorm updates its running statistics in training, and JAX returns updates only to arguments of the "
    "transform: write nnx.jit(lambda model, x: model(x))(model, x), not nnx.jit(model)(x), and likewise with "
    "nnx.eval_shape and nnx.vmap. A model merged inside the transform needs nnx.merge(..., copy=True). In "
    "inference, call model.eval() first."
)
ONE_FOR_ALL = (
    "The members of this nnx.vmap share one BatchNorm, but each would make other running statistics of it. "
    'For one batch of all members, give axis_name="batch" to the layer and to nnx.vmap; for one model each, '
    "map the model too. In inference, call model.eval() first."
)


class BatchNorm(nnx.Module):
    """Batch normalization that keeps its parameters and running statistics as NNX variables.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    A shell over `jbn.batch_norm` that takes the place of `flax.nnx.BatchNorm`: the same arguments, defaults
    and variables, so that states move between the two. `scale` and `bias` are `nnx.Param`, `mean` and `var`
    `nnx.BatchStat`, all in the features' shape. In training the moments are the batch's, and the running ones
    are updated in place; in inference they are the running ones.

    It differs from Flax's module (0.12) where `jbn.linen.BatchNorm` differs from its own, and here:

    | case | Flax | here |
    |---|---|---|
    | `dtype=jnp.bfloat16` | `x`, statistics, scale and bias are rounded first | the result is rounded |
    | mask of real weights | refused | weights |
    | several feature axes | in inference only | `num_features` is their shape |
    | complex `x` | the running mean loses its imaginary part | `param_dtype=jnp.complex64`, or an error |

    Pass the layer, or its model, to a transform as an argument, as every NNX layer that updates variables.
    `nnx.eval_shape(model, x)`, `nnx.jit(model)(x)` and `nnx.vmap(model)(x)` close over it, so that JAX cannot
    return the update, which is an error in training. What works:

        nnx.eval_shape(lambda model, x: model(x), model, x)
        nnx.vmap(lambda model, x: model(x), in_axes=(None, 0), axis_name="batch")(model, x)  # one for all
        nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, x)  # each member its own

    In the second, the layers have `axis_name="batch"`, so that all members update with the same moments. If
    a model was made under `nnx.var_defaults(ref=True)`, JAX can update variables of a closure too.

    Args:
      num_features: the number of features, or the shape of the feature axes.
      use_running_average: True in inference, False in training, as `model.eval()` and `model.train()` set it.
      axis: the feature axis or axes; statistics reduce over every other axis.
      momentum: the weight of the old running value, `update=jbn.ema(momentum)`; a number in [0, 1].
        PyTorch's momentum m is 1 - m here.
      epsilon: added to the variance; > 0.
      dtype: the dtype of the result; if None, that of `promote_dtype`: float32 at least. In any case the
        arithmetic and the running statistics are float32 at least.
      param_dtype: the dtype of scale and bias; the running statistics have it where it is wider than float32.
      use_bias, use_scale: learn a bias, a scale.
      bias_init, scale_init: their initializers.
      axis_name: name or names of the axes of `jax.shard_map` or `jax.vmap` that share one batch. Under plain
        `jit`, statistics of a sharded batch are global without it.
      axis_index_groups: a partition of the indices along the named axes; only members of one group share.
      use_fast_variance: `exact=not use_fast_variance` of `jbn.batch_norm`. CPUs and GPUs are exact either
        way; a TPU takes one pass about 0 and the running mean if True, and is always exact if False.
      promote_dtype: like `flax.nnx.nn.dtypes.promote_dtype`; it determines the dtype of the result if `dtype`
        is None, from those of x, mean, var, scale and bias, and converts nothing.
      rngs: keys for the initializers.
      bias_metadata, scale_metadata: metadata of their variables, such as a sharding.
      update: another rule, in place of `momentum`: `jbn.cumulative()`, `jbn.ema(0.9, debias=True)`, or any
        function `(running, batch) -> running`. The layer then has one more `nnx.BatchStat`, the `count` by
        which such rules average. A state of Flax has none, and with a count of 0 the first batch would
        replace its statistics. So pass `initial_count=1` with a debiased rule, which marks them as complete,
        and with other rules the number of batches, or of samples, that they are an average of. `jbn.keep()`
        has no count and updates nothing, so that the model need not be an argument of the transform.
      virtual_batch_size: in training, normalize ceil(N / virtual_batch_size) consecutive parts of the N
        examples each with its own moments (ghost batches); the running statistics are updated by the whole
        batch. Under plain `jit`, N over the number of devices makes statistics local to a device.
      mean_init, var_init: initializers of the running mean and variance; None for 0 and 1.
      initial_count: what the running count starts from.
      frozen: never train: normalize with the running statistics, update nothing, and give the layer's scale
        and bias no gradient. `model.set_attributes(frozen=True)` freezes all layers of a model. An
        optimizer with weight decay, or with momentum from before, moves them all the same:
        docs/weights/fine_tuning.md.
      renorm: batch renormalization (`jbn.batch_renorm`): the limits `(r_max, d_max)`, numbers or traced
        scalars, or a function of the number of updates so far that returns them, such as
        `jbn.renorm_limits()`. With a function, the layer has one more `nnx.BatchStat`, `num_updates`, an
        int32 scalar that counts the calls in training; it starts from 0.
      domains: the number of domains, each with running statistics of its own: those have a leading axis of as
        many, and a call takes `domain=`.
      affine_by_domain: whether scale and bias have that axis as well; otherwise the domains share them.
      blend: in inference, normalize with `jbn.blend(running, batch, prior=blend)`, the running statistics
        blended with those of the batch at hand, for data distributed otherwise than in training; the running
        ones stay. `axis_name` then has an effect in inference too.

    Raises:
      ValueError: `use_running_average` is None here and in the call; scale or bias is both learnt and given;
        or as `jbn.batch_norm` does.
      flax.errors.TraceContextError: the layer was not an argument of the transform around this call.

    Reference: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    >>> import jax.numpy as jnp, jbn.nnx
    >>> from flax import nnx
    >>> layer = jbn.nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> print(layer(x).round(4))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(layer.mean[...], layer.var[...])
    [ 1. 10.] [ 1.  50.5]
    >>> layer.eval()
    >>> print(layer(x).round(4))
    [[0.     0.    ]
     [2.     2.8144]]
    """

    @explain_names
    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: ArrayLike = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        scale_init: Initializer = nnx.initializers.ones_init(),
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_to_one_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        update: UpdateRule | None = None,
        virtual_batch_size: int | None = None,
        mean_init: Initializer | None = None,
        var_init: Initializer | None = None,
        initial_count: float = 0,
        frozen: bool = False,
        renorm: Sequence[ArrayLike] | Schedule | None = None,
        domains: int | None = None,
        affine_by_domain: bool = False,
        blend: ArrayLike | None = None,
    ):
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.update = update
        self.virtual_batch_size = virtual_batch_size
        self.initial_count = initial_count
        self.frozen = frozen
        self.renorm = renorm
        self.domains = domains
        self.affine_by_domain = affine_by_domain
        self.blend = blend
        check_options(self)
        shape, affine_shape = shapes_of(self, as_shape("num_features", num_features))

        def param(initializer, metadata):
            return nnx.Param(initializer(rngs.params(), affine_shape, param_dtype), **metadata)

        def statistic(name, initializer=None):
            kept = arithmetic_dtype(param_dtype)
            return nnx.BatchStat(
                initial_statistic(self, name, shape, kept, initializer, lambda: rngs.params())
            )

        self.scale = param(scale_init, scale_metadata) if use_scale else nnx.data(None)
        self.bias = param(bias_init, bias_metadata) if use_bias else nnx.data(None)
        self.mean = statistic("mean", mean_init)
        self.var = statistic("var", var_init)
        self.count = statistic("count") if counts(update) else nnx.data(None)
        self.num_updates = nnx.BatchStat(no_updates()) if counts_updates(self, True) else nnx.data(None)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep a number as data if it is an array, which has no equality, and as static if it is not."""
        if name == "renorm":
            value = as_renorm(value)  # of lists and arrays, what has a hash
        if name in ("momentum", "initial_count", "renorm", "blend"):
            is_array = any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))
            value = nnx.data(value) if is_array else nnx.static(value)
        super().__setattr__(name, value)

    @explain_names
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        domain: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize `x`, and in training update the running statistics in place.

        Args:
          x: samples, of any shape; integers are converted to float32.
          use_running_average: True in inference, False in training, or a traced Boolean scalar; None for the
            layer's own.
          mask: which positions count in the statistics: Booleans, or real weights >= 0, broadcastable to `x`.
          scale: for conditional normalization, the scale of this call, for a layer with `use_scale=False`: in
            the features' shape, or with all axes of `x` and broadcastable to it.
          bias: likewise, for a layer with `use_bias=False`.
          domain: for a layer with `domains`, the index of each example's, (N,) integers, N being the size of
            the first axis that is not a feature axis; or that of all, ().

        Returns:
          An array of the shape of `x`.
        """
        check_mode(use_running_average)
        check_domain(self, domain)
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average is None; expected False in training or True in inference: in the "
                "constructor, in the call, by model.train() and model.eval(), or by nnx.view."
            )
        train = is_training(self, use_running_average)
        x = as_array(x)
        shape = feature_shape(x, feature_axes(x.ndim, self.axis))
        stats_shape, _ = shapes_of(self, shape)
        if stats_shape != self.mean.shape:
            raise ValueError(
                f"num_features={self.num_features}; expected {shape}, that of the features of x of shape "
                f"{x.shape} on axis={self.axis}: build the layer with num_features={shape}, or another axis."
            )
        params = Params(
            scale=resolve_affine_param(
                self, x, "scale", None if self.scale is None else self.scale[...], scale
            ),
            bias=resolve_affine_param(self, x, "bias", None if self.bias is None else self.bias[...], bias),
        )
        stats = {name: getattr(self, name) for name in required_statistics(self, train)}
        if any(stat is None for stat in stats.values()):
            raise ValueError(
                f"update={self.update} was set later; expected it in the constructor, which makes its count."
            )
        running = running_moments({name: stat[...] for name, stat in stats.items()}, stats_shape)
        dtype = promoted_dtype(self, *self._promoted(x, running.mean, running.var, *params))
        running = cast(running, arithmetic_dtype(running.mean))
        num_updates = self.num_updates if callable(self.renorm) else None
        if num_updates is None and counts_updates(self, train):
            raise ValueError(
                f"renorm={self.renorm} was set later; expected a function in the constructor, or in "
                "jbn.nnx.convert, which make its num_updates."
            )
        y, running = apply_layer(
            self,
            as_inexact(x),
            params,
            running,
            train=train,
            mask=mask,
            dtype=dtype,
            domain=domain,
            num_updates=None if num_updates is None else num_updates[...],
        )
        if updates(self, train):
            self._check_that_members_agree(running.mean)
            with add_note_to(TraceContextError, NOT_AN_ARGUMENT):
                for name, stat in stats.items():
                    value = getattr(running, name)
                    if value.dtype == stat.dtype:
                        stat[...] = value
                    else:  # somebody has cast the whole model
                        stat.set_value(value)
                if num_updates is not None:
                    num_updates[...] += jnp.asarray(train, jnp.int32)
        return y

    def set_view(self, use_running_average: bool | None = None, frozen: bool | None = None) -> None:
        """Set modes, for `nnx.view`.

        Args:
          use_running_average: True in inference, False in training.
          frozen: never train.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if frozen is not None:
            self.frozen = frozen

    def _check_that_members_agree(self, mean: jax.Array) -> None:
        """Raise a ValueError if members of an `nnx.vmap` share this layer, and update it differently."""
        try:
            arguments = nnx.current_update_context("vmap").inner_ref_outer_index
        except ValueError:
            return
        # Only a value of each member's own is traced by the `vmap`, and so of another type.
        if arguments is not None and self in arguments and type(self.mean[...]) is not type(mean):
            raise ValueError(ONE_FOR_ALL)

    def _promoted(self, *values: jax.Array | None) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of what `promote_dtype` returns, without computing anything."""
        values = jax.tree.map(
            lambda v: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16 if is_narrow(v) else v.dtype), values
        )
        with jax.numpy_dtype_promotion("standard"):
            return jax.tree.leaves(jax.eval_shape(partial(self.promote_dtype, dtype=self.dtype), values))
