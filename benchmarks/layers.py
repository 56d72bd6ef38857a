"""One layer, beside those of other libraries: times, and what the compiler counts."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from benchmarks import machine
from benchmarks.cases import Case, all_cases, quick_cases
from benchmarks.interleave import Measured, Worker, measure
from benchmarks.report import draw_layers, layer_tables, summary_table

Results = list[tuple[Case, dict[str, Measured]]]


def main(out: Path, quick: bool, only: str = "") -> None:
    """Measures every case, prints a table for each section, and writes layers.json and layers.png."""
    results = []
    with ExitStack() as stack:
        workers = {devices: list(_workers(stack, devices)) for devices in (1, 4)}
        for case in quick_cases() if quick else all_cases():
            if only not in case.section:
                continue
            print(f"{case.section}: {'x'.join(map(str, case.shape))}", flush=True)
            rounds = 2 if quick else 21
            results.append((case, measure(workers[case.devices], case._asdict(), rounds=rounds)))
    out.mkdir(parents=True, exist_ok=True)
    described = machine.describe()
    record = {
        "machine": described,
        "cases": [
            case._asdict() | {"candidates": {name: measured._asdict() for name, measured in found.items()}}
            for case, found in results
        ],
    }
    (out / "layers.json").write_text(json.dumps(record, indent=1))
    print("", summary_table(results), layer_tables(results), machine.sentence(described), sep="\n\n")
    draw_layers(results, out / "layers.png", machine.sentence(described))


def _workers(stack: ExitStack, devices: int) -> Iterable[Worker]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    yield stack.enter_context(Worker("benchmarks.jax_layers", XLA_FLAGS=flags))
    if devices == 1 and find_spec("torch"):
        yield stack.enter_context(Worker("benchmarks.torch_layers"))
