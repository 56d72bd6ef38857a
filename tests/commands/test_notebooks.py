"""The notebooks of docs/ run, show what they say, and are committed as they were run."""

import json
import re

import numpy as np
import pytest

from tests.helpers.command import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "docs").glob("*/*.ipynb"))}


def code_cells(name):
    cells = json.loads(NOTEBOOKS[name].read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, standard_promotion):
    """Return what runs a notebook with other constants, in an empty folder, and returns its variables."""
    import matplotlib.pyplot as plt  # half a second, which quick tests do not have

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JBN_DATA", raising=False)
    plt.switch_backend("agg")

    def run(name, **constants):
        first, *others = code_cells(name)
        settings = "".join(first["source"])
        for key, value in constants.items():
            settings, count = re.subn(rf"^{key} = .+$", f"{key} = {value}", settings, flags=re.M)
            assert count == 1, key
        namespace = {"__name__": name}
        exec(settings, namespace)
        for cell in others:
            source = "".join(cell["source"])
            exec(compile(source, name, "exec"), namespace)
            shows = bool(capsys.readouterr().out or plt.get_fignums())
            assert shows == bool(cell["outputs"]), source
            plt.close("all")
        return namespace

    with plt.rc_context():
        yield run


@pytest.mark.slow
def test_with_batch_norm_the_network_of_figure_1_learns_first(run):
    found = run("figure_1", STEPS=400, EVAL_EVERY=100)
    without, with_norm = (found["accuracy"][f"{word} batch norm"] for word in ("without", "with"))
    assert without.shape == with_norm.shape == (4,)
    assert without.max() < 0.3 and with_norm[-1] > 0.8  # chance is 0.1
    moves, holds_still = map(np.median, found["wanders"].values())
    assert holds_still < 0.3 < moves


@pytest.mark.slow
def test_diagnosis_closes_the_gap_and_tells_its_causes_apart(run):
    found = run("diagnose_a_model", STEPS=150)
    assert found["before"] < found["in_training"] - 0.2
    assert min(found["after"], found["after_debiasing"]) > 0.9
    assert found["unscaled"] < 0.6
    kinds = lambda name: [finding.kind for finding in found[name].findings]
    assert (kinds("lag"), kinds("healthy"), kinds("other_data")) == (["lag"], [], ["other data"])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_as_it_was_run_without_traces_of_a_machine(name):
    text = NOTEBOOKS[name].read_text()
    notebook, cells = json.loads(text), code_cells(name)
    assert len(text) < 150_000
    assert [cell["execution_count"] for cell in cells] == [*range(1, 1 + len(cells))]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook["metadata"] == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert all(set(cell["metadata"]) <= {"mystnb"} for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    # Neither errors nor warnings, which are on stderr.
    assert {output.get("name", "picture") for output in outputs} == {"stdout", "picture"}
    assert all("image/png" in output["data"] for output in outputs if "name" not in output)
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"(^|[\s'\"=(])(/|~/|[A-Z]:\\)\w", printed)
