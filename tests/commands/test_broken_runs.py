"""Run directories that were broken from outside: mended, or refused with what to do, and nothing written."""

import json
import shutil

import pytest

from tests.helpers.command import JOB, assert_short
from tests.helpers.jobs import results

pytestmark = pytest.mark.slow


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill(path, text):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text(text)


def restored(run_dir, finished):
    shutil.rmtree(run_dir)
    return shutil.copytree(finished, run_dir)


def test_broken_summary_is_written_anew_from_the_checkpoints(command, finished, run_dir):
    path = run_dir / "summary.json"
    whole = json.loads(path.read_text())
    for text in (
        path.read_text()[:100],
        "[]",
        '{"status": "finished"}',
        '{"status": "finished", "step": "x"}',
    ):
        path.write_text(text)
        code, printed, complaint = command(*JOB, "--run-dir", run_dir)
        assert (code, complaint) == (0, ""), text
        assert printed.splitlines()[-1].startswith("Finished at step 20: test accuracy 0."), text
        again = json.loads(path.read_text())
        assert [again[key] for key in ("step", "best_step")] == [whole[key] for key in ("step", "best_step")]
        assert results(run_dir) == results(finished), text


@pytest.mark.parametrize("part", ["files", "metrics"])
def test_what_can_be_found_out_again_is_not_missed(command, finished, run_dir, part):
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "20")
    if part == "files":
        (run_dir / "data.json").unlink()
        (run_dir / "environment.json").unlink()
        shutil.rmtree(run_dir / "tensorboard")
        (run_dir / "checkpoints" / "notes.txt").touch()
        (run_dir / "checkpoints" / "25.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
    else:
        path = run_dir / "metrics.jsonl"
        broken = '{"step": "x", "split": "test"}\ngarbage\n[]\n{}\n{"step": 5, "split": "tes'
        path.write_text(path.read_text() + broken)
    code, printed, complaint = command(*JOB, "--run-dir", run_dir)
    assert (code, complaint) == (0, "")
    assert "going on from step 15" in printed
    assert results(run_dir) == results(finished)


def test_what_cannot_be_found_out_again_is_named_and_nothing_is_written(command, finished, run_dir):
    for spoil, expected in (
        (lambda run: cut(run / "config.json"), "config.json' cannot be read: "),
        (lambda run: fill(run / "config.json", "[]"), "config.json' is not a job of this program"),
        (lambda run: fill(run / "config.json", "[" * 10**5), "config.json' cannot be read: "),
        (lambda run: (run / "config.json").unlink(), "give another --run_dir"),
        (lambda run: cut(run / "data.json"), "Delete it: the job writes it anew"),
        (lambda run: fill(run / "data.json", "[]"), "Delete it: the job writes it anew"),
        (lambda run: fill(run / "checkpoints", ""), "checkpoints' is not a folder. Move it away"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "its checkpoints are gone. Restore them"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "20" / "model"), "Delete that folder to go on"),
        (lambda run: cut(run / "checkpoints" / "20" / "metrics" / "metrics"), "Delete that folder to go on"),
    ):
        restored(run_dir, finished)
        (run_dir / "summary.json").unlink()  # or there would be nothing to do
        spoil(run_dir)
        before = results(run_dir)
        code, _, complaint = command(*JOB, "--run-dir", run_dir)
        assert code == 2, expected
        assert_short(complaint, "error: ", str(run_dir), expected)
        assert results(run_dir) == before, expected


def test_following_the_advice_on_a_broken_checkpoint_ends_in_the_same_result(command, finished, run_dir):
    (run_dir / "summary.json").unlink()
    cut(run_dir / "checkpoints" / "20" / "model" / "manifest.ocdbt")
    code, _, complaint = command(*JOB, "--run-dir", run_dir)
    assert code == 2
    assert_short(complaint, f"'{run_dir}/checkpoints/20' is not a complete checkpoint", "Delete that folder")
    shutil.rmtree(run_dir / "checkpoints" / "20")
    code, printed, _ = command(*JOB, "--run-dir", run_dir)
    assert code == 0 and "going on from step 15" in printed
    assert results(run_dir) == results(finished)
