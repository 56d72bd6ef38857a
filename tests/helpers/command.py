"""`python -m train` as a user runs it: in a process of its own, in the checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"JAX_NUM_CPU_DEVICES": "8"}  # as many as the tests' own

# A job of a second, which writes four checkpoints.
JOB = [
    *("configs/digits_mlp.toml", "--steps", "20", "--eval-every", "5"),
    *("--model.widths", "16", "--devices", "1"),
]


def start(*arguments, code=None, **environment):
    """Start the command, or other Python code with the same arguments."""
    program = ["-c", code] if code else ["-m", "train"]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        env=os.environ | ENVIRONMENT | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    """Wait for a process that was started, and return what it printed and exited with."""
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*arguments, **environment):
    """Run the command to its end."""
    return finish(start(*arguments, **environment))


def assert_short(complaint, *expected):
    """Assert that it is a line or two, in plain words, which has all of these in it."""
    assert len(complaint.strip().splitlines()) <= 2 and len(complaint) < 1000, complaint
    assert "Traceback" not in complaint and "RESOURCE_EXHAUSTED" not in complaint
    for text in expected:
        assert text in complaint, complaint


class Forks:
    """Processes that have imported the program already, forked from one that has done nothing else."""

    SERVER = """
import json, os, sys, warnings
import train.training
from train.__main__ import main

for line in sys.stdin:
    before, arguments = json.loads(line)
    with warnings.catch_warnings(action="ignore"):  # JAX has imported threads, but not started them
        child = os.fork()
    if not child:
        exec(before, {})
        sys.exit(main(arguments))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for stream in (sys.stdout, sys.stderr):
        print(f"\\0{code}", file=stream, flush=True)
"""

    def __init__(self):
        self._server = start(code=self.SERVER, MALLOC_ARENA_MAX="1")  # so that memory is what is used of it

    def __enter__(self):
        return self

    def __exit__(self, *_):
        finish(self._server)

    def run(self, *arguments, before):
        """Run the command in a process that first runs some code."""
        request = json.dumps([before, [str(argument) for argument in arguments]])
        print(request, file=self._server.stdin, flush=True)
        out, err = (self._read(stream) for stream in (self._server.stdout, self._server.stderr))
        return subprocess.CompletedProcess(arguments, out[1], out[0], err[0])

    def _read(self, stream):
        lines = []
        for line in stream:
            text, end, code = line.partition("\0")
            lines.append(text)
            if end:
                return "".join(lines), int(code)
        raise RuntimeError(f"the process that forks has ended: {''.join(lines)}")
