"""Timing several candidates in turn, so that a noisy machine is noisy to all of them."""

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

# glibc returns the pages of large buffers to the system after each call, and page faults are then most of
# what is measured. PyTorch's idle threads spin, and slow whatever runs after them.
QUIET = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}


class Measured(NamedTuple):
    median: float  # seconds
    low: float  # seconds, the first quartile
    high: float  # seconds, the third quartile
    facts: dict[str, Any]


class Worker:
    """A process that runs `benchmarks.worker` for one module, with an environment of its own."""

    def __init__(self, module: str, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", module],
            env=os.environ | QUIET | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()  # which ends it
        self._process.wait()
        self._process.stdout.close()

    def prepare(self, case: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Makes the candidates of a case, and returns their facts by name."""
        return self._ask({"case": case})

    def seconds(self, name: str) -> float:
        """Runs a candidate once."""
        return self._ask({"run": name})

    def _ask(self, request):
        print(json.dumps(request), file=self._process.stdin)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker stopped at {request}; what it wrote stands above.")
        return json.loads(line)


def measure(workers: Sequence[Worker], case: dict[str, Any], *, rounds: int) -> dict[str, Measured]:
    """Times each candidate of a case once a round, the first time in a row of two not counted."""
    facts, of_worker = {}, {}
    for worker in workers:
        for name, known in worker.prepare(case).items():
            facts[name], of_worker[name] = known, worker
    times = {name: [] for name in facts}
    order = random.Random(0)
    for _ in range(rounds + 1):
        for name in order.sample(list(times), len(times)):  # so that none always follows the same other
            of_worker[name].seconds(name)  # brings its own buffers back into the caches
            times[name].append(of_worker[name].seconds(name))
    return {name: _summary(seconds[1:], facts[name]) for name, seconds in times.items()}


def _summary(seconds: list[float], facts: dict[str, Any]) -> Measured:
    low, median, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    return Measured(median, low, high, facts)
