"""A process that times what another one asks for: `python -m benchmarks.worker MODULE`.

It reads requests from its input, one JSON object a line, and answers each with one line on its output. The
module has one function, `prepare(case) -> {name: Candidate}`.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    seconds: Callable[[], float]  # does the work once, and returns how long that took
    facts: dict[str, Any]  # what is known without running: bytes that the compiler counts, say


def serve(module: str) -> None:
    """Answers {"case": ...} with each candidate's facts, and {"run": name} with the seconds of one call."""
    prepare = importlib.import_module(module).prepare
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
        candidates = {}
        for line in sys.stdin:
            request = json.loads(line)
            if "case" in request:
                candidates.clear()  # before the next ones are made, for they may be large
                candidates |= prepare(request["case"])
                answer = {name: candidate.facts for name, candidate in candidates.items()}
            else:
                answer = candidates[request["run"]].seconds()
            print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    serve(sys.argv[1])
