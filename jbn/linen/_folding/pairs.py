"""Find the norms that the layers before them can absorb, by following a model's values."""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.errors import ModifyScopeVariableError
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from jbn._axes import feature_axes
from jbn._flax import add_note_to
from jbn._tools.paths import named_leaves
from jbn.linen._calls import calls, calls_batch_norm, check_apply, intercept
from jbn.linen._folding.flow import Leaf, Value, follow
from jbn.linen._folding.sites import Site, refusal

LAYERS = nn.Dense, nn.Conv, nn.ConvTranspose
_VARIABLES = (
    ("params", "kernel"),
    ("params", "scale"),
    ("params", "bias"),
    ("batch_stats", "mean"),
    ("batch_stats", "var"),
)
# Options of layers that may do anything with the kernel.
_ARITHMETIC = (
    *("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls"),
    "promote_dtype",
)
TRAINS = "it normalizes by the batch: `apply` has to run the model as for evaluation"
_searches = count()


class NormPath(str):
    """The path of a norm, and what folding it has to know: its epsilon, and the kernel's axis of outputs."""

    epsilon: float
    axis: int

    def __new__(cls, path: str, epsilon: float, axis: int) -> "NormPath":
        self = super().__new__(cls, path)
        self.epsilon, self.axis = epsilon, axis
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # for copies and pickles
        return type(self), (str(self), self.epsilon, self.axis)


def find_pairs(
    apply: Callable[[Any, Any], Any], variables: Any, batch: Any, *, strict: bool = False
) -> dict[str, str]:
    """Find the layers whose outputs go through a batch norm and nowhere else, so that they can absorb it.

    `apply` is traced, not run. The layers are Flax's Dense, Conv and ConvTranspose, the norms Flax's
    BatchNorm and `jbn.linen.BatchNorm` in inference; also in `nn.remat`, `nn.scan`, `nn.vmap` and `jax.jit`,
    and in code that nobody here wrote. A layer may be called several times if what each call puts out goes
    through the same norm.

    A norm is not found where folding could change what the model puts out: something else reads the layer's
    output or the parameters of either; the norm comes before the layer, normalizes by its own batch, over
    another axis than the features, with a mask, or with a scale or bias of the call; the kernel is not used
    as it stands in the variables (`nn.WeightNorm`, subclasses that change it). `strict` says which and why.

    Args:
      apply: runs the model as for evaluation: `lambda variables, x: model.apply(variables, x, train=False)`.
      variables: the model's variables; shapes and dtypes suffice.
      batch: what `apply` takes; likewise.
      strict: raise an error that says of every norm that cannot be folded why.

    Returns:
      {path of the layer: path of its norm}, in the order of the calls, such as {"stem/Conv_0": "stem/norm"}.
      The paths of norms are strings that also know `epsilon` and `axis`, for `jbn.linen.fold`.

    Raises:
      TypeError: `apply` is no function.
      ValueError: `strict`, and a norm cannot be folded.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen
    >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.relu, nn.Dense(2)])
    >>> x = jnp.ones((3, 5))
    >>> variables = model.init(jax.random.key(0), x)
    >>> jbn.linen.find_pairs(model.apply, variables, x)
    {'layers_0': 'layers_1'}
    """
    check_apply(apply)
    pairs, refused = {}, {}
    for norm in _norms(apply, variables, batch):
        if reason := refusal(norm):
            refused[norm.path] = reason
        else:
            layer: Any = norm.sources[0]
            pairs[layer.path] = NormPath(norm.path, norm.epsilon, layer.axis)
    if strict and refused:
        raise ValueError(
            "expected norms that the layer before them can absorb, got others:\n"
            + "\n".join(f"'{path}': {reason}" for path, reason in refused.items())
        )
    return pairs


def _norms(apply: Callable[[Any, Any], Any], variables: Any, batch: Any) -> list[Site]:
    """Trace `apply` with marks where layers put out and norms take in, and at their variables."""
    search = f"find_pairs {next(_searches)}"
    marks: dict[str, Callable[[Value], Value]] = {}
    sites: dict[tuple[bool, str], Site] = {}

    def mark(value, reached):
        name = f"{search} {len(marks)}"
        marks[name] = reached
        return checkpoint_name(value, name)

    def site_of(context, refused, **facts):
        module = context.module
        path = "/".join(module.path)
        site = sites.setdefault((calls_batch_norm(context), path), Site(path, refused, **facts))
        if any(getattr(site, name) != value for name, value in facts.items()):
            refused = f"'{path}' has another {' and '.join(facts)} in another call"
        site.refused = site.refused or refused
        for collection, name in _VARIABLES:
            if module.has_variable(collection, name):
                value = nn.meta.unbox(module.get_variable(collection, name))
                # Where `vmap` maps over another axis than the first, it moves that axis before a reshape.
                view = jax.lax.reshape(value, (1, *value.shape))
                mark(view, partial(site.use, (collection, *module.path, name), value.ndim))
        return site

    def interceptor(call, args, kwargs, context):
        if calls(context, *LAYERS):
            axis = -2 if getattr(context.module, "transpose_kernel", False) else -1
            site = site_of(context, _refuse_layer(context.module), axis=axis)
            return mark(call(*args, **kwargs), site.put_out)
        if calls_batch_norm(context):
            given = _arguments(*args, **kwargs)
            site = site_of(context, _refuse_norm(context.module, **given), epsilon=context.module.epsilon)
            return mark(call(**given | {"x": mark(given["x"], site.take_in)}), site.leave)
        return call(*args, **kwargs)

    with intercept(interceptor, search), add_note_to(ModifyScopeVariableError, TRAINS):
        jaxpr = jax.make_jaxpr(apply)(variables, batch).jaxpr
    inputs = [Leaf(path, np.ndim(leaf)) for path, leaf in named_leaves(variables)[0]]
    follow(jaxpr, inputs + [None] * (len(jaxpr.invars) - len(inputs)), marks)
    return [site for (is_norm, _), site in sites.items() if is_norm]


def _refuse_layer(module: Any) -> str | None:
    if not isinstance(module, LAYERS) or type(module).param is not nn.Module.param:
        return f"{type(module).__name__} before it is not a plain Dense, Conv or ConvTranspose"
    for name in _ARITHMETIC:
        if getattr(module, name, None) not in (None, promote_dtype):
            return f"the layer before it has a {name} of its own"
    return None


def _refuse_norm(module: Any, x: Any, use_running_average: Any = None, **given: Any) -> str | None:
    if type(module).param is not nn.Module.param:
        return f"{type(module).__name__} changes its parameters"
    if use_running_average is None:
        use_running_average = module.use_running_average
    if not (use_running_average is True or getattr(module, "frozen", False)):
        return TRAINS
    if getattr(module, "domains", None) is not None:
        return "it has domains; fold a model without, with one's variables"
    if named := [name for name, value in given.items() if value is not None]:
        return f"its call gives {' and '.join(named)}"
    if feature_axes(x.ndim, module.axis) != (x.ndim - 1,):
        return f"expected its axis to be -1, that of the features, got {module.axis}"
    return None


def _arguments(x: Any, use_running_average: Any = None, **given: Any) -> dict[str, Any]:
    return {"x": x, "use_running_average": use_running_average, **given}
