"""Every code block of the README and of the pages in docs/ runs, in their order, as a stranger would."""

import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest

import jbn
from jbn import inspection
from tests.helpers.command import ROOT
from train.config import load, total_steps
from train.runs.summary import Summary
from train.studies import runner
from train.training import job

BLOCK = re.compile(r"^```(python|sh|bash|yaml)\n(.*?)^```$", re.M | re.S)
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.glob("docs/*/*.md"))}
TEXTS["README.md"] = (ROOT / "README.md").read_text()
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md")
RUN = [page for page, text in TEXTS.items() if {"python", "sh"} & dict(BLOCK.findall(text)).keys()]
OWN_DATA = "docs/jobs/own_data.md"


@pytest.fixture
def run_page(tmp_path, command, monkeypatch):
    """Run a page in a folder with the configs and a stand-in for MNIST; return its names and what it printed.

    Jobs take few steps, and those of studies none: tests/train/studies has them.
    """
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rng = np.random.RandomState(0)
    images, labels = rng.randint(0, 256, (600, 28, 28)).astype(np.uint8), rng.randint(0, 10, 600)
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:50], "y_test": labels[:50]}
    np.savez(tmp_path / "mnist.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "fit", lambda config, stop: Summary("finished", step=0))

    def run(page, *, steps):
        monkeypatch.setattr(job, "total_steps", lambda *given: min(steps, total_steps(*given)))
        namespace, printed = {"__name__": page}, []
        for language, block in BLOCK.findall(TEXTS[page]):
            if language == "python":
                exec(compile(block, page, "exec"), namespace)
            elif language == "sh":
                for line in block.replace("\\\n", " ").splitlines():
                    code, out, complaint = command(*shlex.split(line.removeprefix("python -m train")))
                    assert code == 0 and out, (line, complaint)
                    printed.append((out, complaint))
        return namespace, printed

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if page != OWN_DATA])
def test_blocks_of_a_page_run_one_after_the_other(page, run_page):
    _, printed = run_page(page, steps=10)
    assert not any(complaint for _, complaint in printed)
    studies = re.findall(r"^python -m train (?:compare|sweep)", TEXTS[page], re.M)
    assert len(list(Path("runs").glob("*/report.html"))) >= len(studies)


@pytest.mark.slow
def test_own_data_are_trained_on_predicted_and_exported_as_the_page_says(run_page):
    namespace, printed = run_page(OWN_DATA, steps=40)
    outs, complaints = zip(*printed)
    assert "".join(complaints) == "decoding 500 images, once, into runs/data-cache\n"
    image = json.loads(outs[1])
    assert image["class"] in namespace["names"]
    np.testing.assert_allclose(
        namespace["probabilities"][0], list(image["probabilities"].values()), rtol=1e-5
    )
    values = [json.loads(line)["value"] for line in outs[4].splitlines()]
    assert np.corrcoef(values, namespace["patients"].target)[0, 1] > 0.5
    inputs = json.loads(Path("runs/my_images/data.json").read_text())["inputs"]
    assert inputs in " ".join(TEXTS[OWN_DATA].split())


def test_first_lines_are_those_of_a_fresh_machine():
    assert re.findall(r"^    (.+)$", TEXTS["README.md"].split("\n## ")[0], re.M)[-2:] == [
        "pip install -e '.[train]' && python -m train configs/digits_mlp.toml",
        "pip install -e '.[test]' && pytest",
    ]


@pytest.mark.parametrize("language, processes", [("bash", None), ("yaml", "2")])
def test_lines_for_clusters_are_a_job_that_loads(language, processes):
    (block,) = [block for tag, block in BLOCK.findall(TEXTS["docs/jobs/machines.md"]) if tag == language]
    # One command over several lines, up to one that begins something else.
    command = re.search(r"python -m train ((?:.*\n)(?: +--.*\n)*)", block)[1]
    config, *flags = shlex.split(command.replace("$JOB_COMPLETION_INDEX", "1"))
    loaded = load(ROOT / config, flags)
    assert loaded.run_dir == "/shared/runs/cifar10" and str(loaded.num_processes or None) == str(processes)


def test_jobs_that_a_page_shows_and_does_not_run_would_load():
    shown = "\n".join(BLOCK.sub("", text).replace("\\\n", " ") for text in TEXTS.values())
    lines = re.findall(r"^ *python -m train (configs/.*)", shown, re.M)
    assert len(lines) >= 5
    for line in lines:
        config, *flags = shlex.split(line.replace("$seed", "0").replace("$W", ""))
        load(ROOT / config, flags)


def test_every_block_is_run_or_no_program():
    for page, text in TEXTS.items():
        assert set(re.findall(r"```(\w+)", BLOCK.sub("", text))) <= {"text", "toml"}, page


def test_every_file_that_a_page_or_a_docstring_names_exists():
    texts = TEXTS | {page: (ROOT / page).read_text() for page in OTHERS}
    configs = {name for text in texts.values() for name in re.findall(r"configs/\w+\.toml", text)}
    installed = Path(jbn.__file__).parent  # not in the checkout where a wheel is tested
    sources = "".join(path.read_text() for path in installed.rglob("*.py"))
    pages = set(re.findall(r"docs/[\w/]+\.md", sources))
    assert len(configs) >= 15 and pages
    assert not [name for name in configs | pages if not (ROOT / name).is_file()]
    for page, text in texts.items():
        for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", text):
            link = link.replace("../../jbn", str(installed))
            assert (ROOT / page).parent.joinpath(link).exists(), (page, link)


def test_the_site_describes_every_field_of_a_public_class_and_takes_no_prose_for_a_type():
    pytest.importorskip("sphinx", reason="of the extra docs")
    page = runpy.run_path(str(ROOT / "docs/_sphinx/docstrings.py"))
    public = [getattr(module, name) for module in (jbn, inspection) for name in module.__all__]
    fields = [cls for cls in public if getattr(cls, "_fields", ())] + [inspection.Layers]
    assert len(fields) == 10
    for cls in fields:
        described = re.findall(r"^  (\w+): \S", page["fields_section"](cls), re.M)
        assert described == list(cls.__match_args__), cls
    lines = ["Mean.", "", "    m' = |m|", "", "Returns:", "  A tree: as docs/usage/merge.md.", ""]
    page["process"](None, "function", "", None, None, lines)
    assert lines[2:7] == [".. code-block:: text", "", "    m' = |m|", "", "Returns:"]
    assert lines[7] == "  : A tree: as :doc:`/usage/merge`."
    page["process"](None, "property", "", None, None, lines := ["The mean: ()."])
    assert lines == [": The mean: ()."]
