"""What a function becomes when it is compiled."""

import re

import jax

# XLA's defaults, for programs whose cost is counted: tests/conftest.py has all others compiled quickly.
OPTIMIZED = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def collectives(f, *args):
    """Return the names of the operations that move data between devices, one for each."""
    text = jax.jit(f).lower(*args).compile().as_text()
    return re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text)
