"""The benchmarks run as commands, at sizes that show no speed; and what they make of what they measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cases import Case
from benchmarks.interleave import Measured, Worker, measure
from benchmarks.report import layer_tables

ROOT = Path(__file__).parent.parent


def run(*arguments, out):
    command = [sys.executable, "-m", "benchmarks", *arguments, "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("section, collectives", [("Inference", None), ("4 devices", 2)])
def test_layers_are_measured_beside_their_peers(section, collectives, tmp_path):
    printed = run("layers", "--only", section, out=tmp_path)
    (case,) = json.loads((tmp_path / "layers.json").read_text())["cases"]
    found = case["candidates"]
    assert {"jbn", "jbn.linen", "jbn.nnx", "flax.linen", "flax.linen, two passes", "flax.nnx", "copy"} <= set(
        found
    )
    assert all(0 < each["low"] <= each["median"] <= each["high"] for each in found.values())
    assert found["jbn"]["facts"].get("collectives") == collectives
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    for name in found:
        assert ("floor" if name == "copy" else name) in printed


def test_collectives_are_counted_for_more_and_more_devices(tmp_path):
    run("devices", out=tmp_path)
    fits = json.loads((tmp_path / "devices.json").read_text())["fits"]
    named = fits["jbn, shard_map"]
    # A row of four values for each device there, two sums back.
    assert named["forward"] == {"collectives": 1, "fixed": 0, "each": 16}
    assert named["backward"] == {"collectives": 1, "fixed": 8, "each": 0}


def test_residual_networks_take_the_same_steps_with_each_layer(tmp_path):
    run("models", out=tmp_path)  # which compares their losses, and fails if they differ
    for case in json.loads((tmp_path / "models.json").read_text())["cases"]:
        kept = {name: each["facts"].get("residual bytes") for name, each in case["candidates"].items()}
        assert kept["jbn remat"] < kept["jbn"] < kept["flax"]


def test_candidates_are_timed_in_turn(tmp_path, monkeypatch):
    (tmp_path / "two_candidates.py").write_text(
        "from benchmarks.worker import Candidate\n"
        "calls = []\n"
        "def candidate(name, seconds):\n"
        "    return Candidate(lambda: (calls.append(name), seconds)[1], {'calls': calls})\n"
        "def prepare(case):\n"
        "    calls.clear()\n"
        "    return {name: candidate(name, seconds) for name, seconds in case.items()}\n"
    )
    with Worker("two_candidates", PYTHONPATH=f"{tmp_path}:{ROOT}") as worker:
        found = measure([worker], {"slow": 2.0, "fast": 1.0}, rounds=3)
        calls = worker.prepare({})  # nothing is left of the case before
    assert {name: each.median for name, each in found.items()} == {"slow": 2.0, "fast": 1.0}
    assert calls == {}


def test_table_has_times_over_those_of_flax_and_the_floor():
    def taken(seconds, **facts):
        return Measured(seconds, seconds, seconds, facts)

    found = {
        "jbn": taken(1e-3, bytes=12.0),
        "flax.linen": taken(4e-3, bytes=15.0),
        "copy": taken(0.5e-3),
    }
    shapes = (2, 3, 3, 4), (8, 4)
    table = layer_tables([(Case("A section", shape), found) for shape in shapes]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["A section", "mean", "2x3x3x4", "8x4", "bytes, in units of x"]
    assert rows[2] == ["jbn", "**0.25**", "0.25", "0.25", "12.0"]
    assert rows[3] == ["floor", "**0.50**", "0.50", "0.50", ""]  # 8 passes, of which a copy takes 2
    assert rows[5][2:] == ["4.00", "4.00", ""]
