import json
import signal
from pathlib import Path

import pytest
from command import ROOT, finish, start

from train.__main__ import main
from train.errors import UserError
from train.runs.files import read_json
from train.runs.stopping import StopRequests
from train.studies import runner as several
from train.studies import sweep
from train.training import loop

CONFIG = Path("configs/digits_mlp.toml")
SHORT = ["--steps", "4", "--eval-every", "2", "--model.widths", "16", "--devices", "1"]


@pytest.fixture(autouse=True)
def _here_and_without_pictures(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(loop.curves, "draw", lambda run_dir: None)


def plan(words):
    return sweep.plan(CONFIG, words.split())


def values(words):
    return [list(job.values.values()) for job in plan(words)[1]]


# The grid


@pytest.mark.parametrize(
    "words",
    [
        "--seed 0,1 --optimizer.learning-rate 0.1,1",
        "--seed=0,1 --optimizer.learning_rate=0.1,1",
        "--seed 0, 1 --optimizer.learning-rate= 0.1, 1e0",
    ],
)
def test_every_combination_is_a_job_in_a_folder_of_its_own(words):
    out, jobs = plan(words + " --model.norm none --out somewhere")
    assert out == Path("somewhere")
    assert [job.values for job in jobs] == [
        {"seed": seed, "optimizer.learning_rate": rate} for seed in (0, 1) for rate in (0.1, 1.0)
    ]
    assert [job.config.run_dir for job in jobs] == [
        f"somewhere/seed={seed},optimizer.learning_rate={rate}" for seed in (0, 1) for rate in (0.1, 1.0)
    ]
    for job in jobs:
        assert (job.config.seed, job.config.optimizer.learning_rate) == tuple(job.values.values())
        assert job.config.model.norm == "none" and job.config.batch_size == 128


def test_values_of_a_list_are_lists():
    _, jobs = plan("--model.widths 64,64 32 --optimizer.milestones 0.2 0.4")
    assert [job.values for job in jobs] == [{"model.widths": (64,)}, {"model.widths": (64, 32)}]
    assert [Path(job.config.run_dir).name for job in jobs] == ["model.widths=64", "model.widths=64-32"]
    assert {job.config.optimizer.milestones for job in jobs} == {(0.2, 0.4)}


def test_values_may_hold_spaces_and_slashes():
    _, (job, _) = sweep.plan(CONFIG, ["--data.path", "/my data/a,/my data/b"])
    assert job.config.data.path == "/my data/a"
    assert job.config.run_dir == "runs/digits_mlp-sweep/data.path=_my-data_a"


def test_steps_take_the_place_of_the_epochs_of_the_file():
    assert [job.config.epochs for job in plan("--steps 5,6")[1]] == [None, None]
    assert values("--steps 5,6") == [[5], [6]]


def test_without_a_grid_there_is_one_job():
    out, (job,) = plan("--seed 3")
    assert (job.values, job.config.run_dir) == ({}, f"{out}/digits_mlp")


@pytest.mark.parametrize(
    "words, message",
    [
        ("0,1", "'0,1' follows no key; wanted --key A,B"),
        ("--seed 0 --seed 1", "--seed is given twice; wanted it once, with its values: --seed A,B"),
        ("--seed 1,2,1", "Two jobs of the sweep would be 'runs/digits_mlp-sweep/seed=1'; wanted each value"),
        ("--optimizer.learning_rate 1,1.0", "Two jobs of the sweep would be"),
        ("--run-dir a", "--run_dir does not go with a sweep; wanted --out"),
        ("--out", "--out is ''; wanted one folder"),
        ("--out a,b", "--out is 'a,b'; wanted one folder"),
        ("--batch-size 1,0", "batch_size = 0; wanted 1 or more"),
    ],
)
def test_grid_that_makes_no_sense_says_why(words, message):
    with pytest.raises(UserError, match=message):
        plan(words)


@pytest.mark.parametrize("words", ["--sed 0,1", "--seed 0,x", "--seed 0,", "--model.norm batch,bach"])
def test_wrong_key_or_value_exits_2_before_anything_is_trained(words, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", str(CONFIG), *words.split(), "--out", str(tmp_path / "out")])
    assert "--seed" in (shown := capsys.readouterr().err) or "batch" in shown
    assert not (tmp_path / "out").exists()


# Running it


def test_jobs_are_a_table_and_those_that_fail_are_in_it(tmp_path, capsys):
    words = ["--optimizer.learning-rate", "0.1,1e30", "--batch_size", "128,2000", "--model.norm", "none"]
    arguments = [*SHORT, *words, "--num-processes", "1", "--out", str(tmp_path / "out")]
    assert main(["sweep", str(CONFIG), *arguments]) == 2  # as the worst of its jobs would
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    fine, too_large, failed, _ = results
    assert [result["status"] for result in results] == ["finished", "refused", "failed", "refused"]
    assert (fine["optimizer.learning_rate"], fine["batch_size"]) == (0.1, 128)
    summary = read_json(Path(fine["run_dir"]) / "summary.json")
    assert fine.items() >= summary.items() and summary["step"] == 4 and fine["error"] is None
    assert "not finite" in failed["error"] and "step" in failed
    assert (
        too_large["error"].startswith("batch_size = 2000, but there are 1293") and too_large["step"] is None
    )

    shown = capsys.readouterr().out
    assert f"failed: {failed['error']}" in shown and f"refused: {too_large['error']}" in shown
    *_, header, first, second, _, _, _, results_at, report_at = shown.splitlines()
    assert header.split() == ["optimizer.learning_rate", "batch_size", *several.COLUMNS]
    assert first.split()[:4] == ["0.1", "128", "finished", "4"]
    assert first.split()[5] == f"{fine['test_accuracy']:.4f}"
    assert second.split() == ["0.1", "2000", "refused", *"------"]
    assert results_at == f"Results: {tmp_path}/out/results.json"
    assert report_at == f"Report: {tmp_path}/out/report.html"


def test_running_it_again_goes_on_leaves_what_is_finished_and_refuses_what_is_another_job(tmp_path):
    def run(words, stop=StopRequests()):
        code = sweep.run(*sweep.plan(CONFIG, [*SHORT, *words.split(), "--out", str(tmp_path)]), stop)
        results = read_json(tmp_path / "results.json")
        return code, [result["status"] for result in results], results

    class StopAtOnce:
        received = signal.SIGTERM

    assert run("--seed 0,1", StopAtOnce)[:2] == (143, ["stopped"])
    code, statuses, finished = run("--seed 0,1")
    assert (code, statuses) == (0, ["finished", "finished"])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("seed*/**/*")}
    assert run("--seed 0,1") == (0, statuses, finished)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("seed*/**/*")} == before

    code, statuses, (refused, _) = run("--seed 1,2 --batch-size 64")
    assert (code, statuses) == (2, ["refused", "finished"])
    assert "holds another job: batch_size = 128, now 64" in refused["error"]
    assert refused["test_accuracy"] is None  # and not that of the other job
    assert read_json(tmp_path / "seed=1" / "summary.json").items() <= finished[1].items()


