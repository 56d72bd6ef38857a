"""Other options for the batch norms of a model, whoever made them."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import lru_cache
from typing import Any

import flax.linen as nn

from jbn._spelling import check_option_names
from jbn.linen._batch_norm import BatchNorm
from jbn.linen._calls import calls_batch_norm, intercept, is_batch_norm, path_of

OPTIONS = tuple(field.name for field in fields(BatchNorm) if field.name not in ("parent", "name"))

_options: ContextVar[dict[str, Any] | None] = ContextVar("_options", default=None)
_IS_REPLACEMENT = "_jbn_is_replacement"  # an attribute
_numbers = itertools.count()


@contextmanager
def override(**options: Any) -> Iterator[None]:
    """Give every batch norm that is called in this context these options, whoever made it.

    Layers of `flax.linen.BatchNorm` run as `jbn.linen.BatchNorm` on the same variables, also inside
    `nn.scan`, `nn.vmap`, `nn.remat` and `nn.jit`, in models of packages that know nothing of jbn. Nothing is
    left of it outside: functions that `jax.jit` has compiled are traced anew inside, and again outside.

    An option takes the place of what the layer was made with, and `use_running_average` also of what it is
    called with. Of nested contexts the inner one wins, where both have an option. Other threads are not
    affected.

    Args:
      options: those of `jbn.linen.BatchNorm`, such as `frozen=True`, `update=jbn.ema(0.9, debias=True)`,
        `virtual_batch_size=32`, `use_running_average=True`. With none, layers of Flax only become ours.
        A rule that counts adds `count` to "batch_stats", when that is mutable.

    Raises:
      TypeError: `jbn.linen.BatchNorm` has no such option, or a layer is of a subclass, whose own code would
        not run.

    Freeze the norms of a model while its other layers train:

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen
    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])  # from anywhere
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> variables = model.init(jax.random.key(0), x)
    >>> with jbn.linen.override(frozen=True):
    ...     y, updated = model.apply(variables, x, mutable=["batch_stats"])
    >>> print(updated["batch_stats"]["layers_1"]["mean"])
    [0. 0. 0.]
    """
    check_option_names(options, OPTIONS)
    BatchNorm(**options, parent=None)  # checks their values
    options = (_options.get() or {}) | options
    calls = 0

    def call_ours(call, args, kwargs, context):
        nonlocal calls
        layer = context.module
        is_outer = _options.get() is not options  # and what it says is in the inner one's too
        if is_outer or not will_replace(layer):
            return call(*args, **kwargs)
        if not calls_batch_norm(context):
            # A subclass of Flax's making, as of `nn.remat(nn.BatchNorm)`, calls the layer itself.
            before, y = calls, call(*args, **kwargs)
            if context.method_name == "__call__" and calls == before:
                raise TypeError(_refusal(layer))
            return y
        if type(layer) not in (nn.BatchNorm, BatchNorm):
            raise TypeError(_refusal(layer))
        calls += 1
        own = {field.name: getattr(layer, field.name) for field in fields(layer) if field.name in OPTIONS}
        ours = BatchNorm(**own | options, parent=layer.scope)
        if "use_running_average" in options:
            args, kwargs = args[:1], {k: v for k, v in kwargs.items() if k != "use_running_average"}
        object.__setattr__(ours, _IS_REPLACEMENT, True)
        return ours(*args, **kwargs)

    token = _options.set(options)
    try:
        with intercept(call_ours, _key(options)):
            yield
    finally:
        _options.reset(token)


def will_replace(module: nn.Module) -> bool:
    """Return whether `override` is active and makes another batch norm of this module."""
    return _options.get() is not None and is_batch_norm(module) and not hasattr(module, _IS_REPLACEMENT)


def _key(options: dict[str, Any]) -> str:
    """Name options so that equal ones have equal names; what has no hash equals only itself."""
    try:
        return _name(frozenset(options.items()))
    except TypeError:
        return f"override {next(_numbers)}"


@lru_cache(maxsize=256)  # or options that hold arrays would be kept for ever
def _name(_: frozenset) -> str:
    return f"override {next(_numbers)}"


def _refusal(layer: nn.Module) -> str:
    return (
        f"'{path_of(layer)}' is a {type(layer).__name__}; expected flax.linen.BatchNorm or "
        "jbn.linen.BatchNorm itself, since the code of a subclass would not run: give it the options where "
        "it is made."
    )
