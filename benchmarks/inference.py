"""Inference of ResNet-50, and of the same network with its batch norms folded into its convolutions."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jbn.linen
from benchmarks import machine
from benchmarks.interleave import Measured, Worker, measure
from benchmarks.models import RESNET_50, TINY
from benchmarks.report import markdown
from benchmarks.resnet_jax import ResNet, initial
from benchmarks.worker import Candidate

FOLDED = "flax.linen, folded"
NORMS = {"flax.linen": nn.BatchNorm, "jbn.linen": jbn.linen.BatchNorm, FOLDED: nn.BatchNorm}
CASES = [RESNET_50 | {"size": 224, "batch": batch} for batch in (1, 16)]
MIB = {"temp bytes": "temporary, MiB", "bytes accessed": "accessed, MiB"}


def network(
    name: str, images: Any, make: Callable[..., Any] = jax.eval_shape, **options: Any
) -> tuple[Callable[..., jax.Array], Any]:
    """Returns a function of variables and images, and the variables, which `make(model.init, ...)` makes."""
    model = ResNet(**options, norm=NORMS[name], train=False)
    variables = make(model.init, jax.random.key(0), images)
    if name != FOLDED:
        return model.apply, variables
    pairs = jbn.linen.find_pairs(model.apply, variables, images, strict=True)

    def apply(variables, images):
        with jbn.linen.without_norms(pairs):
            return model.apply(variables, images)

    fold = partial(jbn.linen.fold, pairs=pairs)
    is_there = isinstance(jax.tree.leaves(variables)[0], jax.Array)
    return apply, jax.jit(fold)(variables) if is_there else jax.eval_shape(fold, variables)


def prepare(case: dict[str, Any]) -> dict[str, Candidate]:
    """Compiles each candidate, and sees that all put out the same."""
    random = np.random.RandomState(0)
    images = jnp.asarray(random.normal(size=(case["batch"], case["size"], case["size"], 3)), jnp.float32)
    sizes = {key: case[key] for key in ("bottleneck", "stages", "filters", "classes")}
    candidates, outputs = {}, {}
    for name in NORMS:
        apply, variables = network(name, images, initial, **sizes)
        program = jax.jit(apply).lower(variables, images).compile()
        outputs[name] = np.asarray(program(variables, images))
        facts = {
            "temp bytes": program.memory_analysis().temp_size_in_bytes,
            "bytes accessed": program.cost_analysis()["bytes accessed"],
        }
        candidates[name] = Candidate(partial(_seconds, program, variables, images), facts)
    largest = np.max(np.abs(outputs["flax.linen"]))
    for name, values in outputs.items():
        if not np.allclose(values, outputs["flax.linen"], rtol=0, atol=1e-5 * largest):
            raise RuntimeError(f"expected {name} to put out what flax.linen does, got other values.")
    return candidates


def main(out: Path, quick: bool) -> None:
    """Measures each batch size, prints a table for each, and writes inference.json."""
    cases = [case | TINY if quick else case for case in CASES]
    with Worker("benchmarks.inference") as worker:
        results = [(case, measure([worker], case, rounds=2 if quick else 15)) for case in cases]
    out.mkdir(parents=True, exist_ok=True)
    described = machine.describe()
    record = {
        "machine": described,
        "cases": [
            case | {"candidates": {name: measured._asdict() for name, measured in found.items()}}
            for case, found in results
        ],
    }
    (out / "inference.json").write_text(json.dumps(record, indent=1))
    for case, found in results:
        print(_table(case, found), end="\n\n")
    print(machine.sentence(described))


def _seconds(program, variables, images):
    start = time.perf_counter()
    jax.block_until_ready(program(variables, images))
    return time.perf_counter() - start


def _table(case: dict[str, Any], found: dict[str, Measured]) -> str:
    title = f"{case['model']}, {case['batch']} images of {case['size']} x {case['size']}"
    rows = [[title, "time / flax.linen", "ms", "quartiles", *MIB.values()]]
    for name, measured in found.items():
        facts = [f"{measured.facts[fact] / 2**20:.1f}" for fact in MIB]
        quartiles = f"{measured.low * 1e3:.1f} to {measured.high * 1e3:.1f}"
        ratio = measured.median / found["flax.linen"].median
        rows.append([name, f"{ratio:.2f}", f"{measured.median * 1e3:.1f}", quartiles, *facts])
    return markdown(rows)
