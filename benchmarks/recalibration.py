"""One pass of `recalibrate` over data beside one of evaluation, ResNet-20 with Flax's layer and ours."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import jbn.linen
from benchmarks.interleave import Worker, measure
from benchmarks.machine import describe, sentence
from benchmarks.report import markdown
from benchmarks.resnet_jax import ResNet
from benchmarks.worker import Candidate

CASE = dict(bottleneck=False, stages=(3, 3, 3), filters=16, size=32, batch=128, classes=10, batches=4)
TINY = dict(stages=(1,), filters=4, size=16, batch=4)
NORMS = {"flax.linen": nn.BatchNorm, "jbn.linen": jbn.linen.BatchNorm}


def main(out: Path, quick: bool) -> None:
    """Measures both, prints a table, and writes recalibration.json."""
    case = CASE | TINY if quick else CASE
    with Worker("benchmarks.recalibration") as worker:
        found = measure([worker], case, rounds=2 if quick else 21)
    out.mkdir(parents=True, exist_ok=True)
    described = describe()
    record = {"machine": described, "candidates": {name: each._asdict() for name, each in found.items()}}
    (out / "recalibration.json").write_text(json.dumps(record, indent=1))
    title = (
        f"{case['batches']} batches of {case['batch']} images of {case['size']} x {case['size']}, ResNet-20"
    )
    rows = [[title, "ms", "over evaluation"]]
    for name, each in found.items():
        evaluation = found[name.replace("recalibrate", "evaluate")]
        rows.append([name, f"{each.median * 1e3:.1f}", f"{each.median / evaluation.median:.2f}"])
    print(markdown(rows), end="\n\n")
    print(sentence(described))


def prepare(case: dict[str, Any]) -> dict[str, Candidate]:
    """Compiles both passes, for each layer."""
    random, shape = np.random.RandomState(0), (case["batch"], case["size"], case["size"], 3)
    batches = [random.normal(size=shape).astype("float32") for _ in range(case["batches"])]
    size = {key: case[key] for key in ("bottleneck", "stages", "filters", "classes")}
    candidates = {}
    for name, norm in NORMS.items():
        model = ResNet(**size, norm=partial(_evaluating, norm))
        variables = jax.jit(model.init)(jax.random.key(0), batches[0])
        passes = {
            "evaluate": partial(_evaluate, jax.jit(model.apply), variables, batches),
            "recalibrate": partial(jbn.linen.recalibrate, model.apply, variables, batches),
        }
        for what, run in passes.items():
            candidates[f"{what}, {name}"] = Candidate(partial(_seconds, run), {})
    return candidates


def _evaluating(norm, **options):
    return norm(**options | {"use_running_average": True})


def _evaluate(apply, variables, batches):
    return [apply(variables, batch).argmax(-1) for batch in batches]


def _seconds(run):
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
