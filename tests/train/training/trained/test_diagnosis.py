"""`python -m train diagnose`: the running statistics of a run beside its data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.helpers.groups import undrawn
from tests.helpers.jobs import fit
from train.__main__ import main
from train.runs.summary import read_summary


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """tests/commands/test_readme.py has a report with its charts."""
    undrawn(monkeypatch)


def diagnosed(config, capsys, *flags):
    """Return what the command prints, its numbers, and the kinds of its findings."""
    capsys.readouterr()
    assert main(["diagnose", config.run_dir, *map(str, flags)]) == 0
    found = json.loads((Path(config.run_dir) / "diagnosis.json").read_text())
    return capsys.readouterr().out, found, [finding["kind"] for finding in found["findings"]]


@pytest.mark.slow
def test_run_is_healthy_on_its_test_split_and_other_data_are_named(copied, capsys, tmp_path):
    config, _ = copied
    printed, found, kinds = diagnosed(config, capsys)
    assert kinds == [] and found["examples"] == 360 and "Nothing is wrong" in printed
    assert found["losses"]["running"] == pytest.approx(read_summary(Path(config.run_dir)).test_loss, rel=0.05)
    page = (Path(config.run_dir) / "report.html").read_text()
    assert "<h2" in page and "Running statistics" in page and "Nothing is wrong" in page
    x, y = load_digits(return_X_y=True)
    x = (x / 64).astype(np.float32).reshape(-1, 8, 8, 1)  # a quarter of what the run was trained on
    np.savez(tmp_path / "darker.npz", x_train=x[:9], y_train=y[:9], x_test=x[9:], y_test=y[9:])
    printed, found, kinds = diagnosed(config, capsys, "--data.path", tmp_path / "darker.npz")
    assert kinds == ["other data"] and "times as large as in training" in printed
    assert "times as large as in training" in (Path(config.run_dir) / "report.html").read_text()


@pytest.mark.slow
def test_flax_layers_and_nnx_models_are_diagnosed_likewise(make_config, capsys, tmp_path):
    for name, norm, layer in (("mlp", "flax", "BatchNorm_0"), ("nnx_mlp", "batch", "hidden/0/norm")):
        model = {"name": name, "norm": norm, "widths": (16,), "norm_momentum": 0.999, "norm_debias": False}
        config = make_config(run_dir=str(tmp_path / name), model=model)
        fit(config)
        printed, found, kinds = diagnosed(config, capsys)
        assert kinds == ["lag"] and found["layers"][0]["name"] == layer, printed
        remedy = found["findings"][0]["remedy"]
        # What is advised has to work: the statistics of Flax's layer are not pooled.
        now = (
            f"python -m train recalibrate {config.run_dir}." if norm == "batch" else "cannot be pooled anew."
        )
        assert f"{now} Next time: model.norm = 'batch'" in remedy


def test_run_without_running_statistics_is_refused(make_config, capsys):
    for norm in ("none", "layer"):
        config = make_config(run_dir=f"{make_config().run_dir}_{norm}", model={"norm": norm, "widths": (8,)})
        folder = Path(config.run_dir)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        assert main(["diagnose", config.run_dir]) == 2
        said = capsys.readouterr().err
        assert (
            "expected a run with model.norm = 'batch' or 'renorm' or 'ghost' or 'flax'" in said
            and f"got '{norm}'" in said
        )
