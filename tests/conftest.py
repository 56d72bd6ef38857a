"""The strictest JAX that a user may run, for every test: what holds here holds with the defaults."""

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

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

collect_ignore = ["data/torch_batch_norm.py"]  # needs PyTorch; the tests read what it wrote


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
