"""See and change the calls of a Linen model's layers, whoever wrote it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
from flax.linen.module import InterceptorContext
from jax.experimental.xla_metadata import set_xla_metadata

from jbn.linen._batch_norm import BatchNorm

Interceptor = Callable[[Callable[..., Any], tuple, dict[str, Any], InterceptorContext], Any]

_keys: ContextVar[tuple[str, ...]] = ContextVar("keys", default=())  # of the contexts that are entered


@contextmanager
def intercept(interceptor: Interceptor, key: str) -> Iterator[None]:
    """Intercept the method calls of all Linen modules in this context, as `nn.intercept_methods`.

    Functions that were compiled outside are traced anew inside, and what is compiled inside is not used
    outside, because JAX keeps compiled functions by the metadata of XLA that are set.

    Args:
      interceptor: called with the next function, its args and kwargs, and the context.
      key: what the interceptor does: calls in contexts of equal keys share compiled functions.
    """
    entered = _keys.set((*_keys.get(), key))
    try:
        with set_xla_metadata(jbn=", ".join(_keys.get())), nn.intercept_methods(interceptor):
            yield
    finally:
        _keys.reset(entered)


def check_apply(apply: Any) -> None:
    """Raise a TypeError unless `apply` is a function, and not the model or its variables."""
    if isinstance(apply, nn.Module) or not callable(apply):
        raise TypeError(
            f"apply is a {type(apply).__name__}; expected a function that runs the model, such as "
            "lambda variables, x: model.apply(variables, x, train=False)."
        )


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is Flax's BatchNorm or ours, or of a subclass."""
    return isinstance(module, (nn.BatchNorm, BatchNorm))


def calls(context: InterceptorContext, *layers: type[nn.Module]) -> bool:
    """Return whether what is called is the `__call__` of one of these classes, also from a subclass."""
    method = getattr(context.orig_method, "func", None)
    return any(method is getattr(layer.__call__, "__wrapped__", None) for layer in layers)


def calls_batch_norm(context: InterceptorContext) -> bool:
    """Return whether what is called is the method of Flax's BatchNorm or ours, also from a subclass."""
    return calls(context, nn.BatchNorm, BatchNorm)


def path_of(module: nn.Module) -> str:
    """Return the path of a module's variables, which in lifted transforms that of the module may not be."""
    assert module.scope is not None
    return "/".join(module.scope.path)
