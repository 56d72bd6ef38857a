import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from command import ROOT

from train.training import loop
from train.runs import summary
from train.training.job import Job
from train.runs.stopping import StopRequests


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(loop.curves, "draw", lambda run_dir: None)


def test_heading_says_what_is_trained_on_what(make_config):
    job = Job(make_config())
    lines = summary.heading(job, None).splitlines()
    assert lines == [
        "data   digits: 1,293 train, 144 validation, 360 test examples",
        f"model  mlp: {64 * 16 + 2 * 16 + 16 * 10 + 10:,} parameters, norm batch",
        f"run    30 steps of 128 on {jax.devices()[0].device_kind}",
    ]
    assert summary.heading(job, 1200).endswith(", going on from step 1,200")
    job.mesh = SimpleNamespace(size=4)
    assert summary.heading(job, None).endswith(f" on 4 x {jax.devices()[0].device_kind}")


def test_rate_is_that_of_training_alone(make_config, monkeypatch):
    """With a clock that goes on by a second whenever it is read."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(loop, "SECONDS_PER_DISPATCH", 0)  # one step each
    reached = loop.fit(make_config(steps=7, eval_every=3), StopRequests())
    assert reached["examples_per_second"] == 128
    assert reached["wall_seconds"] > 7


def test_rate_of_a_session_that_only_compiled_is_not_known(make_config):
    assert loop.fit(make_config(steps=1), StopRequests())["examples_per_second"] is None


MEASURE = """
import numpy as np
from train.runs.summary import peak_host_bytes
before = peak_host_bytes()
np.ones(50_000_000)
print(before, peak_host_bytes())
"""


def test_peak_of_the_host_counts_what_this_process_held_and_no_other():
    held = bytearray(b"1") * 600_000_000
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before < len(held)
    assert 380e6 < after - before < 450e6


def test_peak_of_the_devices_is_that_of_the_fullest(monkeypatch):
    def devices(*stats):
        monkeypatch.setattr(
            jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
        )
        return summary.peak_device_bytes()

    assert devices(None) is None
    assert devices({"bytes_in_use": 3}, None) is None
    assert devices({"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}, {}) == 7
