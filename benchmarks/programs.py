"""Programs for machines that are not there: what is compiled, and what is counted in a program's text."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn.linen
from benchmarks.cases import Case
from benchmarks.jax_peers import Layer, layers

# Read when jax is imported: nothing runs but on the CPU, no driver is asked for, no machine of a cloud.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
PLAIN, EXACT = "no norm", "jbn.linen, use_fast_variance=False"  # and the names of benchmarks.jax_peers
H100 = """\
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BYTES = {"pred": 1, "bf16": 2, "f16": 2} | {f"{kind}{8 * n}": n for kind in "sufc" for n in (1, 2, 4, 8, 16)}
# What the entry computation holds but no kernel of its own. Asynchronous copies and slices of a TPU move
# operands early.
FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "iota"),
    *("copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done"),
}
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")


class Machine(NamedTuple):
    name: str
    modules: tuple[str, ...]  # of which one has the compiler
    package: str  # that installs it
    size: str  # of the virtual environment


MACHINES = {
    "cuda": Machine("H100", ("jax_cuda12_plugin", "jax_cuda13_plugin"), "jax[cuda12]", "5.6 GB"),
    "tpu": Machine("TPU v5e", ("libtpu",), "jax[tpu]", "0.7 GB"),
}


class Instruction(NamedTuple):
    name: str
    shape: str
    kind: str
    args: list[str]
    called: str | None  # a computation
    rest: str  # of the line


class Count(NamedTuple):
    kernels: Counter[str]  # by kind
    bytes: int  # which they read and write


def is_installed(platform: str) -> bool:
    """Says whether there is a compiler for a platform."""
    return any(find_spec(module) for module in MACHINES[platform].modules)


def devices_of(platform: str, number: int) -> Sequence[Any]:
    """Returns devices to compile for, which are only described, unless they are CPUs."""
    here = jax.devices()  # finds the plugins
    if platform == "cpu":
        return here[:number]
    if platform == "cuda":
        options = {"target_config": H100, "topology": f"1x1x{number}"}
        return topologies.get_topology_desc("h100", "cuda", **options).devices[:number]
    return topologies.get_topology_desc("v5e:2x2", "tpu").devices[:number]


def place(tree: Any, devices: Sequence[Any], spec: P = P()) -> Any:
    """Returns the shapes of arrays, spread over devices by `spec` with the axis "data"."""
    sharding = NamedSharding(Mesh(np.array(devices), ("data",)), spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def chain(
    name: str, shape: Sequence[int], dtype: str, number: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the gradient of convolution or dense, norm and ReLU, several times, and what it is called with.

    So forward and backward pass of a norm are apart, as in a network. All have the shape of their input.
    """
    layer, width = _layer(name, shape, dtype), shape[-1]

    def multiply(x, kernel):
        kernel = kernel.astype(x.dtype)
        if x.ndim == 2:
            return x @ kernel
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def normalize(params, state, x):
        if layer.channels_last:
            return layer.apply(params, state, x, None)
        y, state = layer.apply(params, state, jnp.moveaxis(x, -1, 1), None)
        return jnp.moveaxis(y, 1, -1), state

    def loss(params, states, x):
        new = []
        for (kernel, params_of_norm), state in zip(params, states):
            y, state = normalize(params_of_norm, state, multiply(x, kernel))
            x = jax.nn.relu(y.astype(x.dtype))
            new.append(state)
        return jnp.mean(x.astype(jnp.float32) ** 2), new

    kernel = jax.ShapeDtypeStruct((*[3] * (len(shape) - 2), width, width), jnp.float32)
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.grad(loss, has_aux=True), ([(kernel, layer.params)] * number, [layer.state] * number, x)


def count(hlo: str) -> Count:
    """Counts the kernels of a compiled program, and the bytes that they read and write, wherever they lie."""
    computations, entry = _parse(hlo)
    shapes = {each.name: each.shape for each in computations[entry]}
    kernels, total = Counter(), 0
    for each in computations[entry]:
        if each.kind in FREE:
            continue
        kernels[each.kind] += 1
        read = {}
        for i, arg in enumerate(each.args):
            size = size_of(shapes.get(arg, ""))
            if each.called in computations:
                size = min(size, _read_inside(computations[each.called], i, size))
            read[arg] = max(read.get(arg, 0), size)
        total += size_of(each.shape) + sum(read.values())
    return Count(kernels, total)


def size_of(shape: str) -> int:
    """Returns the bytes of an array or a tuple, as in "(f32[2,3], pred[])"."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    sizes = [(BYTES.get(dtype, 0), *map(int, filter(None, dims.split(",")))) for dtype, dims in arrays]
    return sum(int(np.prod(size)) for size in sizes)


def operations(stablehlo: str) -> int:
    """Counts the operations of a lowered program, those of a function as often as it is called."""
    parts = re.split(r"func\.func (?:public |private )?@([\w.\-]+)", stablehlo)
    bodies = dict(zip(parts[1::2], parts[2::2]))

    def inside(name):
        body = bodies[name]
        called = re.findall(r"\bcall @([\w.\-]+)", body)
        return len(re.findall(r"= \"?(?:stablehlo|chlo)\.", body)) + sum(map(inside, called))

    return inside("main")


def _layer(name, shape, dtype):
    case = Case("", tuple(shape), dtype=dtype)
    if name == PLAIN:
        return Layer(jnp.zeros(shape[-1]), (), lambda bias, state, x, mask: (x + bias.astype(x.dtype), state))
    if name != EXACT:
        return layers(case)[name]()
    layer = jbn.linen.BatchNorm(use_running_average=False, use_fast_variance=False, dtype=dtype)
    variables = layer.init(jax.random.key(0), jnp.zeros((2, shape[-1]), dtype))

    def apply(params, batch_stats, x, mask):
        y, updated = layer.apply({"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    return Layer(variables["params"], variables["batch_stats"], apply)


def _parse(hlo):
    computations, current, entry = {}, None, None
    for line in hlo.splitlines():
        if header := HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (match := LINE.match(line)):
            name, shape, kind, rest = match.groups()
            args = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            called = re.search(r"calls=%?([\w.\-]+)", rest)
            shape = re.sub(r"\{[^}]*\}", "", shape)  # without its layout
            computations[current].append(Instruction(name, shape, kind, args, called and called[1], rest))
    if entry is None:
        raise ValueError("expected the text of a compiled program, got one without an ENTRY computation.")
    return computations, entry


def _read_inside(rows, i, size):
    """Returns what a fusion reads of its i-th operand: less than all of it where it only takes slices."""
    name = next(
        (each.name for each in rows if each.kind == "parameter" and each.rest.startswith(f"{i})")), None
    )
    users = [each for each in rows if name in each.args]
    sliced = users and all(each.kind in ("slice", "dynamic-slice") for each in users)
    return sum(size_of(each.shape) for each in users) if sliced else size
