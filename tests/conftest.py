"""The strictest JAX that a user may run, for every test: what holds here holds with the defaults."""

import gc
import itertools
import os
import tempfile

import pytest

# Jobs that the tests train, in this process and in others, compile the same programs again and again. Workers
# share the cache of the process that starts them; with a size given, JAX locks it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jbn-tests-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _cache.name,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**31),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

import jax  # noqa: E402  (reads the environment above)

# Compiling is what the suite waits for, and values are held to the reference at any level of optimization.
# XLA_FLAGS="" compiles all of it as a user's programs are.
_flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # later ones have left only the emitters that take longer to compile
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_flags))
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # which nobody reads in a test's program

gc.set_threshold(20_000, 20)  # a twelfth of the time is spent on looking for cycles at the default

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

collect_ignore = [
    "data/torch_batch_norm.py",
    "data/torch_layers.py",
    "data/torch_resnet.py",
    "data/torch_update_bn.py",
]  # need PyTorch; the tests read their files


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark doctests as slow: each compiles many programs of one operation."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.slow)


_modules = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Let go of what was compiled after every eighth module: it serves the next ones, but only grows."""
    yield
    if next(_modules) % 8 == 0:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Turns float64 on for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """For tests in which Flax or optax compute: they rely on JAX's default promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
