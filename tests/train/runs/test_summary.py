import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from train.runs import summary
from train.runs.log import Log
from train.runs.summary import Summary


def test_summary_has_the_test_results_of_the_best_step_and_the_maximum_of_the_test_curve(tmp_path):
    with Log(tmp_path, first_step=0, total_steps=30) as log:
        for step, accuracy in ((10, 0.9), (20, 0.7), (30, 0.8)):
            splits = {"train": 0.1, "validation": 0.2, "test": accuracy}
            log.results(step, 1.0, {name: {"loss": 1 / step, "accuracy": a} for name, a in splits.items()})
    checkpoints = SimpleNamespace(latest_step=30, best_step=20)
    reached = summary.summarize(tmp_path, checkpoints, "stopped", 1.23456, 99.96)
    assert (reached.status, reached.step, reached.best_step) == ("stopped", 30, 20)
    assert (reached.test_accuracy, reached.test_loss, reached.best_test_accuracy) == (0.7, 0.05, 0.9)
    assert (reached.wall_seconds, reached.examples_per_second) == (1.235, 100.0)
    assert not reached.finished


def test_summary_of_a_run_without_an_evaluation_has_no_numbers(tmp_path):
    reached = summary.summarize(tmp_path, SimpleNamespace(latest_step=3, best_step=3), "stopped", 1.0, None)
    assert (reached.test_accuracy, reached.test_loss, reached.best_test_accuracy) == (None, None, None)
    assert reached.examples_per_second is None


def test_summary_says_what_fits_what_was_measured(tmp_path):
    checkpoints = SimpleNamespace(latest_step=20, best_step=10)
    classes = {
        "loss": 0.5,
        "accuracy": 0.9,
        "balanced_accuracy": 0.75,
        "class_accuracy": {"a": 0.5, "b": None},
    }
    many = classes | {"class_accuracy": dict.fromkeys(map(str, range(21)), 0.5)}
    numbers = {"loss": 0.25, "mean_absolute_error": 31.25, "r2": 0.75}
    for metrics, said in (
        (classes, "test accuracy 0.9000, balanced accuracy 0.7500 (a 0.5000, b -)"),
        (many, "test accuracy 0.9000, balanced accuracy 0.7500"),
        (numbers, "test R^2 0.7500, mean absolute error 31.25"),
        (numbers | {"r2": None}, "test mean absolute error 31.25"),
        ({"loss": 0.5, "accuracy": 0.9}, "test accuracy 0.9000"),
    ):
        for validation, which in (({}, ""), ({"validation": {"loss": 0.5}}, ", the best by validation")):
            with Log(tmp_path, first_step=0, total_steps=20) as log:
                for step in (10, 20):
                    test = metrics if step == 10 else metrics | {"r2": 0.875}
                    log.results(step, 1.0, validation | {"test": test})
            reached = summary.summarize(tmp_path, checkpoints, "stopped", 1.0, None)
            assert reached.test == metrics and reached.best_test_r2 == 0.875
            assert reached.reached == f"{said} at step 10{which}"
    # As earlier versions wrote it.
    assert Summary("finished", 9, 3, test_accuracy=0.5).reached.startswith("test accuracy 0.5000 at step 3")
    assert Summary("stopped", 0).reached == "no evaluation yet"
    assert Summary("stopped", 1, test={"class_accuracy": {"a": 0.5}}).reached == "no evaluation yet"


def test_broken_summary_counts_as_none(tmp_path):
    path = tmp_path / "summary.json"
    assert summary.read_summary(tmp_path) is None
    for content in ("", "[]", '{"status": "fin', '{"step": 3}', '{"status": "finished", "step": "x"}', "3"):
        path.write_text(content)
        assert summary.read_summary(tmp_path) is None, content
    for spoilt in (
        *({"status": 3}, {"status": ["finished"]}, {"step": True}, {"step": 2.5}, {"best_step": [1]}),
        *({"test_accuracy": "high"}, {"test_accuracy": 10**400}, {"wall_seconds": {}}, {"validated": 1}),
        *({"test": 3}, {"test": [1]}, {"test": {"r2": [1]}}, {"test": {"class_accuracy": 3}}),
        *({"recalibrated": "x"}, {"recalibrated": {"accuracy": {"cat": 1}}}),
    ):
        path.write_text(json.dumps({"status": "finished", "step": 3} | spoilt))
        assert summary.read_summary(tmp_path) is None, spoilt
    path.write_text(json.dumps({"status": "finished"}))
    assert not summary.read_summary(tmp_path).finished
    path.write_text(json.dumps({"status": "finished", "step": 3}))
    assert (
        summary.read_summary(tmp_path) == Summary("finished", 3) and summary.read_summary(tmp_path).finished
    )


def test_peak_of_the_host_is_the_most_that_this_process_has_held():
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        assert 10e6 < summary.peak_host_bytes() < 100e9
        return
    before = summary.peak_host_bytes()
    now = int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) * 1024
    more = before - now + 64 * 2**20
    held = np.ones(more, np.uint8)
    assert 32 * 2**20 < summary.peak_host_bytes() - before < 96 * 2**20
    del held
    assert summary.peak_host_bytes() > before + 32 * 2**20


def test_peak_of_the_devices_is_that_of_the_fullest(monkeypatch):
    def peak(*stats):
        devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        return summary.peak_device_bytes()

    assert peak(None) is None
    assert peak({"bytes_in_use": 3}, None) is None
    assert peak({"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}, {}) == 7
