"""What a function becomes when it is compiled."""

import re

import jax

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def collectives(f, *args):
    """Returns the names of the operations that move data between devices, one for each."""
    text = jax.jit(f).lower(*args).compile().as_text()
    return re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text)
