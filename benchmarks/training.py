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
ENVIRONMENT |= QUIET | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
CONDITIONS = f"""\
Each command in a fresh process on the same {CORES} cores, in turn; median, and quartiles in brackets. Nothing
compiled is kept from one process to the next, and threads of PyTorch wait without spinning. The whole command
includes imports, data, compilation, and accuracy on the validation and test splits; python -m train also
saves a checkpoint, and writes TensorBoard files and a picture.
Steps per second are without start-up. Of "train, as configured" they include its evaluations and checkpoints:
from the first line of metrics.jsonl to the last. Of "train, evaluated once" they do not: of three
evaluations, the first two N steps apart and the last two one step, the second interval is taken off the
first, and N - 1 steps are left. Of a plain loop they are those of all steps but the first."""
TRAIN = {"train, as configured": (), "train, evaluated once": ("--eval-every", "1000000")}
FLAX = {"plain Flax": ("benchmarks.plain_flax", CORES)}
# Where layers are small, a second thread costs more than it brings.
TORCH = {
    f"plain PyTorch, {n} thread{'s' * (n != '1')}": ("benchmarks.plain_torch", n)
    for n in sorted({"1", CORES})
}


class Job(NamedTuple):
    config: str
    steps: int  # whose time gives the steps per second
    data: str | None = None

    @property
    def path(self) -> Path:
        """The file of the config."""
        return ROOT / "configs" / f"{self.config}.toml"


class Run(NamedTuple):
    seconds: float  # of the whole command
    steps_per_second: float
    test_accuracy: float  # after the last step


def main(out: Path, quick: bool, mnist: str | None = os.environ.get("JBN_DATA"), rounds: int = 5) -> None:
    """Times all commands in turn, prints tables, writes training.json; `mnist` is the file or its folder."""
    jobs = [Job("digits_mlp", 5000), Job("digits_cnn", 300)]
    if mnist:
        jobs.append(Job("mnist_mlp", 4210, str(Path(mnist).absolute())))
    if quick:
        jobs, rounds = [Job("digits_mlp", 1000)], 1
    else:
        _rounds(Job("digits_mlp", 2), 1)  # reads the files of all packages once
    print(f"{sentence(describe())}.\n\n{CONDITIONS}\n")
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for job in jobs:
        found[job.config] = {name: _summary(runs) for name, runs in _rounds(job, rounds).items()}
        print(markdown(_rows(job.config, found[job.config])), end="\n\n", flush=True)
        text = json.dumps({"machine": describe(), "conditions": CONDITIONS, "jobs": found}, indent=1)
        (out / "training.json").write_text(text + "\n")


def _rounds(job: Job, rounds: int) -> dict[str, list[Run]]:
    plain = FLAX | (TORCH if importlib.util.find_spec("torch") else {})
    found = {name: [] for name in (TRAIN | plain)}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            for name, options in TRAIN.items():
                found[name].append(_train(job, Path(scratch) / name, options))
            for name, (module, threads) in plain.items():
                found[name].append(_plain(job, Path(scratch), module, threads))
    return found


def _train(job, scratch, options):
    def train(name, *options):
        data = ("--data.path", job.data) if job.data else ()
        seconds, _ = _command("train", str(job.path), "--run-dir", str(scratch / name), *data, *options)
        lines = map(json.loads, (scratch / name / "metrics.jsonl").read_text().splitlines())
        return seconds, [line for line in lines if line["split"] == "test"]

    seconds, lines = train("whole", *options)
    if options:
        _, (first, second, third) = train(
            "rate", "--steps", str(2 * job.steps + 1), "--eval-every", str(job.steps)
        )
        taken = 2 * second["seconds"] - first["seconds"] - third["seconds"]
        rate = (job.steps - 1) / taken
    else:
        rate = (lines[-1]["step"] - lines[0]["step"]) / (lines[-1]["seconds"] - lines[0]["seconds"])
    return Run(seconds, rate, lines[-1]["accuracy"])


def _plain(job, scratch, module, threads):
    longer = scratch / "longer.toml"
    longer.write_text(f"base = {json.dumps(str(job.path))}\nsteps = {job.steps + 1}\n")
    data = ("--data", job.data) if job.data else ()
    seconds, whole = _command(module, str(job.path), *data, threads=threads)
    _, loop = _command(module, str(longer), *data, threads=threads)
    loop, whole = json.loads(loop), json.loads(whole)
    return Run(seconds, loop["steps"] / loop["seconds"], whole["test_accuracy"])


def _command(module, *arguments, threads=CORES):
    command = [sys.executable, "-m", module, *arguments]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": threads}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def _summary(runs):
    return {field: _quartiles([getattr(run, field) for run in runs]) for field in Run._fields}


def _quartiles(values):
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": median, "low": low, "high": high}


def _rows(config, found):
    rows = [[config, "whole command, seconds", "steps per second", "test accuracy"]]
    for name, measured in found.items():
        cells = (
            f"{{median:{form}}} ({{low:{form}}} to {{high:{form}}})".format(**measured[field])
            for field, form in zip(Run._fields, (".1f", ".0f", ".3f"))
        )
        rows.append([name, *cells])
    return rows
