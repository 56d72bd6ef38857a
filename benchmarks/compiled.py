"""What a layer becomes on machines that are not there: compiled for an H100 and a TPU v5e, and counted."""

import json
import math
import time
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jbn.linen
from benchmarks import inference
from benchmarks.devices import all_reduces
from benchmarks.interleave import Worker
from benchmarks.machine import describe, sentence
from benchmarks.models import RESNET_50, TINY
from benchmarks.programs import (
    ENVIRONMENT,
    EXACT,
    MACHINES,
    PLAIN,
    chain,
    count,
    devices_of,
    is_installed,
    operations,
    place,
)
from benchmarks.report import markdown
from benchmarks.resnet_jax import INPUTS_AND_MOMENTS, OPTIMIZER, ResNet, train_step
from benchmarks.worker import Candidate

LAYERS, DEVICES = 4, 4
OURS = PLAIN, "flax.linen", "flax.linen, two passes", "jbn.linen", EXACT
PEERS = "haiku", "equinox", "keras"
CHAINS = [
    dict(shape=(64, 28, 28, 128), dtype="bfloat16"),
    dict(shape=(64, 28, 28, 128), dtype="float32"),
    # The last stage of ResNet-50 has so few rows that XLA for GPUs does not split their sum.
    dict(shape=(64, 7, 7, 512), dtype="bfloat16"),
    dict(shape=(4096, 512), dtype="float32"),
]
TITLES = {
    "layers": f"What each layer adds to {LAYERS} times convolution or dense, norm and ReLU with their "
    "gradient: kernels, and bytes in sizes of its input; temporary memory of the whole, in the same",
    "devices": f"All-reduces of {LAYERS} times dense, norm, ReLU with their gradient, on {DEVICES} devices",
    "lowered": "Operations of StableHLO that a layer with its gradient adds, lowered for each platform",
    "seconds": "CPU seconds to trace, lower and compile the gradient of convolution, norm and ReLU for CPUs",
    "models": "A training step of ResNet-50 in bfloat16",
    "inference": "Inference of ResNet-50 in bfloat16",
}
MOMENTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names("batch_norm_moments"),
    lambda primitive, *_, **__: primitive.name == "conv_general_dilated",
)
NOTHING = jax.checkpoint_policies.nothing_saveable
LONG = "models", "inference"  # to compile
MODELS = {
    "flax.linen, no remat": dict(norm=nn.BatchNorm),
    "jbn.linen, no remat": dict(norm=jbn.linen.BatchNorm),
    "flax.linen, remat, convolutions and sums kept": dict(norm=nn.BatchNorm, policy=INPUTS_AND_MOMENTS),
    "jbn.linen, remat, convolutions and sums kept": dict(norm=jbn.linen.BatchNorm, policy=INPUTS_AND_MOMENTS),
    "jbn.linen, remat, convolutions and moments kept": dict(norm=jbn.linen.BatchNorm, policy=MOMENTS),
    "flax.linen, remat, nothing kept": dict(norm=nn.BatchNorm, policy=NOTHING),
    "jbn.linen, remat, nothing kept": dict(norm=jbn.linen.BatchNorm, policy=NOTHING),
}


def prepare(case: dict[str, Any]) -> dict[str, Candidate]:
    """Compiles one program and counts; or offers several to be compiled in turn, whose time is taken."""
    table, name, options = case["table"], case["name"], case["options"]
    if table == "seconds":
        return {name: Candidate(partial(_compile, name, **options), {}) for name in OURS}
    try:
        facts = FACTS[table](case["platform"], name, **options)
    except Exception as error:
        if name not in PEERS:
            raise
        facts = {"failed": f"{type(error).__name__}: {error}"[:300]}
    return {name: Candidate(_no_time, facts)}


