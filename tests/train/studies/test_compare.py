"""Jobs beside a baseline: what is planned, what comparison.json says of it, and that it is true."""

import re
import signal
import statistics
from pathlib import Path

import pytest
from command import ROOT

from train.__main__ import main
from train.errors import UserError
from train.runs.files import read_json
from train.runs.log import read_metrics
from train.runs.stopping import StopRequests
from train.studies import compare
from train.training import loop

BASELINE, OTHER = "configs/paper_mnist.toml", "configs/paper_mnist_bn.toml"
DIGITS = ["--data.name", "digits", "--model.widths", "16", "--model.kernel-std", "0.3", "--devices", "1"]
SHORT = [
    *DIGITS,
    "--optimizer.learning-rate",
    "1",
    "--steps",
    "90",
    "--eval-every",
    "15",
    "--inspect",
    "False",
]


@pytest.fixture(autouse=True)
def _here_and_without_pictures(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(loop.curves, "draw", lambda run_dir: None)


def plan(words):
    return compare.plan(words.split())


# The plan


@pytest.mark.parametrize(
    "words", ["--seed 3 --batch_size=64 --out somewhere", "--out=somewhere --batch-size 64 --seed=3"]
)
def test_flags_go_to_every_job_and_each_is_in_a_folder_of_its_name(words):
    out, jobs = plan(f"{BASELINE} {OTHER} {words}")
    assert out == Path("somewhere")
    assert [job.name for job in jobs] == ["paper_mnist", "paper_mnist_bn"]
    assert [job.config.run_dir for job in jobs] == ["somewhere/paper_mnist", "somewhere/paper_mnist_bn"]
    assert {(job.config.seed, job.config.batch_size, job.config.steps) for job in jobs} == {(3, 64, 50_000)}
    assert [job.config.model.norm for job in jobs] == ["none", "batch"]


def test_seeds_follow_the_first_whose_folder_stays_the_same():
    out, jobs = plan(f"{BASELINE} {OTHER} --seeds 2 --seed 7")
    assert out == Path("runs/paper_mnist-comparison")
    assert [(job.name, job.config.seed, job.config.run_dir) for job in jobs] == [
        (name, seed, f"{out}/{name}{more}")
        for name in ("paper_mnist", "paper_mnist_bn")
        for seed, more in ((7, ""), (8, ",seed=8"))
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "compare got nothing; wanted two configs or more, the baseline first"),
        (BASELINE, f"compare got {BASELINE}; wanted two configs"),
        (f"{BASELINE} runs/digits", "wanted two configs"),
        (f"{BASELINE} {BASELINE}", "would be 'runs/paper_mnist-comparison/paper_mnist'; wanted other names"),
        (f"{BASELINE} {OTHER} --run-dir x", "--run_dir does not go with compare; wanted --out"),
        (f"{BASELINE} {OTHER} --out", "--out has no value; wanted one: --out VALUE"),
        (f"{BASELINE} {OTHER} --seeds 0", "--seeds is '0'; wanted a whole number of 1 or more"),
        (f"{BASELINE} {OTHER} --seeds 1.5", "--seeds is '1.5'"),
        (f"{BASELINE} {OTHER} --seeds 2 --seed {2**32 - 1}", f"seed = {2**32}; wanted"),
        (f"{BASELINE} configs/absent.toml", "configs/absent.toml does not exist"),
        (f"{BASELINE} {OTHER} --batch-size 0", "batch_size = 0; wanted 1 or more"),
    ],
)
def test_comparison_that_makes_no_sense_says_why_and_exits_2(words, message, capsys):
    with pytest.raises(UserError, match=re.escape(message)):
        plan(words)
    assert main(["compare", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_wrong_key_exits_2_and_names_the_one_that_was_meant(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", BASELINE, OTHER, "--optimizer.lerning-rate", "1"])
    assert "--optimizer.learning-rate" in capsys.readouterr().err


# Running it


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two jobs with two seeds each, finished."""
    out = tmp_path_factory.mktemp("comparison")
    _, planned = compare.plan([BASELINE, OTHER, *SHORT, "--seeds", "2", "--out", str(out)])
    assert compare.run(out, planned, StopRequests()) == 0
    return out


def curve(run_dir):
    return [
        (line["step"], line["accuracy"]) for line in read_metrics(Path(run_dir)) if line["split"] == "test"
    ]


def test_entries_are_what_the_metrics_of_the_runs_say(compared):
    jobs = read_json(compared / "comparison.json")
    assert [job["name"] for job in jobs] == ["paper_mnist", "paper_mnist_bn"]
    targets = []
    for seed in range(2):
        baseline = curve(jobs[0]["seeds"][seed]["run_dir"])
        targets.append(max((accuracy, -step) for step, accuracy in baseline))
    for job in jobs:
        for run, (accuracy, minus_step) in zip(job["seeds"], targets, strict=True):
            points = curve(run["run_dir"])
            assert [step for step, _ in points] == [15, 30, 45, 60, 75, 90]
            assert run["best_test_accuracy"] == max(reached for _, reached in points)
            reached = [step for step, value in points if value >= accuracy]
            assert run["steps_to_target"] == reached[0]
            assert run["speedup"] == -minus_step / reached[0]
            assert (run["status"], run["error"]) == ("finished", None)
        for key in ("best_test_accuracy", "steps_to_target", "speedup", "wall_seconds"):
            values = [run[key] for run in job["seeds"]]
            assert job[key] == statistics.median(values)
            assert job["ranges"][key] == [min(values), max(values)]
    baseline, other = jobs
    assert baseline["speedup"] == 1 and other["speedup"] > 1  # what it is all about
    assert other["speedup_over"]["paper_mnist"] == other["speedup"]
    assert baseline["speedup_over"]["paper_mnist_bn"] is None  # never as good


def test_report_says_the_same_and_needs_nothing_beside_it(compared):
    page = (compared / "report.html").read_text()
    (baseline, other) = read_json(compared / "comparison.json")
    text = re.sub(r"<[^>]+>", "", page)
    assert f"{other['best_test_accuracy']:.4f}" in text
    assert re.search(r"paper_mnist_bn took .* steps to the same, .* times fewer", text)
    assert "<svg" in page and not re.search(r"(src|href)=\"(?!#)", page) and "https:" not in page


def test_running_it_again_trains_nothing_and_more_seeds_keep_those_that_are_there(compared, capsys):
    before = {file: file.stat().st_mtime_ns for file in compared.glob("paper*/**/*")}
    files = [(compared / name).read_bytes() for name in ("comparison.json", "report.html")]
    arguments = ["compare", BASELINE, OTHER, *SHORT, "--num-processes", "1", "--out", str(compared)]
    assert main([*arguments, "--seeds", "2"]) == 0
    assert [(compared / name).read_bytes() for name in ("comparison.json", "report.html")] == files
    header, first, second, _, *said, _, end = capsys.readouterr().out.splitlines()[-8:]
    assert said[0].startswith("paper_mnist took ") and said[1].startswith("paper_mnist_bn took ")
    assert header.split() == ["name", *compare.SHOWN] and end == f"Report: {compared}/report.html"
    assert first.split()[0] == "paper_mnist" and first.split()[3] == "1.00"
    assert float(second.split()[3]) == pytest.approx(
        read_json(compared / "comparison.json")[1]["speedup"], abs=0.005
    )
    assert main([*arguments, "--seeds", "1"]) == 0
    assert {file: file.stat().st_mtime_ns for file in compared.glob("paper*/**/*")} == before


def test_job_that_fails_is_in_the_comparison_and_does_not_keep_others_from_running(tmp_path):
    failing, refused = tmp_path / "failing.toml", tmp_path / "refused.toml"
    base = f'base = "{ROOT / BASELINE}"\n'
    failing.write_text(base + '[model]\nactivation = "relu"\n[optimizer]\nlearning_rate = 1e30\n')
    refused.write_text(base + "batch_size = 2000\n")
    words = [*DIGITS, "--eval-every", "15", "--inspect", "False"]
    out = tmp_path / "out"
    _, planned = compare.plan([str(failing), str(refused), OTHER, *words, "--steps", "30", "--out", str(out)])
    assert compare.run(out, planned, StopRequests()) == 2
    first, second, third = read_json(out / "comparison.json")
    assert [job["seeds"][0]["status"] for job in (first, second, third)] == ["failed", "refused", "finished"]
    assert "not finite" in first["seeds"][0]["error"] and first["best_test_accuracy"] is None
    assert second["seeds"][0]["error"].startswith("batch_size = 2000, but there are")
    assert third["best_test_accuracy"] > 0 and third["steps_to_target"] is third["speedup"] is None
    text = re.sub(r"<[^>]+>", "", (out / "report.html").read_text())
    assert "failing with seed 0 failed: the loss of step" in text and "times" not in text


def test_call_of_which_every_job_is_refused_leaves_what_an_earlier_one_wrote(compared, capsys):
    files = [(compared / name).read_bytes() for name in ("comparison.json", "report.html")]
    arguments = [BASELINE, OTHER, *SHORT, "--num-processes", "1", "--out", str(compared)]
    assert main(["compare", *arguments, "--batch-size", "64"]) == 2
    assert [(compared / name).read_bytes() for name in ("comparison.json", "report.html")] == files
    shown = capsys.readouterr().out
    assert "holds another job: batch_size = 60, now 64. Give another --out" in shown and "Report" not in shown


def test_stop_request_ends_it_and_starting_again_goes_on(tmp_path, capsys):
    class StopAtOnce:
        received = signal.SIGTERM

    _, planned = compare.plan([BASELINE, OTHER, *SHORT, "--out", str(tmp_path)])
    assert compare.run(tmp_path, planned, StopAtOnce) == 143
    (stopped,) = read_json(tmp_path / "comparison.json")
    went_on = "0 of 2 jobs have come to their end; the same line again goes on with the others."
    assert went_on in (tmp_path / "report.html").read_text() and went_on in capsys.readouterr().out
    assert stopped["seeds"][0]["status"] == "stopped" and stopped["best_test_accuracy"] is None
    assert compare.run(tmp_path, planned, StopRequests()) == 0
    assert [job["seeds"][0]["status"] for job in read_json(tmp_path / "comparison.json")] == ["finished"] * 2
    assert went_on not in (tmp_path / "report.html").read_text() + capsys.readouterr().out
