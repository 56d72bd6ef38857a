"""Run a Linen model and measure what its batch norms are called with, inside lifted transforms too."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.core
from flax.core import Scope, meta, tracers, unfreeze
from flax.core.scope import union_filters
from flax.traverse_util import flatten_dict, unflatten_dict

from jbn._pooling import Measured, add, add_measured, input_moments, no_samples, options_of
from jbn.linen._calls import calls_batch_norm, intercept, path_of

Apply = Callable[[Any, Any], Any]

# The variable beside a layer's mean and var that holds the moments of its inputs. It is in their collection,
# because that is the one that every lifted transform around a batch norm passes on.
INPUTS = "inputs"


def measure(apply: Apply, variables: Any, batch: Any, *, by_batch: bool) -> tuple[Any, Measured]:
    """Run a model as for evaluation; return its outputs, and what its batch norms were called with.

    Args:
      by_batch: normalize with the moments of the inputs themselves, as in training, and not with the running.

    Raises:
      ValueError: no batch norm was called with these variables, or one in training mode, or one that a
        transform hides.
    """
    while isinstance(apply, jax.stages.Wrapped):  # jitted, which would hide what is inside
        apply = apply.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return _Measurement(variables, by_batch).run(apply, batch)
    except _InsideTransform:
        with jax.disable_jit():
            return _Measurement(variables, by_batch).run(apply, batch)


def layer_paths(variables: Any) -> list[tuple[str, ...]]:
    """Return the paths of all layers that have a running mean and variance."""
    flat = flatten_dict(unfreeze(variables.get("batch_stats", {})))
    return [path[:-1] for path in flat if path[-1] == "mean" and (*path[:-1], "var") in flat]


class _InsideTransform(ValueError):
    pass


class _Measurement:
    """One run of a model, or of several models that share the variables."""

    def __init__(self, variables: Any, by_batch: bool):
        stats = flatten_dict(unfreeze(variables["batch_stats"]))
        starts = {path: no_samples(meta.unbox(stats[*path, "mean"])) for path in layer_paths(variables)}
        stats |= {(*path, INPUTS): start for path, start in starts.items()}
        self.variables = {**variables, "batch_stats": unflatten_dict(stats)}
        self.by_batch = by_batch
        # A model may be given a part of the variables: the arrays tell which layer is which.
        self.paths = {id(start.count): path for path, start in starts.items()}
        self.trace = tracers.current_trace()
        self.depth = 0
        self.runs: list[tuple[Scope, dict, dict]] = []  # root, paths and options by the path in this root

    def run(self, apply: Apply, batch: Any) -> tuple[Any, Measured]:
        """Call `apply`."""
        with intercept(self._intercept, f"measure by_batch={self.by_batch}"):
            outputs = apply(self.variables, batch)
        measured = None
        for root, paths, options in self.runs:
            stats: Any = flatten_dict(unfreeze(cast(dict, root.variables()["batch_stats"])))
            inputs = {"/".join(paths[path]): stats[*path, INPUTS] for path in options}
            named = tuple(("/".join(paths[path]), option) for path, option in options.items())
            measured = add_measured(measured, Measured(inputs, named))
        if measured is None or not measured.inputs:
            raise ValueError(
                "apply called no flax.linen.BatchNorm or jbn.linen.BatchNorm with the variables that "
                "it was given; expected lambda variables, x: model.apply(variables, x, train=False), or likewise."
            )
        return outputs, measured

    def _intercept(self, call, args, kwargs, context):
        scope = context.module.scope
        if self.depth == 0 and scope is not None:
            self._open(scope.root)
        self.depth += 1
        try:
            if scope is not None and calls_batch_norm(context) and scope.has_variable("batch_stats", INPUTS):
                return self._call_layer(call, args, kwargs, context.module)
            return call(*args, **kwargs)
        finally:
            self.depth -= 1

    def _open(self, root: Scope) -> None:
        """Make the statistics of a model mutable, which `apply` has not done."""
        if any(root is one for one, _, _ in self.runs):
            return
        if root.trace_level != self.trace:
            raise _InsideTransform(
                "apply runs the model inside a transform of JAX, such as jax.vmap; expected it without."
            )
        stats: Any = flatten_dict(unfreeze(cast(dict, root.variables().get("batch_stats", {}))))
        root.mutable = union_filters(root.mutable, "batch_stats")
        root._variables["batch_stats"] = unflatten_dict(stats)
        paths = {
            path[:-1]: self.paths.get(id(leaf.count), path[:-1])
            for path, leaf in stats.items()
            if path[-1] == INPUTS
        }
        self.runs.append((root, paths, {}))

    def _call_layer(self, call, args, kwargs, layer):
        _check_evaluation(layer, *args, **kwargs)
        scope = layer.scope
        _inherit_mutability(scope, self.runs[-1][0])
        if not scope.is_mutable_collection("batch_stats"):
            raise ValueError(
                f"'{path_of(layer)}' is in a transform that broadcasts its statistics, so that none can be "
                "collected; expected variable_axes or variable_carry for 'batch_stats'."
            )
        _, _, options = self.runs[-1]
        options[scope.path] = options_of(layer)
        found = input_moments(layer, args[0] if args else kwargs["x"], kwargs.get("mask"))
        old = {name: scope.get_variable("batch_stats", name) for name in ("mean", "var")}
        if self.by_batch:
            for name in old:
                scope.put_variable("batch_stats", name, getattr(found, name))
        y = call(*args, **kwargs)
        new = old | {INPUTS: add(scope.get_variable("batch_stats", INPUTS), found)}
        for name, value in new.items():
            scope.put_variable("batch_stats", name, value)
        return y


def _inherit_mutability(scope: Scope, root: Scope) -> None:
    """Make a scope mutable as its root is by now: those of submodules from `setup` are older."""
    at: Scope | None = scope if scope.root is root else None
    while at is not None:
        at.mutable, at = union_filters(at.mutable, "batch_stats"), at.parent


def _check_evaluation(layer: Any, x: Any = None, use_running_average: Any = None, **_: Any) -> None:
    mode = layer.use_running_average if use_running_average is None else use_running_average
    if getattr(layer, "frozen", False) or mode is None or (not isinstance(mode, jax.core.Tracer) and mode):
        return
    raise ValueError(
        f"'{path_of(layer)}' has use_running_average={mode}, as in training; expected an apply that runs the "
        "model as for evaluation, such as lambda variables, x: model.apply(variables, x, train=False)."
    )
