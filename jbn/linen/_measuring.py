"""Run a Linen model and measure what its batch norms are called with, inside lifted transforms too."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.core
from flax.core import Scope, meta, tracers, unfreeze
from flax.core.scope import in_filter, union_filters
from flax.errors import ModifyScopeVariableError
from flax.traverse_util import flatten_dict, unflatten_dict

from jbn._flax import add_note_to
from jbn._tools.pooling import (
    Measured,
    Options,
    add,
    add_measured,
    measure_inputs,
    no_samples,
    options_of,
    warn_of_unmeasured,
)
from jbn.linen._calls import calls_batch_norm, intercept, path_of
from jbn.linen._override import will_replace

Apply = Callable[[Any, Any], Any]

# The variable beside a layer's mean and var that holds the moments of its inputs. It is in their collection,
# because that is the one that every lifted transform around a batch norm passes on.
INPUTS = "inputs"

_numbers = itertools.count()


def measure(apply: Apply, variables: Any, batch: Any, *, by_batch: bool) -> tuple[Any, Measured]:
    """Run a model as for evaluation; return its outputs, and what its batch norms were called with.

    Args:
      by_batch: normalize with the moments of the inputs themselves, as in training, and not with the running.

    Raises:
      ValueError: no batch norm was called with these variables, or one in training mode, or one that a
        transform hides.
    """
    if not isinstance(variables, Mapping) or "batch_stats" not in variables:
        raise ValueError(
            f"variables is a {type(variables).__name__} without 'batch_stats'; expected what apply takes, "
            "such as {'params': state.params, 'batch_stats': state.batch_stats}."
        )
    while isinstance(apply, jax.stages.Wrapped):  # jitted, which would hide what is inside
        apply = apply.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    run = lambda **how: _Measurement(variables, by_batch, **how).run(apply, batch)
    try:
        return run()
    except _InsideTransform:
        with jax.disable_jit():
            return run()
    except _TrainsWhereMutable as error:
        # Others train with immutable statistics, which is an error of Flax here.
        with add_note_to(ModifyScopeVariableError, str(error)):
            jax.eval_shape(apply, variables, batch)
        return run(evaluate=True)


def layer_paths(variables: Any) -> list[tuple[str, ...]]:
    """Return the paths of all layers that have a running mean and variance."""
    flat = flatten_dict(unfreeze(variables.get("batch_stats", {})))
    return [path[:-1] for path in flat if path[-1] == "mean" and (*path[:-1], "var") in flat]


class _InsideTransform(ValueError):
    pass


class _TrainsWhereMutable(ValueError):
    """Raised in a model that trains where "batch_stats" is mutable, which it is while measuring."""


@dataclass
class _Run:
    """One run of a model from a root scope, with the paths of its layers there."""

    root: Scope
    paths: dict[tuple[str, ...], tuple[str, ...]]  # -> the path in all variables
    is_mutable: bool  # whether `apply` has made the statistics so
    options: dict[tuple[str, ...], Options] = field(default_factory=dict)  # of those that were measured
    others: dict[tuple[str, ...], str] = field(default_factory=dict)  # types of modules that were called


class _Measurement:
    """One run of a model, or of several models that share the variables."""

    def __init__(self, variables: Any, by_batch: bool, evaluate: bool = False):
        stats = flatten_dict(unfreeze(variables.get("batch_stats", {})))
        starts = {path: no_samples(meta.unbox(stats[*path, "mean"])) for path in layer_paths(variables)}
        stats |= {(*path, INPUTS): start for path, start in starts.items()}
        self.variables = {**variables, "batch_stats": unflatten_dict(stats)}
        self.by_batch = by_batch
        self.evaluate = evaluate  # whatever mode the layers are in
        # A model may be given a part of the variables: the arrays tell which layer is which.
        self.paths = {id(start.count): path for path, start in starts.items()}
        self.trace = tracers.current_trace()
        self.runs: list[_Run] = []
        self.current: _Run | None = None
        self.last = ""  # the layer that was called last

    def run(self, apply: Apply, batch: Any) -> tuple[Any, Measured]:
        """Call `apply`."""
        try:
            # Each measurement has to see the calls in what `nn.jit` has compiled in another.
            with intercept(self._intercept, f"measure {next(_numbers)}"):
                outputs = apply(self.variables, batch)
        except ValueError as error:
            if "broadcasted variable has a data dependency" in str(error):  # from nn.scan
                raise ValueError(_broadcast(self.last)) from error
            raise
        measured = None
        for run in self.runs:
            stats: Any = flatten_dict(unfreeze(cast(dict, run.root.variables()["batch_stats"])))
            inputs = {"/".join(run.paths[path]): stats[*path, INPUTS] for path in run.options}
            named = tuple(("/".join(run.paths[path]), option) for path, option in run.options.items())
            measured = add_measured(measured, Measured(inputs, named))
            for path in run.others.keys() - run.options.keys():
                warn_of_unmeasured("/".join(run.paths[path]), run.others[path])
        if measured is None or not measured.inputs:
            raise ValueError(
                "apply called no flax.linen.BatchNorm or jbn.linen.BatchNorm with the variables that "
                "it was given; expected lambda variables, x: model.apply(variables, x, train=False), or "
                "likewise."
            )
        return outputs, measured

    def _intercept(self, call, args, kwargs, context):
        scope = context.module.scope
        if scope is None:
            return call(*args, **kwargs)
        outer = self.current
        if outer is None:
            self.current = self._opened(scope.root)
        if self.current is not None and scope.root is self.current.root:
            for one in _with_parents(scope):  # of submodules made before the root was opened
                one.mutable = scope.root.mutable
        try:
            if self.current is not None and scope.has_variable("batch_stats", INPUTS):
                if will_replace(context.module):  # and then calls what it is replaced by
                    return call(*args, **kwargs)
                if calls_batch_norm(context):
                    return self._call_layer(self.current, call, args, kwargs, context.module)
                self.current.others.setdefault(scope.path, type(context.module).__name__)
            return call(*args, **kwargs)
        finally:
            self.current = outer

    def _opened(self, root: Scope) -> _Run | None:
        """Make the statistics of a model mutable, which `apply` has not done; None if they are others."""
        for run in self.runs:
            if run.root is root:
                return run
        stats: Any = flatten_dict(unfreeze(cast(dict, root.variables().get("batch_stats", {}))))
        paths: dict[Any, Any] = {
            path[:-1]: self.paths.get(id(leaf.count), path[:-1])
            for path, leaf in stats.items()
            if path[-1] == INPUTS
        }
        if not paths:
            return None
        if root.trace_level != self.trace:
            raise _InsideTransform(
                "apply runs the model inside a transform of JAX, such as jax.vmap, or the model itself is of "
                "a lifted class, such as nn.remat(Net); expected neither: call that class in a module."
            )
        self.runs.append(_Run(root, paths, in_filter(root.mutable, "batch_stats")))
        root.mutable = union_filters(root.mutable, "batch_stats")
        root._variables["batch_stats"] = unflatten_dict(stats)
        return self.runs[-1]

    def _call_layer(self, run, call, args, kwargs, layer):
        if self.evaluate:
            object.__setattr__(layer, "use_running_average", True)
            args, kwargs = args[:1], {k: v for k, v in kwargs.items() if k != "use_running_average"}
        _check_evaluation(run.is_mutable, layer, *args, **kwargs)
        scope = layer.scope
        if not scope.is_mutable_collection("batch_stats"):
            raise ValueError(_broadcast(path_of(layer)))
        self.last = path_of(layer)
        run.options[scope.path] = options_of(layer)
        old = {name: scope.get_variable("batch_stats", name) for name in ("mean", "var")}
        x = args[0] if args else kwargs["x"]
        found = measure_inputs(layer, meta.unbox(old["mean"]), x, kwargs.get("mask"), kwargs.get("domain"))
        if self.by_batch:
            for name in old:
                scope.put_variable("batch_stats", name, getattr(found.moments, name))
        y = call(*args, **kwargs)
        new = old | {INPUTS: add(scope.get_variable("batch_stats", INPUTS), found)}
        for name, value in new.items():
            scope.put_variable("batch_stats", name, value)
        return y


def _with_parents(scope: Scope | None) -> Iterator[Scope]:
    while scope is not None:
        yield scope
        scope = scope.parent


def _check_evaluation(
    is_mutable: bool, layer: Any, x: Any = None, use_running_average: Any = None, **_: Any
) -> None:
    mode = layer.use_running_average if use_running_average is None else use_running_average
    if getattr(layer, "frozen", False) or mode is None or (not isinstance(mode, jax.core.Tracer) and mode):
        return
    raise (ValueError if is_mutable else _TrainsWhereMutable)(
        f"'{path_of(layer)}' has use_running_average={mode}, as in training; expected an apply that runs the "
        "model as for evaluation, such as lambda variables, x: model.apply(variables, x, train=False)."
    )


def _broadcast(path: str) -> str:
    return (
        f"'{path}' is in a transform that broadcasts its statistics, so that none can be collected; expected "
        "variable_axes, variable_carry or carry_variables for 'batch_stats'."
    )
