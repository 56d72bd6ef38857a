"""In which order a function uses its arguments, read from its jaxpr."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

# Where a value comes from: an argument's number, if from that argument and scalar constants alone.
Origin = int | str | None
CONSTANT: Origin = None  # from scalar constants alone
MIXED: Origin = "mixed"  # from several arguments, or from data


def order_of_use(f: Callable, args: Sequence[jax.Array]) -> list[int]:
    """Returns the numbers of the arguments in the order in which `f` first uses them; unused ones last.

    A use is where an argument meets data or another argument. What is made of it alone, such as a conversion
    of all parameters to bfloat16 at the start, is not yet a use.
    """
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    used: dict[int, None] = {}
    _follow(jaxpr, list(range(len(args))), used)
    return [*used, *(i for i in range(len(args)) if i not in used)]


def _follow(jaxpr: Jaxpr, inputs: list[Origin], used: dict[int, None]) -> list[Origin]:
    """Adds to `used` the arguments that a jaxpr uses, in order, and returns the origins of its outputs."""
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
            outputs = [_apply(equation, [origin(atom) for atom in equation.invars], used)] * len(
                equation.outvars
            )
        origins |= zip(equation.outvars, outputs)
    return [origin(atom) for atom in jaxpr.outvars]


def _apply(equation: JaxprEqn, inputs: list[Origin], used: dict[int, None]) -> Origin:
    result = _common(inputs)
    if result == MIXED:
        used |= dict.fromkeys(i for i in inputs if isinstance(i, int))
    # An array of constants may be an example of the data: jnp.ones((1, 28, 28)).
    made = result is CONSTANT and any(np.ndim(v.aval) for v in equation.outvars)
    return MIXED if made else result


def _common(origins: Sequence[Origin]) -> Origin:
    distinct = set(origins) - {CONSTANT}
    return MIXED if len(distinct) > 1 else next(iter(distinct), CONSTANT)


def _called(equation: JaxprEqn) -> Iterator[tuple[Jaxpr, list]]:
    """Yields the jaxprs that an equation calls (`jit`, `custom_jvp`, `scan`...), each with its inputs."""
    atoms = equation.invars
    if equation.primitive.name == "cond":
        atoms = atoms[1:]
    elif equation.primitive.name == "while":
        atoms = atoms[equation.params["cond_nconsts"] :]
    for key, value in equation.params.items():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            fits = isinstance(inner, Jaxpr) and len(inner.invars) == len(atoms)
            # What a while loop asks takes inputs of its own; what it does decides.
            if fits and len(inner.outvars) == len(equation.outvars) and key != "cond_jaxpr":
                yield inner, atoms
