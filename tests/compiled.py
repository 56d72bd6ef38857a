"""What a function becomes when it is compiled."""

import re
from functools import partial

import jax

# For programs that are compiled once, run once, and compared by value.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def collectives(f, *args):
    """Returns the names of the operations that move data between devices, one for each."""
    text = quick_jit(f).lower(*args).compile().as_text()
    return re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text)