def test_memory_that_runs_out_ends_one_job_and_not_the_sweep(tmp_path, monkeypatch):
    def fit(config, stop):
        if config.batch_size > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nand so on")
        return dict.fromkeys(several.COLUMNS) | {"status": "finished"}

    monkeypatch.setattr(loop, "fit", fit)
    planned = sweep.plan(CONFIG, ["--batch-size", "2,1", "--out", str(tmp_path)])
    assert sweep.run(*planned, StopRequests()) == 1
    failed, finished = read_json(tmp_path / "results.json")
    assert failed["status"] == "failed" and "Try a smaller batch_size" in failed["error"]
    assert finished["status"] == "finished"


def test_folder_that_cannot_be_created_is_bad_input(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*/file/x cannot be used: Not a directory"):
        sweep.run(*plan(f"--seed 0,1 --out {tmp_path}/file/x"), StopRequests())


def test_sigterm_stops_the_sweep(tmp_path):
    process = start("sweep", CONFIG, "--steps", 10**7, "--seed", "0,1", "--out", tmp_path / "out")
    while not process.stdout.readline().lstrip().startswith("50 "):  # the first evaluation
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr
    (result,) = read_json(tmp_path / "out" / "results.json")
    assert result["status"] == "stopped" and result["step"] >= 50
    assert done.stdout.splitlines()[-1] == (
        "0 of 2 jobs have come to their end; the same line again goes on with the others."
    )
