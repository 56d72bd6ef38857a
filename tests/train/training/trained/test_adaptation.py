"""`python -m train adapt`, and a run of two renderings, beside the same in NumPy float64."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers.jobs import fit, results
from train import data
from train.__main__ import main
from train.config import Model
from train.training import load_best
from train.training.trained import serving


@pytest.mark.slow
def test_accuracy_is_that_with_running_batch_and_blended_statistics(copied, capsys):
    config, summary = copied
    arguments = ["--shifts", "original", "brightness", "--batch-sizes", "1", "100", "--prior", "30"]
    assert main(["adapt", config.run_dir, *arguments]) == 0
    printed = capsys.readouterr().out
    found = json.loads((Path(config.run_dir) / "adaptation.json").read_text())
    assert (found["split"], found["step"], found["examples"]) == ("test", summary.best_step, 360)
    assert found["accuracy"]["original"]["running"] == pytest.approx(summary.test_accuracy)
    params, stats = jax.device_get(load_best(Path(config.run_dir)).trained.variables)
    split = data.load(config.data).test
    order = data.order(config.seed, 0, 360)
    inputs, labels = split.take(order)
    for shift, x in (("original", inputs), ("brightness", np.minimum(inputs + 0.3, 1))):
        features = np.float64(x).reshape(360, -1) @ np.float64(params["Dense_0"]["kernel"])
        for kind, prior in (("running", None), ("batch", 0), ("blended", 30)):
            for size in (1, 100):
                correct = 0
                for start in range(0, 360, size):
                    part = features[start : start + size]
                    mean, var = (np.float64(stats["BatchNorm_0"][name]) for name in ("mean", "var"))
                    if prior is not None:
                        w = len(part) / (prior + len(part))
                        spread = w * (1 - w) * (part.mean(0) - mean) ** 2
                        var = (1 - w) * var + w * part.var(0) + spread
                        mean = mean + w * (part.mean(0) - mean)
                    norm, head = params["BatchNorm_0"], params["Dense_1"]
                    hidden = (part - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
                    logits = np.maximum(hidden, 0) @ head["kernel"] + head["bias"]
                    correct += (logits.argmax(-1) == labels[start : start + size]).sum()
                value = found["accuracy"][shift][kind]
                value = value if prior is None else value[str(size)]
                assert value == pytest.approx(correct / 360, abs=1.5 / 360), (shift, kind, size)
                assert f"{value:.3f}" in printed


def test_what_cannot_be_adapted_is_refused_in_a_sentence(copied, capsys, tmp_path):
    path = Path(copied[0].run_dir)

    def refused(run_dir=path, *flags):
        assert main(["adapt", str(run_dir), *flags]) == 2
        return capsys.readouterr().err

    assert "--prior: expected a number of examples >= 0, got -1." in refused(path, "--prior", "-1")
    assert "--batch-sizes: expected numbers >= 1, got 0." in refused(path, "--batch-sizes", "4", "0")
    assert "--shifts: expected one or more, each once" in refused(path, "--shifts", "blur", "blur")
    for norm in ("none", "layer", "flax"):
        other = tmp_path / norm
        other.mkdir()
        config = dataclasses.replace(copied[0], model=Model(norm=norm))
        (other / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        assert "expected a run with model.norm = 'batch' or 'renorm' or 'ghost', whose" in refused(other)


@pytest.mark.slow
def test_run_of_two_renderings_reports_both_and_is_not_folded(make_config, refusal):
    config = make_config(
        data={"renderings": ("original", "inverted")},
        model={"name": "nnx_mlp", "widths": (16,), "domains": 2, "affine_by_domain": True},
    )
    summary, path = fit(config), Path(config.run_dir)
    last = results(path)[-1]
    of_each = last["rendering_accuracy"]
    assert of_each.keys() == {"original", "inverted"} and min(of_each.values()) > 0.2
    assert last["accuracy"] == pytest.approx(sum(of_each.values()) / 2)
    assert f"(original {summary.test['rendering_accuracy']['original']:.4f}, inverted " in summary.reached
    evaluated = serving.evaluate(path)
    assert evaluated["rendering_accuracy"] == summary.test["rendering_accuracy"]
    assert main(["recalibrate", str(path)]) == main(["diagnose", str(path)]) == 0
    assert "expected a run with model.domains = 1" in refusal(serving.export, path, path / "model", fold=True)
