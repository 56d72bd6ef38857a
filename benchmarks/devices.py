"""What statistics over devices cost, counted in the compiled program: collectives, and bytes on the wire."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn.linen
from benchmarks.interleave import Worker
from benchmarks.machine import describe, sentence
from benchmarks.report import markdown
from benchmarks.worker import Candidate

COUNTED, EXTRAPOLATED = (2, 4, 8, 16, 32, 64), (128, 256, 512, 1024, 2048, 4096)  # devices
FEATURES = (64, 256, 1024)  # on 64 devices, still fewer than those of which one row each is sent
PASSES = ("forward", "backward", "rare")
VALUE = 4  # bytes of a float32
FORMULAS = """\
payload      (fixed + each * devices) * features bytes, fitted to what XLA made of 2 to 64 simulated devices
on the wire  2 * (devices - 1) / devices * payload: what each device sends in a ring all-reduce
time         collectives * latency + on the wire / bandwidth: a model, nothing of it was measured
rare         in a branch, taken where |mean - running mean|^2 > 9 (var + epsilon) in some feature; not in the
             numbers of whole layers
for ...      the code that jbn has for GPU and TPU, but compiled for CPUs"""


class Way(NamedTuple):
    layer: Callable[..., flax.linen.Module]
    named: bool  # axis_name inside shard_map; else plain jit of a sharded batch
    platform: str = "cpu"  # for which it is lowered


WAYS = {
    "jbn, shard_map": Way(jbn.linen.BatchNorm, named=True),
    "flax, shard_map": Way(flax.linen.BatchNorm, named=True),
    "jbn, jit on CPU": Way(jbn.linen.BatchNorm, named=False),
    "jbn, jit for GPU": Way(jbn.linen.BatchNorm, named=False, platform="cuda"),
    "jbn, jit for TPU": Way(jbn.linen.BatchNorm, named=False, platform="tpu"),
    "flax, jit": Way(flax.linen.BatchNorm, named=False),
}


class Sent(NamedTuple):
    collectives: int
    payload: int  # bytes of the results


def prepare(case: dict[str, int]) -> dict[str, Candidate]:
    """Counts what one layer in training sends, in each way."""
    return {way: Candidate(_no_time, _count(WAYS[way], **case)) for way in WAYS}


def main(out: Path, quick: bool, bandwidth: float = 100e9, latency: float = 20e-6) -> None:
    """Counts, extrapolates, prints tables and writes devices.json; in bytes a second, and seconds."""
    cases = list(product(FEATURES[1:2] if quick else FEATURES, COUNTED[:2] if quick else COUNTED))
    with Worker("benchmarks.devices", JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(max(COUNTED))) as worker:
        counted = [
            {"features": c, "devices": d, "way": way, **facts}
            for c, d in cases
            for way, facts in worker.prepare({"features": c, "devices": d}).items()
        ]
    fits = {way: {name: _fit(counted, way, name) for name in PASSES} for way in WAYS}
    model = {"bandwidth": bandwidth, "latency": latency}
    scale = [
        {"features": c, "devices": d, "way": way} | _cost(fits[way], c, d, **model)
        for c in sorted({c for c, _ in cases})
        for d in COUNTED + EXTRAPOLATED
        for way in WAYS
    ]
    for row in scale:
        row["counted"] = (row["features"], row["devices"]) in cases
    crossings = {c: _three_are_faster_from(c, **model) for c in FEATURES}
    print(f"One layer in training, float32. {sentence(describe())}.\n\n{FORMULAS}\n")
    print(markdown(_fit_rows(fits)), end="\n\n")
    for c in sorted({c for c, _ in cases}):
        print(f"{c} features; time at {bandwidth / 1e9:g} GB/s, {latency * 1e6:g} microseconds a collective")
        print(markdown(_scale_rows([row for row in scale if row["features"] == c])), end="\n\n")
    print("Three all-reduces of one row take less time than the one of a row for each device:")
    print("; ".join(f"{c} features: from {d} devices" for c, d in crossings.items()))
    found = {"machine": describe(), "formulas": FORMULAS, "model": model, "counted": counted, "fits": fits}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found | {"scale": scale, "three_are_faster_from": crossings}, indent=1)
    (out / "devices.json").write_text(text + "\n")


def _no_time():
    raise RuntimeError("simulated devices share one processor, so their time says nothing.")


def _count(way, features, devices):
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    model = way.layer(use_running_average=False, axis_name="data" if way.named else None)
    sharded, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((8 * devices, features), jnp.float32, sharding=sharded)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf.update(sharding=replicated), variables)
    forward = partial(model.apply, mutable=["batch_stats"])
    if way.named:
        forward = jax.shard_map(forward, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P()))

    def both(variables, x):
        f = lambda params, x: forward({**variables, "params": params}, x)
        y, vjp, updated = jax.vjp(f, variables["params"], x, has_aux=True)
        # What comes back depends on y, as in a network; else its sums would travel with those of the moments.
        return y, updated, vjp(jnp.sin(y))

    (always, rare), (always_both, rare_both) = (_sent(way, f, variables, x) for f in (forward, both))
    if rare != rare_both:
        raise ValueError(f"{way}: the gradient has changed what the branches of the forward pass send.")
    backward = Sent(*(whole - part for whole, part in zip(always_both, always)))
    return {name: sent._asdict() for name, sent in zip(PASSES, (always, backward, rare))}


def _sent(way, f, *args):
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=(way.platform,))
    text = lowered.compile().as_text()
    found = list(all_reduces(text))
    return [
        Sent(len(sizes), sum(sizes))
        for sizes in ([size for size, in_branch in found if in_branch == rare] for rare in (False, True))
    ]


def all_reduces(text: str) -> Iterator[tuple[int, bool]]:
    """Yields for each all-reduce of a compiled program its bytes, and whether it is in a branch."""
    bodies = dict(re.findall(r"^(ENTRY %\S+|%\S+) \(.*\{\n((?:  .*\n)*)\}", text, re.MULTILINE))
    entry = next(name for name in bodies if name.startswith("ENTRY"))
    waiting = [(entry, False)]
    while waiting:
        name, in_branch = waiting.pop()
        for line in bodies[name].splitlines():
            operation = re.match(r"  (?:ROOT )?%\S+ = (.*?) ([a-z][a-z-]*)\(", line)
            result, kind = operation.groups()
            if kind in ("all-reduce", "all-reduce-start"):
                yield sum(map(_bytes, re.findall(r"([a-z]+)(\d*)\[([\d,]*)\]", result))), in_branch
            elif re.match("all-|collective-|reduce-scatter", kind) and not kind.endswith("-done"):
                raise ValueError(f"{kind}: wanted all-reduce alone, for which the formulas are.")
            called = re.findall(r" \w+=(%[^\s,]+|\{%[^}]*\})", line)
            names = [name for group in called for name in re.findall(r"%[^\s,{}]+", group)]
            waiting += [(name, in_branch or kind == "conditional") for name in names]


def _bytes(shape):
    _, bits, sizes = shape
    return max(1, int(bits or 8) // 8) * int(np.prod([int(size) for size in sizes.split(",") if size]))


def _fit(counted, way, name):
    rows = [(row["devices"], row["features"], row[name]) for row in counted if row["way"] == way]
    devices, features, sent = zip(*rows)
    a_feature = np.array([each["payload"] for each in sent]) / features
    each, fixed = (round(value, 6) + 0.0 for value in np.polyfit(devices, a_feature, 1))
    off = np.max(np.abs(fixed + each * np.array(devices) - a_feature))
    numbers = {each["collectives"] for each in sent}
    if len(numbers) > 1 or off > 1e-3:
        raise ValueError(
            f"{way}, {name}: {numbers} collectives, {off} bytes a feature off the line; wanted one, 0."
        )
    return {"collectives": numbers.pop(), "fixed": fixed, "each": each}


def _cost(fits, features, devices, bandwidth, latency):
    always = [fits[name] for name in ("forward", "backward")]
    payload = sum(fit["fixed"] + fit["each"] * devices for fit in always) * features
    return _model(sum(fit["collectives"] for fit in always), payload, devices, bandwidth, latency)


def _model(collectives, payload, devices, bandwidth, latency):
    wire = 2 * (devices - 1) / devices * payload
    seconds = collectives * latency + wire / bandwidth
    return {"collectives": collectives, "payload": payload, "on_the_wire": wire, "model_seconds": seconds}


def _three_are_faster_from(features, **model):
    row = 4 * VALUE * features
    faster = (
        devices
        for devices in range(2, 1 << 24)
        if _model(3, 2 * row, devices, **model)["model_seconds"]
        < _model(1, devices * row, devices, **model)["model_seconds"]
    )
    return next(faster, None)


def _fit_rows(fits):
    def cell(collectives, fixed, each):
        payload = ([f"{fixed:g}"] if fixed else []) + ([f"{each:g} devices"] if each else [])
        return f"{collectives}, {' + '.join(payload)}" if collectives else ""

    rows = [[way, *(cell(**found[name]) for name in PASSES)] for way, found in fits.items()]
    return [["collectives, and their payload in bytes a feature", *PASSES], *rows]


def _scale_rows(scale):
    rows = [["devices", "", *(f"{way}: KB" for way in WAYS), *(f"{way}: us" for way in WAYS)]]
    for start in range(0, len(scale), len(WAYS)):
        found = scale[start : start + len(WAYS)]
        source = "counted" if found[0]["counted"] else "extrapolated"
        kilobytes = [f"{row['on_the_wire'] / 1e3:.1f}" for row in found]
        microseconds = [f"{row['model_seconds'] * 1e6:.0f}" for row in found]
        rows.append([str(found[0]["devices"]), source, *kilobytes, *microseconds])
    return rows