def main(out: Path, quick: bool, only: str = "") -> None:
    """Compiles what has `only` in its label, prints tables, and writes compiled.json or adds to it.

    A label is like "layers tpu 64x28x28x128 bfloat16 flax.linen". Networks take long: they want `only`.
    """
    for platform, machine in MACHINES.items():
        if not is_installed(platform):
            print(
                f"{platform} ({machine.name}) is left out; it wants, in a virtual environment of its own, "
                f"pip install '{machine.package}=={jax.__version__}' ({machine.size})."
            )
    if missing := [name for name in PEERS if find_spec(name) is None]:
        print(f"{', '.join(missing)}: left out, for they are not installed.", flush=True)
    tables = {}
    for case in _cases(quick):
        if only in _label(case) and (case["table"] not in LONG or case["table"] in only):
            tables.setdefault((case["table"], case["platform"]), []).append(case)
    if not tables:
        raise ValueError(f"expected some of a label as in 'layers cuda' or 'models tpu', got {only!r}.")
    out.mkdir(parents=True, exist_ok=True)
    with Worker("benchmarks.compiled", **ENVIRONMENT, JAX_NUM_CPU_DEVICES=str(DEVICES)) as worker:
        for (table, platform), cases in tables.items():
            programs = [each for case in cases for each in _programs(worker, case, 1 if quick else 5)]
            title = TITLES[table]
            if platform in MACHINES:
                title += f". Compiled for {MACHINES[platform].name}, not run on it"
            print(f"\n{title}.\n\n{markdown(_rows(programs))}\n", flush=True)
            _write(out / "compiled.json", f"{table} {platform}", {"title": title, "programs": programs})
    print(f"{sentence(describe())}.")


def _cases(quick):
    sizes = [size | {"shape": (8,) * len(size["shape"])} for size in CHAINS] if quick else CHAINS
    sizes = list({_size(size): size for size in sizes}.values())
    small = dict(shape=(2, 4, 4, 4), number=1) if quick else dict(shape=(8, 16, 16, 32), number=20)
    resnet = RESNET_50 | {"size": 224, "batch": 64} | (TINY if quick else {})
    del resnet["model"]
    compilers = [platform for platform in MACHINES if is_installed(platform)]
    names = OURS + tuple(name for name in PEERS if find_spec(name))
    each = [
        *product(["layers"], compilers, names, sizes),
        *product(["devices"], ["cpu", *compilers], OURS, sizes[-1:]),
        *product(["lowered"], ["cpu"], names, sizes[-1:]),
        ("seconds", "cpu", "", small),
        *product(["models"], compilers, MODELS, [resnet]),
        *product(["inference"], compilers, inference.NORMS, [resnet]),
    ]
    return [dict(zip(("table", "platform", "name", "options"), values)) for values in each]


def _label(case):
    return " ".join(filter(None, (case["table"], case["platform"], _size(case["options"]), case["name"])))


def _size(options):
    return f"{'x'.join(map(str, options['shape']))} {options.get('dtype', '')}" if "shape" in options else ""


def _programs(worker, case, repeats):
    start = time.perf_counter()
    facts = worker.prepare(case)
    if case["table"] == "seconds":
        taken = {name: [] for name in facts}
        for _, name in product(range(repeats), facts):  # in turn
            taken[name].append(worker.seconds(name))
        base = min(taken["flax.linen"])
        facts = {
            name: {"seconds": min(seconds), "over flax.linen": min(seconds) / base}
            for name, seconds in taken.items()
        }
    failed = "".join(f", failed: {found['failed']}" for found in facts.values() if "failed" in found)
    print(f"{_label(case)}: {time.perf_counter() - start:.0f} seconds{failed}", flush=True)
    return [case | {"name": name, "facts": found} for name, found in facts.items()]


def _rows(programs):
    programs = [each for each in programs if "failed" not in each["facts"]]
    several = len({_size(each["options"]) for each in programs}) > 1
    cells = {}
    for each in programs:
        of_size = f"{_size(each['options'])}: " if several else ""
        for fact, value in each["facts"].items():
            text = f"{value:.2f}" if isinstance(value, float) else str(value)
            cells.setdefault(each["name"], {})[of_size + fact] = text
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    return [["", *columns]] + [
        [name, *(row.get(each, "") for each in columns)] for name, row in cells.items()
    ]


