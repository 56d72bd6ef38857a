"""The benchmarks run as commands, at sizes that show no speed; and what they make of what they measure."""

import importlib
import json
import sys

import pytest

from benchmarks import __main__, devices, domains, inference, layers, models, recalibration, resnet_jax
from benchmarks.cases import Case
from benchmarks.interleave import Measured, Worker, measure
from benchmarks.report import layer_tables
from tests.helpers.command import ROOT


class WorkerHere:
    """Stands in for a `Worker`, in this process."""

    def __init__(self, module, **environment):
        self._prepare, self._candidates = importlib.import_module(module).prepare, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def prepare(self, case):
        self._candidates = self._prepare(json.loads(json.dumps(case)))
        return json.loads(json.dumps({name: each.facts for name, each in self._candidates.items()}))

    def seconds(self, name):
        return self._candidates[name].seconds()


@pytest.fixture
def here(monkeypatch, standard_promotion):
    """Have workers measure in this process."""
    for module in (layers, models, inference, devices, recalibration, domains):
        monkeypatch.setattr(module, "Worker", WorkerHere)
        monkeypatch.setattr(module, "find_spec", lambda name: None, raising=False)  # PyTorch's is a process


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `python -m benchmarks`; return what it printed, and the record that it wrote."""

    def run(name, *flags):
        arguments = ["benchmarks", name, *flags, "--quick", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        __main__.main()
        return capsys.readouterr().out, json.loads((tmp_path / f"{name}.json").read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("section, collectives", [("Inference", None), ("4 devices", 2)])
def test_layers_are_measured_with_their_peers(section, collectives, here, command, tmp_path):
    printed, record = command("layers", "--only", section)
    (case,) = record["cases"]
    found = case["candidates"]
    names = {"jbn", "jbn.linen", "jbn.nnx", "flax.linen", "flax.linen, two passes", "flax.nnx", "copy"}
    assert names <= set(found)
    assert all(0 < each["low"] <= each["median"] <= each["high"] for each in found.values())
    assert found["jbn"]["facts"].get("collectives") == collectives
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    for name in found:
        assert ("floor" if name == "copy" else name) in printed


@pytest.mark.slow
def test_collectives_are_counted_for_more_and_more_devices(here, command, monkeypatch):
    kept = ("jbn, shard_map", "flax, jit")
    monkeypatch.setattr(devices, "WAYS", {name: devices.WAYS[name] for name in kept})
    _, record = command("devices")
    named = record["fits"]["jbn, shard_map"]
    # A row of four values for each device there, two sums back.
    assert named["forward"] == {"collectives": 1, "fixed": 0, "each": 16}
    assert named["backward"] == {"collectives": 1, "fixed": 8, "each": 0}


@pytest.mark.slow
def test_residual_networks_take_the_same_steps_with_each_layer(here, monkeypatch):
    kept = ("jbn", "flax", "jbn remat")
    monkeypatch.setattr(resnet_jax, "CANDIDATES", {name: resnet_jax.CANDIDATES[name] for name in kept})
    case = models.RESNET_50 | models.TINY
    worker = WorkerHere("benchmarks.resnet_jax")
    facts = worker.prepare(case)  # which compares their losses, and fails if they differ
    residuals = [facts[name]["residual bytes"] for name in ("jbn remat", "jbn", "flax")]
    assert residuals == sorted(set(residuals))
    assert all(worker.seconds(name) > 0 for name in kept)


@pytest.mark.slow
def test_a_network_is_timed_with_its_norms_and_without_them(command, here):
    printed, record = command("inference")
    assert [case["model"] for case in record["cases"]] == ["ResNet-50"] * 2
    found = record["cases"][0]["candidates"]
    whole, folded = (found[name]["facts"]["bytes accessed"] for name in ("flax.linen", "flax.linen, folded"))
    assert folded < whole
    assert "| flax.linen, folded " in printed


@pytest.mark.slow
def test_recalibration_is_measured_beside_evaluation(here, command):
    printed, record = command("recalibration")
    names = [f"{what}, {layer}.linen" for layer in ("flax", "jbn") for what in ("evaluate", "recalibrate")]
    assert list(record["candidates"]) == names
    assert all(each["median"] > 0 and name in printed for name, each in record["candidates"].items())


@pytest.mark.slow
def test_batches_of_several_domains_are_measured_beside_a_call_for_each(here, command, monkeypatch):
    monkeypatch.setattr(domains, "DOMAINS", (2,))
    printed, record = command("domains")
    (case,) = record["cases"]
    names = ["without domains", "domain=", "a call for each, split before", "a masked call for each"]
    assert list(case["candidates"]) == names
    assert all(each["median"] > 0 and name in printed for name, each in case["candidates"].items())


def test_networks_are_shown_with_what_is_known_of_each(command, here, monkeypatch):
    found = {
        "jbn": Measured(0.2, 0.1, 0.3, {"residual bytes": 2**20, "temp bytes": 3 * 2**20}),
        "without norm": Measured(0.1, 0.1, 0.1, {}),
    }
    measured = []
    monkeypatch.setattr(models, "measure", lambda workers, case, rounds: measured.append(case) or found)
    printed, record = command("models")
    assert [case["size"] for case in measured] == 2 * [models.TINY["size"]]
    assert [case["model"] for case in record["cases"]] == ["ResNet-20", "ResNet-50"]
    assert record["cases"][0]["candidates"]["jbn"]["facts"]["residual bytes"] == 2**20
    row = next(line for line in printed.splitlines() if line.startswith("| jbn "))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("jbn", "200.0", "100.0 to 300.0", "1.0", "", "3.0", "")
    ]


@pytest.mark.slow
def test_candidates_are_timed_in_turn_in_a_process_of_their_own(tmp_path):
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
