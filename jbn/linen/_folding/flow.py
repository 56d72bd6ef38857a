"""Follow marked values through a traced program: what reads them, and which variable they are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import Literal

# Primitives that call the program inside them once, with their operands as they are.
_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}


@dataclass(eq=False)
class Leaf:
    """A variable of the model."""

    path: tuple[str, ...]  # the collection first
    ndim: int
    reads: int = 0
    own_reads: int = 0  # those by the layer or norm whose variable it is

    def read_by(self, reader: Any) -> None:
        self.reads += 1


@dataclass(eq=False)
class View:
    """A variable with an axis of size 1 before its others: a mark's operand."""

    leaf: Leaf

    def read_by(self, reader: Any) -> None:
        pass


@dataclass(eq=False)
class Output:
    """What one call of a layer puts out."""

    layer: Any
    readers: list[Any] = field(default_factory=list)

    def read_by(self, reader: Any) -> None:
        self.readers.append(reader)


Value = Leaf | View | Output | None  # None is any other
Mark = Callable[[Value], Value]


def follow(jaxpr: Any, inputs: Sequence[Value], marks: Mapping[str, Mark]) -> None:
    """Follow the inputs of a program, and what marks make, to all that reads them.

    Args:
      jaxpr: the program.
      inputs: what is known of its inputs.
      marks: for each name of `jax.ad_checkpoint.checkpoint_name` what is called with the value that has
        it, and returns what is known of it from there on.
    """
    _read(_outputs(jaxpr, inputs, marks), "what the model puts out")


def _outputs(jaxpr: Any, inputs: Sequence[Value], marks: Mapping[str, Mark]) -> list[Value]:
    known = dict(zip(jaxpr.invars, inputs))
    of = lambda variables: [None if isinstance(v, Literal) else known.get(v) for v in variables]
    for eqn in jaxpr.eqns:
        given, name, inside = of(eqn.invars), eqn.primitive.name, list(_programs(eqn.params))
        if name == "name" and eqn.params["name"] in marks:
            known[eqn.outvars[0]] = marks[eqn.params["name"]](given[0])
        elif name in _CALLS and [len(inner.invars) for inner in inside] == [len(given)]:
            known |= zip(eqn.outvars, _outputs(inside[0], given, marks))
        else:
            reader = f"{name} in {eqn.source_info.name_stack}"
            passed = [None] * len(given)
            if name == "scan":
                carried = _carried(eqn, inside[0])
                passed = [
                    v if isinstance(v, Leaf) and i not in carried else None for i, v in enumerate(given)
                ]
            _read([v for v, p in zip(given, passed) if p is None], reader)
            for inner in inside:
                _read(_outputs(inner, passed, marks), reader)
            if name == "reshape" and isinstance(given[0], Leaf):
                known[eqn.outvars[0]] = View(given[0])
    return of(jaxpr.outvars)


def _carried(scan: Any, body: Any) -> range:
    """Return which operands of a scan it carries: those between constants and what it scans over.

    By ranks, because the names under which a scan keeps these numbers change between versions of JAX.
    """
    ranks = lambda variables: [len(v.aval.shape) for v in variables]
    scanned = sum(outside > inside for outside, inside in zip(ranks(scan.invars), ranks(body.invars)))
    carried = sum(outside == inside for outside, inside in zip(ranks(scan.outvars), ranks(body.outvars)))
    constants = len(scan.invars) - carried - scanned
    return range(constants, constants + carried)


def _read(values: Sequence[Value], reader: str) -> None:
    for value in values:
        if value is not None:
            value.read_by(reader)


def _programs(value: Any) -> Iterator[Any]:
    """Yield the programs among the parameters of an operation."""
    if hasattr(value, "eqns"):
        yield getattr(value, "jaxpr", value)
    elif isinstance(value, dict | tuple | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _programs(each)
