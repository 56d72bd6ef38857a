"""In which order a function uses its arguments, read from its jaxpr.

Names do not give that order: sorted, they put the head of a network before its stem, and its batch norms
before the layers that they follow.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

# What a value is computed from: the number of the only argument, CONSTANT or MIXED.
Origin = int | str
CONSTANT = "scalar constants alone"
MIXED = "several arguments, or data"


def order_of_use(f: Callable, args: Sequence[jax.Array]) -> list[int]:
    """Return the numbers of the arguments in the order in which `f` first uses them; unused ones last.

    An argument is used where it meets data or another argument. Before that it may be converted, such as all
    parameters to bfloat16 at the start.
    """
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    used: dict[int, None] = {}  # an ordered set
    _follow(jaxpr, list(range(len(args))), used)
    return [*used, *(i for i in range(len(args)) if i not in used)]


def _follow(jaxpr: Jaxpr, inputs: list[Origin], used: dict[int, None]) -> list[Origin]:
    """Add the arguments that a jaxpr uses to `used`, in order, and return the origins of its outputs."""
    origins: dict[Var, Origin] = dict.fromkeys(jaxpr.constvars, MIXED) | dict(zip(jaxpr.invars, inputs))

    def origin(atom):
        if isinstance(atom, Literal):
            return MIXED if np.ndim(atom.val) else CONSTANT
        return origins[atom]

    for equation in jaxpr.eqns:
        called = [
            _follow(inner, [origin(atom) for atom in atoms], used) for inner, atoms in _called(equation)
        ]
        if called:
            outputs = [_common(branches) for branches in zip(*called)]
        else:
            output = _apply(equation, [origin(atom) for atom in equation.invars], used)
            outputs = [output] * len(equation.outvars)
        origins |= zip(equation.outvars, outputs)
    return [origin(atom) for atom in jaxpr.outvars]


def _apply(equation: JaxprEqn, inputs: list[Origin], used: dict[int, None]) -> Origin:
    """Add the arguments that a primitive combines to `used`, and return the origin of its outputs."""
    result = _common(inputs)
    if result == MIXED:
        used |= dict.fromkeys(i for i in inputs if isinstance(i, int))
    # An array made of constants may be an example of the data, such as jnp.ones((1, 28, 28)).
    if result == CONSTANT and any(getattr(v.aval, "shape", ()) for v in equation.outvars):
        return MIXED
    return result


def _common(origins: Sequence[Origin]) -> Origin:
    distinct = set(origins) - {CONSTANT}
    return MIXED if len(distinct) > 1 else next(iter(distinct), CONSTANT)


def _called(equation: JaxprEqn) -> Iterator[tuple[Jaxpr, list]]:
    """Yield the jaxprs that an equation calls (`jit`, `custom_jvp`, `scan`...), each with its inputs."""
    atoms = equation.invars
    if equation.primitive.name == "cond":
        atoms = atoms[1:]
    elif equation.primitive.name == "while":
        atoms = atoms[equation.params["cond_nconsts"] :]
    for key, value in equation.params.items():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            fits = isinstance(inner, Jaxpr) and len(inner.invars) == len(atoms)
            # The condition of a while loop takes other inputs than the body, which determines the order.
            if fits and len(inner.outvars) == len(equation.outvars) and key != "cond_jaxpr":
                yield inner, atoms
