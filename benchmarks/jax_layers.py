"""Compiles the layers of the JAX libraries, counts what the compiler knows, and times single calls."""

import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.cases import Case
from benchmarks.jax_peers import AXIS_NAME, Layer, layers
from benchmarks.worker import Candidate

COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def prepare(case: dict[str, Any]) -> dict[str, Candidate]:
    """Compiles every library's layer for a case, and a copy of x to compare with."""
    case = Case(**case | {"shape": tuple(case["shape"])})
    copying = case._replace(mode="forward", relu=False, devices=1)
    copy = Layer((), (), lambda params, state, x, mask: (x + jnp.ones_like(x), ()))
    buffers, candidates, results = {}, {}, {}
    for name, make in layers(case).items():
        candidates[name], results[name] = _candidate(case, make(), buffers)
    _check_agreement(case, results)
    candidates["copy"], _ = _candidate(copying, copy, {})
    return candidates


def _candidate(case: Case, layer: Layer, buffers: dict[Any, Any]) -> tuple[Candidate, np.ndarray]:
    """Returns the candidate, and what its layer returns, channels last."""
    if layer.channels_last not in buffers:
        buffers[layer.channels_last] = _samples(case, layer.channels_last)
    samples = buffers[layer.channels_last]
    variables = _place(case, (layer.params, layer.state), PartitionSpec())
    program, in_place = _compile(case, layer, samples, variables)

    def seconds():
        spare, other, dy, x, mask = samples
        start = time.perf_counter()
        (y, dx), _ = jax.block_until_ready(
            program((spare, dy if in_place else other), None if in_place else dy, x, mask, *variables)
        )
        elapsed = time.perf_counter() - start
        samples[:3] = (y, other, dx) if in_place else (y, dx, dy)
        return elapsed

    seconds()
    y = np.asarray(samples[0], np.float32)
    facts = _facts(case, layer, program, samples)
    return Candidate(seconds, facts), y if layer.channels_last else np.moveaxis(y, 1, -1)


def _check_agreement(case, results):
    """Raises if a library computes something else in training; their precision is not the subject here."""
    for name, y in results.items() if case.mode != "inference" else ():
        error = np.max(np.abs(y - results["jbn"]))
        if "ghost" not in name and not error < (0.1 if case.dtype == "bfloat16" or case.mean > 1 else 1e-3):
            raise AssertionError(f"{name} differs from jbn by {error} in {case}.")


def _samples(case, channels_last):
    """Returns two spare buffers, dy, x and the mask."""
    rng = np.random.default_rng(0)
    dy, x = (rng.normal(mean, 1, case.shape) for mean in (0, case.mean))
    dy, x = (jnp.asarray(a if channels_last else np.moveaxis(a, -1, 1), case.dtype) for a in (dy, x))
    mask = (jnp.arange(len(x)) % 10 > 0).reshape(-1, *[1] * (x.ndim - 1)) if case.mask else None
    return list(_place(case, (jnp.zeros_like(x), jnp.zeros_like(x), dy, x, mask), PartitionSpec(AXIS_NAME)))


def _place(case, values, spec):
    return values if case.devices == 1 else jax.device_put(values, NamedSharding(_mesh(case), spec))


def _mesh(case):
    return jax.make_mesh((case.devices,), (AXIS_NAME,), devices=jax.devices()[: case.devices])


def _compile(case, layer, samples, variables):
    """Compiles so that dx takes the place of dy, unless the compiler would have to copy dy first."""

    def step(spares, dy, x, mask, params, state):
        def forward(x, params):
            y, new = layer.apply(params, state, x, mask)
            return (jax.nn.relu(y) if case.relu else y), new

        if case.mode != "forward+backward":
            y, new = forward(x, params)
            return (y, spares[1]), new
        y, backward, new = jax.vjp(forward, x, params, has_aux=True)
        dx, dparams = backward(spares[1] if dy is None else dy)
        return (y, dx), (dparams, new)

    def compiled(in_place):
        f, (spare, other, dy, x, mask) = step, samples
        if case.devices > 1:
            sharded, whole = PartitionSpec(AXIS_NAME), PartitionSpec()
            specs = sharded, sharded, sharded, sharded, whole, whole
            f = jax.shard_map(
                f, mesh=_mesh(case), in_specs=specs, out_specs=(sharded, whole), check_vma=False
            )
        args = (spare, dy if in_place else other), None if in_place else dy, x, mask, *variables
        return jax.jit(f, donate_argnums=0, keep_unused=True).lower(*args).compile()

    ways = (True, False) if case.mode == "forward+backward" else (False,)
    return min(
        ((compiled(in_place), in_place) for in_place in ways), key=lambda way: round(_bytes(way[0]), -3)
    )


def _bytes(program):
    return program.cost_analysis()["bytes accessed"]


def _facts(case, layer, program, samples):
    """Returns what XLA counts, whatever the machine does: per byte, or per element, of x."""
    *_, x, mask = samples
    params, state = layer.params, layer.state
    nbytes, memory = x.nbytes / case.devices, program.memory_analysis()

    def kept(x, params):
        return jax.vjp(lambda x, params: layer.apply(params, state, x, mask), x, params, has_aux=True)[1]

    facts = {
        "bytes": _bytes(program) / nbytes,
        "flops": program.cost_analysis()["flops"] / (x.size / case.devices),
        "temporary": memory.temp_size_in_bytes / nbytes,
    }
    if case.devices > 1:
        return facts | {"collectives": len(COLLECTIVE.findall(program.as_text()))}
    if case.mode == "forward+backward" and layer.params:
        leaves = jax.tree.leaves(jax.eval_shape(kept, x, params))
        facts["kept"] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / x.size
    return facts
