"""A training step of one layer whose batch mixes domains, beside a call for each domain, split or masked."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from benchmarks.interleave import Worker, measure
from benchmarks.machine import describe, sentence
from benchmarks.report import markdown
from benchmarks.worker import Candidate

SHAPES = [(32, 56, 56, 64), (32, 14, 14, 256), (8192, 512)]
DOMAINS = (2, 4, 10)
TINY = [(20, 3, 3, 4)]


def main(out: Path, quick: bool) -> None:
    """Measures all cases, prints a table, and writes domains.json."""
    cases = [
        dict(shape=shape, domains=domains) for shape in (TINY if quick else SHAPES) for domains in DOMAINS
    ]
    with Worker("benchmarks.domains") as worker:
        results = [(case, measure([worker], case, rounds=2 if quick else 21)) for case in cases]
    described = describe()
    record = [
        case | {"candidates": {name: each._asdict() for name, each in found.items()}}
        for case, found in results
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "domains.json").write_text(json.dumps({"machine": described, "cases": record}, indent=1))
    rows = [["shape, domains", *results[0][1], "without, milliseconds"]]
    for case, found in results:
        plain = found["without domains"].median
        ratios = [f"{each.median / plain:.2f}" for each in found.values()]
        shape = "x".join(map(str, case["shape"]))
        rows.append([f"{shape}, {case['domains']}", *ratios, f"{plain * 1e3:.2f}"])
    print(markdown(rows), end="\n\n")
    print(sentence(described))


def prepare(case: dict[str, Any]) -> dict[str, Candidate]:
    """Compiles each way to normalize a batch of several domains, forward and backward."""
    shape, domains, rng = tuple(case["shape"]), case["domains"], np.random.RandomState(0)
    index = jnp.asarray(rng.permutation(np.arange(shape[0]) % domains), jnp.int32)
    x, dy = (jnp.asarray(rng.normal(0.5, 1, shape), jnp.float32) for _ in range(2))
    params, running = jbn.init((domains, shape[-1]))
    own = [jax.tree.map(lambda leaf, domain=d: leaf[domain], (params, running)) for d in range(domains)]
    rows = [np.flatnonzero(index == d) for d in range(domains)]
    split = lambda array: [jnp.asarray(array[part]) for part in rows]
    ways = {
        "without domains": (_plain, x, dy, own[0]),
        "domain=": (partial(_mixed, index), x, dy, (params, running)),
        "a call for each, split before": (_split, split(x), split(dy), own),
        "a masked call for each": (partial(_masked, index), x, dy, own),
    }
    return {name: _candidate(*way) for name, way in ways.items()}


def _plain(x, params, running):
    return jbn.batch_norm(x, params, running, train=True)


def _mixed(index, x, params, running):
    return jbn.batch_norm(x, params, running, train=True, domain=index)


def _split(parts, *own):
    return [jbn.batch_norm(x, *of_domain, train=True) for x, of_domain in zip(parts, own)]


def _masked(index, x, *own):
    y, new = jnp.zeros_like(x), []
    for domain, of_domain in enumerate(own):
        mask = (index == domain).reshape(-1, *[1] * (x.ndim - 1))
        its, updated = jbn.batch_norm(x, *of_domain, train=True, mask=mask)
        y = jnp.where(mask, its, y)
        new.append(updated)
    return y, new


def _candidate(f: Callable[..., Any], x: Any, dy: Any, state: Any) -> Candidate:
    def step(spares, dy, x, state):
        outputs, backward = jax.vjp(f, x, *state)
        is_split = isinstance(x, list)
        y, new = map(list, zip(*outputs)) if is_split else outputs
        zeros = jax.tree.map(jnp.zeros_like, new)
        dx, *of_state = backward(list(zip(dy, zeros)) if is_split else (dy, zeros))
        return (y, dx), (of_state, new)

    spares = [jax.tree.map(jnp.zeros_like, (x, x))]
    program = jax.jit(step, donate_argnums=0, keep_unused=True).lower(spares[0], dy, x, state).compile()

    def seconds():
        start = time.perf_counter()
        spares[0], _ = jax.block_until_ready(program(spares[0], dy, x, state))
        return time.perf_counter() - start

    return Candidate(seconds, {})
