"""The training program beside plain loops for the same network: whole commands, and steps per second."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.interleave import QUIET
from benchmarks.machine import describe, sentence
from benchmarks.report import markdown

ROOT = Path(__file__).parent.parent
CORES = str(len(os.sched_getaffinity(0)))
# Set, or left, the same for all: nothing compiled is kept from one process to the next.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
ENVIRONMENT |= QUIET | {"JAX_ENABLE_COMPILATION_CACHE": "false", "OMP_NUM_THREADS": CORES}
CONDITIONS = f"""\
Each command in a fresh process, on the same {CORES} cores, in turn; median, and quartiles in brackets. Nothing compiled
is kept from one process to the next; threads of PyTorch wait without spinning. The whole command includes imports,
data and compilation, and ends with the accuracy on the validation and test splits; python -m train also writes a
checkpoint, TensorBoard files and a picture, and as configured evaluates and saves at each interval. Steps per second
are without start-up: of a plain loop those of all steps but the first, and of python -m train those between two
evaluations, less an interval of one step, which holds an evaluation and a checkpoint too."""


class Job(NamedTuple):
    config: str
    steps: int  # for steps per second, as many as take seconds
    options: tuple[str, ...] = ()


class Candidate(NamedTuple):
    module: str
    environment: dict[str, str] = {}
    options: tuple[str, ...] = ()


CANDIDATES = {
    "train, as configured": Candidate("train"),
    "train, evaluated once": Candidate("train", options=("--eval-every", "1000000")),
    "plain Flax": Candidate("benchmarks.plain_flax"),
}
# More threads than one cost more than they bring where layers are small.
PEERS = {
    f"plain PyTorch, {threads} thread{'s' * (threads != '1')}": Candidate(
        "benchmarks.plain_torch", {"OMP_NUM_THREADS": threads}
    )
    for threads in sorted({"1", CORES})
}


def main(out: Path, quick: bool, mnist: str | None = os.environ.get("JBN_DATA"), rounds: int = 5) -> None:
    """Times all commands in turn, prints a table and writes training.json; MNIST is the file or its folder."""
    jobs = [Job("digits_mlp", 5000), Job("digits_cnn", 300)]
    if mnist:
        jobs.insert(1, Job("mnist_mlp", 4210, ("--data.path", str(Path(mnist).absolute()))))
    if quick:
        jobs, rounds = [Job("digits_mlp", 200)], 1
    candidates = CANDIDATES | (PEERS if importlib.util.find_spec("torch") else {})
    print(f"{sentence(describe())}.\n\n{CONDITIONS}\n")
    found = {}
    for job in jobs:
        found[job.config] = _measure(job, candidates, rounds)
        print(markdown(_rows(job.config, found[job.config])), end="\n\n", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": describe(), "conditions": CONDITIONS, "jobs": found}, indent=1)
    (out / "training.json").write_text(text + "\n")