def _write(path, key, table):
    """Writes a table, beside others, for no virtual environment has all compilers."""
    record = json.loads(path.read_text()) if path.exists() else {}
    table, old = {"machine": describe()} | table, record.get(key, {})
    if old.get("machine") == table["machine"]:
        new = {_label(each) for each in table["programs"]}
        table["programs"] = [each for each in old["programs"] if _label(each) not in new] + table["programs"]
    path.write_text(json.dumps(record | {key: table}, indent=1) + "\n")


def _no_time():
    raise RuntimeError("the machine that this was compiled for is not here.")


def _compiled_chain(platform, name, shape, dtype, number):
    """Returns the program of a chain whose samples are spread over as many devices as asked for."""
    f, (params, states, x) = chain(name, shape, dtype, LAYERS)
    devices = devices_of(platform, number)
    args = *place((params, states), devices), place(x, devices, P("data"))
    return jax.jit(f).lower(*args).compile()


@lru_cache
def _counted(platform, name, shape, dtype):
    program = _compiled_chain(platform, name, shape, dtype, 1)
    found, memory = count(program.as_text()), program.memory_analysis()
    return found.kernels.total(), found.bytes, memory.temp_size_in_bytes


def _adds(platform, name, shape, dtype):
    plain, whole = (_counted(platform, each, tuple(shape), dtype) for each in (PLAIN, name))
    x = jnp.dtype(dtype).itemsize * math.prod(shape)
    return {
        "kernels": (whole[0] - plain[0]) / LAYERS,
        "bytes": (whole[1] - plain[1]) / LAYERS / x,
        "temporary": whole[2] / x,
    }


def _sent(platform, name, shape, dtype):
    program = _compiled_chain(platform, name, shape, dtype, DEVICES)
    always, rare = (
        [size for size, in_branch in all_reduces(program.as_text()) if in_branch == branch]
        for branch in (False, True)
    )
    return {
        "all-reduces": len(always),
        "their bytes": sum(always),
        "in branches": len(rare),
        "bytes there": sum(rare),
    }


def _lowered(platform, name, shape, dtype):
    return {
        each: _operations(name, tuple(shape), dtype, each) - _operations(PLAIN, tuple(shape), dtype, each)
        for each in ("cpu", *MACHINES)
    }


@lru_cache
def _operations(name, shape, dtype, platform):
    f, args = chain(name, shape, dtype, 1)
    return operations(jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text())


def _compile(name, shape, number):
    """Returns the processor's seconds for one program, of which nothing is known from before."""
    f, args = chain(name, shape, "float32", number)
    jax.clear_caches()
    start = time.process_time()
    jax.jit(f).lower(*args).compile()
    return time.process_time() - start


def _inferred(platform, name, size, batch, **options):
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.bfloat16)
    apply, variables = inference.network(name, images, **options, dtype=jnp.bfloat16)
    args = place((variables, images), devices_of(platform, 1))
    return _of_network(jax.jit(apply).lower(*args).compile())


def _trained(platform, name, size, batch, **options):
    devices, model = devices_of(platform, 1), ResNet(**options, **MODELS[name], dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = params, batch_stats, jax.eval_shape(OPTIMIZER.init, params)
    args = place((state, images, labels), devices)
    return _of_network(jax.jit(partial(train_step, model), donate_argnums=0).lower(*args).compile())


def _of_network(program):
    found = count(program.as_text())
    cost = program.cost_analysis() or {}  # of a GPU that is not there it is None
    return {
        "kernels": found.kernels.total(),
        "GB moved": found.bytes / 1e9,
        "temporary, MB": round(program.memory_analysis().temp_size_in_bytes / 1e6),
    } | ({"TFLOP": cost["flops"] / 1e12} if "flops" in cost else {})


FACTS = {"layers": _adds, "devices": _sent, "lowered": _lowered, "models": _trained, "inference": _inferred}
