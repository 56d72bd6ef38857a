"""The layer."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

try:
    import flax.linen as nn
    from flax.errors import ModifyScopeVariableError, ScopeVariableNotFoundError
    from flax.typing import Dtype, Initializer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flax":  # Flax is there, and lacks something itself
        raise
    raise ImportError('jbn.linen needs Flax; install it with: pip install "jbn[flax]"') from error

from jbn._axes import Axes, feature_axes, feature_shape
from jbn._batch_norm import batch_norm
from jbn._checks import as_array, check_shape
from jbn._collectives import AxisName
from jbn._dtypes import arithmetic_dtype
from jbn._flax import (
    add_note_to,
    apply_layer,
    as_inexact,
    as_renorm,
    check_domain,
    check_mode,
    check_options,
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
from jbn._functional import normalize
from jbn._params import Params
from jbn._renorm import Schedule
from jbn._running import UpdateRule
from jbn._spelling import explain_names
from jbn._statistics import cast, moments

IMMUTABLE = (
    'BatchNorm updates its running statistics in training: pass mutable=["batch_stats"] to apply, which then '
    'returns (y, updated), and keep updated["batch_stats"]. In inference, pass use_running_average=True.'
)


class BatchNorm(nn.Module):
    """Batch normalization with its parameters and running statistics in Flax collections.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    A shell over `jbn.batch_norm` that takes the place of `flax.linen.BatchNorm`: the same arguments, defaults
    and variables, so that checkpoints move between the two. `scale` and `bias` are in the collection
    "params", `mean` and `var` in "batch_stats", all in the features' shape. In training the moments are the
    batch's, and "batch_stats" must be mutable; `init` does not update the running moments. In inference they
    are the running ones.

    Where it differs from Flax's module (0.12), and why:

    | case | Flax | here |
    |---|---|---|
    | mean far larger than the sd | E[x^2] - E[x]^2 cancels: wrong, or 0 | exact (TPU: `use_fast_variance`) |
    | `mask` with `axis_name` | averages of averages; NaN if a device has no row | merged by count |
    | a mask that is not Boolean | weights other than 0 act as 1 | real weights |
    | NaN or inf in a batch | running statistics stay NaN | those of that feature are kept |
    | NaN where the mask is 0 | every gradient is NaN | values and gradients are exact |
    | all rows of a batch masked | running statistics are NaN | they are kept |
    | one value per feature in training | outputs the bias | outputs the bias, and warns |
    | `force_float32_reductions=False` | a running bfloat16 variance gets stuck | float32 at least |
    | gradient through running statistics | flows | none: they are constants |
    | complex or float64 `x` | running statistics change dtype after `init` | they have it from the start |
    | `axis_index_groups` in `vmap` or a checked `shard_map` | refused | allowed |
    | returned by `jax.vjp` for the gradient, bfloat16 `x` | 8 bytes an element | 2 |

    Attributes:
      use_running_average: True in inference, False in training; here or in the call.
      axis: the feature axis or axes; statistics reduce over every other axis.
      momentum: the weight of the old running value, `update=jbn.ema(momentum)`; a number in [0, 1], or a
        traced scalar. PyTorch's momentum m is 1 - m here.
      epsilon: added to the variance; > 0.
      dtype: the dtype of the result; if None, what `x`, scale and bias promote to. In any case the arithmetic
        and the running statistics are float32 at least.
      param_dtype: the dtype of scale and bias.
      use_bias, use_scale: learn a bias, a scale.
      bias_init, scale_init: their initializers.
      axis_name: name or names of the axes of `jax.shard_map` or `jax.vmap` that share one batch; not used in
        `init`. Under plain `jit`, statistics of a sharded batch are global without it.
      axis_index_groups: a partition of the indices along the named axes; only members of one group share.
      use_fast_variance: `exact=not use_fast_variance` of `jbn.batch_norm`. CPUs and GPUs are exact either
        way; a TPU takes one pass about 0 and the running mean if True, and is always exact if False.
      force_float32_reductions: statistics are always float32 at least, and narrower ones of a checkpoint
        are widened at the first step. False creates the running ones in `param_dtype` if that is wider.
      update: another rule for the running statistics, in place of `momentum`: `jbn.cumulative()`,
        `jbn.ema(0.9, debias=True)`, or any function `(running, batch) -> running`. The layer then has one
        more variable in "batch_stats", the `count` by which such rules average. A checkpoint of Flax has
        none, and with a count of 0 the first batch would replace its statistics. So pass `initial_count=1`
        with a debiased rule, which marks them as complete, and with other rules the number of batches, or of
        samples, that they are an average of. `jbn.keep()` has no count and updates nothing, so that
        "batch_stats" need not be mutable.
      virtual_batch_size: in training, normalize ceil(N / virtual_batch_size) consecutive parts of the N
        examples each with its own moments (ghost batches); the running statistics are updated by the whole
        batch. Under plain `jit`, N over the number of devices makes statistics local to a device.
      mean_init, var_init: initializers of the running mean and variance; None for 0 and 1.
      initial_count: what the running count starts from.
      frozen: never train: normalize with the running statistics, update nothing, and give the layer's scale
        and bias no gradient, whatever `use_running_average` is. An optimizer with weight decay, or with
        momentum from before, moves them all the same: docs/weights/fine_tuning.md.
      renorm: batch renormalization (`jbn.batch_renorm`): the limits `(r_max, d_max)`, numbers or traced
        scalars, or a function of the number of updates so far that returns them, such as
        `jbn.renorm_limits()`. With a function, "batch_stats" has one more variable, `num_updates`, an int32
        scalar that counts the calls in training; it starts from 0, also with a checkpoint of Flax.
      domains: the number of domains, each with running statistics of its own: those have a leading axis of as
        many, and a call takes `domain=`.
      affine_by_domain: whether scale and bias have that axis as well; otherwise the domains share them.
      blend: in inference, normalize with `jbn.blend(running, batch, prior=blend)`, the running statistics
        blended with those of the batch at hand, for data distributed otherwise than in training; the running
        ones stay. `axis_name` then has an effect in inference too.

    Raises:
      ValueError: `use_running_average` is missing or given twice; scale or bias is both learnt and given; or
        as `jbn.batch_norm` does.
      flax.errors.ModifyScopeVariableError: in training, "batch_stats" is not mutable.

    Reference: Ioffe & Szegedy 2015, Algorithms 1 and 2.

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
    >>> y = layer.apply(variables | updated, x, use_running_average=True)
    >>> print(y.round(4))
    [[0.     0.    ]
     [2.     2.8144]]
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
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    _: KW_ONLY
    update: UpdateRule | None = None
    virtual_batch_size: int | None = None
    mean_init: Initializer | None = None
    var_init: Initializer | None = None
    initial_count: float = 0
    frozen: bool = False
    renorm: Sequence[ArrayLike] | Schedule | None = None
    domains: int | None = None
    affine_by_domain: bool = False
    blend: ArrayLike | None = None

    def __post_init__(self):
        check_options(self)
        self.renorm = as_renorm(self.renorm)  # of lists and arrays, what has a hash
        super().__post_init__()

    @explain_names
    @nn.compact
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
        """Normalize `x`, and in training update the running statistics in "batch_stats".

        Args:
          x: samples, of any shape; integers are converted to float32.
          use_running_average: True in inference, False in training; here or in the constructor. It may be a
            traced Boolean scalar; "batch_stats" must then be mutable.
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
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        train, initializing = is_training(self, use_running_average), self.is_initializing()
        x = as_array(x)
        shape, affine_shape = shapes_of(self, feature_shape(x, feature_axes(x.ndim, self.axis)))
        kept = arithmetic_dtype(x, jnp.float32 if self.force_float32_reductions else self.param_dtype)

        def param(name, initializer):
            return self.param(name, initializer, affine_shape, self.param_dtype)

        def statistic(name):
            initializer = {"mean": self.mean_init, "var": self.var_init}.get(name)
            make = lambda: initial_statistic(
                self, name, shape, kept, initializer, partial(self.make_rng, "params")
            )
            return variable(name, make)

        def variable(name, make):
            with nullcontext() if train is False else add_note_to(ScopeVariableNotFoundError, IMMUTABLE):
                return self.variable("batch_stats", name, make)

        learnt_scale = param("scale", self.scale_init) if self.use_scale else None
        learnt_bias = param("bias", self.bias_init) if self.use_bias else None
        params = Params(
            scale=resolve_affine_param(self, x, "scale", learnt_scale, scale),
            bias=resolve_affine_param(self, x, "bias", learnt_bias, bias),
        )
        needed = required_statistics(self, initializing or train)
        known = initializing or self.has_variable("batch_stats", "mean")
        if train is True and not (updates(self, train) or known):
            needed = ()  # `jbn.keep` in training
        stats = {name: statistic(name) for name in needed}
        num_updates, has_updates = None, self.has_variable("batch_stats", "num_updates")
        if counts_updates(self, initializing or train) or (callable(self.renorm) and has_updates):
            num_updates = variable("num_updates", no_updates)
        dtype = promoted_dtype(self, x, *jax.tree.leaves(params))
        x = as_inexact(x)
        running = running_moments({name: stat.value for name, stat in stats.items()}, shape)
        check_shape(
            x,
            feature_axes(x.ndim, self.axis),
            '"batch_stats"',
            running.mean,
            "pass those of this layer",
            may_broadcast=False,
            domains=self.domains,
        )
        if initializing:
            # `init` updates nothing, has no axis bound, and does not warn of small batches.
            options = dict(axis=self.axis, epsilon=self.epsilon, dtype=dtype)
            if train is not False and self.domains is None:
                return normalize(x, moments(x, axis=self.axis, mask=mask), params, **options)
            return batch_norm(x, params, running, train=False, mask=mask, domain=domain, **options)[0]
        running = cast(running, arithmetic_dtype(x, running.mean))
        y, running = apply_layer(
            self,
            x,
            params,
            running,
            train=train,
            mask=mask,
            dtype=dtype,
            domain=domain,
            num_updates=None if num_updates is None else num_updates.value,
        )
        if updates(self, train):
            with add_note_to(ModifyScopeVariableError, IMMUTABLE):
                for name, stat in stats.items():
                    stat.value = getattr(running, name)
                if num_updates is not None:
                    num_updates.value += jnp.asarray(train, jnp.int32)
        return y


BatchNorm.__init__ = explain_names(BatchNorm.__init__)
