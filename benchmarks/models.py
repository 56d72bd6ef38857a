"""Training steps of residual networks: time, what is kept for the backward pass, and rematerialisation."""

import json
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.interleave import Measured, Worker, measure
from benchmarks.report import markdown

RESNET_20 = dict(
    model="ResNet-20", bottleneck=False, stages=(3, 3, 3), filters=16, size=32, batch=128, classes=10
)
RESNET_50 = dict(
    model="ResNet-50", bottleneck=True, stages=(3, 4, 6, 3), filters=64, size=96, batch=16, classes=1000
)
TINY = dict(stages=(1,), filters=4, size=16, batch=4, classes=10)
MIB = {  # the compiler counts the last two, residuals what JAX or PyTorch saves
    "residual bytes": "residuals, MiB",
    "residual bytes in bfloat16": "in bfloat16",
    "temp bytes": "temporary, MiB",
    "bytes accessed": "accessed, MiB",
}


def main(out: Path, quick: bool) -> None:
    """Measures every candidate of both models, prints a table for each, and writes models.json."""
    cases = [case | TINY if quick else case for case in (RESNET_20, RESNET_50)]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker("benchmarks.resnet_jax"))]
        if find_spec("torch"):
            workers.append(stack.enter_context(Worker("benchmarks.resnet_torch")))
        else:
            print("PyTorch is left out, for it is not installed.")
        results = [(case, measure(workers, case, rounds=2 if quick else 9)) for case in cases]
    out.mkdir(parents=True, exist_ok=True)
    described = machine.describe()
    record = {
        "machine": described,
        "cases": [
            case | {"candidates": {name: measured._asdict() for name, measured in found.items()}}
            for case, found in results
        ],
    }
    (out / "models.json").write_text(json.dumps(record, indent=1))
    for case, found in results:
        print(_table(case, found), end="\n\n")
    print(machine.sentence(described))


def _table(case: dict[str, Any], found: dict[str, Measured]) -> str:
    title = f"{case['model']}, {case['batch']} images of {case['size']} x {case['size']}"
    rows = [[title, "ms a step", "quartiles", *MIB.values()]]
    for name, measured in found.items():
        facts = [f"{measured.facts[fact] / 2**20:.1f}" if fact in measured.facts else "" for fact in MIB]
        quartiles = f"{measured.low * 1e3:.1f} to {measured.high * 1e3:.1f}"
        rows.append([name, f"{measured.median * 1e3:.1f}", quartiles, *facts])
    return markdown(rows)
