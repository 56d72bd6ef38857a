import io
import json
from pathlib import Path

import pytest

from train.runs import json_lines
from train.runs.json_lines import JsonLines

STEPS = [{"step": step, "value": [0.5 * step]} for step in (0, 10, 20, 30)]


@pytest.fixture
def path(tmp_path):
    """A file of a run that has reached step 30."""
    path = tmp_path / "some.jsonl"
    JsonLines(path, first_step=0).append(*STEPS)
    return path


def test_objects_come_back_as_they_were_written_a_line_each(path):
    assert json_lines.read(path) == STEPS
    assert [json.loads(line) for line in path.read_text().splitlines()] == STEPS


def test_file_that_is_not_there_has_no_lines_and_opening_does_not_make_it(tmp_path):
    path = tmp_path / "none.jsonl"
    assert json_lines.read(path) == JsonLines(path, first_step=10).kept == []
    assert not path.exists()


@pytest.mark.parametrize(
    "first_step, kept",
    [
        (0, []),  # whatever an earlier start has left, even a line of step 0
        (5, [0]),
        (20, [0, 10, 20]),
        (25, [0, 10, 20]),
        (99, [0, 10, 20, 30]),
    ],
)
def test_run_that_goes_on_keeps_what_was_written_up_to_there(path, first_step, kept):
    lines = JsonLines(path, first_step=first_step)
    assert [line["step"] for line in lines.kept] == kept
    assert json_lines.read(path) == lines.kept
    lines.append({"step": 40})
    assert [line["step"] for line in json_lines.read(path)] == [*kept, 40]


@pytest.mark.parametrize("size", range(1, 8))
def test_last_line_that_a_kill_cut_is_dropped_and_spoils_no_later_one(path, size):
    with path.open("a") as file:
        file.write('{"step": 15, "value": [1.0]}'[: 4 * size - 1])
    assert json_lines.read(path) == STEPS
    lines = JsonLines(path, first_step=30)
    lines.append({"step": 40})
    assert json_lines.read(path) == [*STEPS, {"step": 40}]


@pytest.mark.parametrize(
    "broken", ["[]", "{}", "3", "null", "\x00", "", '{"value": 1}', '{"step": null}', '{"step": "1"}']
)
def test_line_without_a_step_is_passed_over(path, broken):
    path.write_text(broken + "\n" + path.read_text() + broken + "\n")
    assert json_lines.read(path) == STEPS
    assert JsonLines(path, first_step=30).kept == STEPS
    assert len(path.read_text().splitlines()) == 4


def test_bytes_that_are_no_text_cost_their_line_alone(path):
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    assert json_lines.read(path) == STEPS


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_finite_number_becomes_null_however_deep(path, number):
    nested = {"a": number, "b": [1.5, number, {"c": [[number], "NaN", True, None, 2]}], "d": {"e": number}}
    JsonLines(path, first_step=30).append({"step": 40, **nested})
    written = path.read_text().splitlines()[-1]
    assert json.loads(written, parse_constant=pytest.fail) == {
        "step": 40,
        "a": None,
        "b": [1.5, None, {"c": [[None], "NaN", True, None, 2]}],
        "d": {"e": None},
    }


def test_objects_are_written_at_once_so_that_a_kill_leaves_all_or_a_torn_last_line(path, monkeypatch):
    lines, writes = JsonLines(path, first_step=30), []

    class Raw(io.FileIO):
        def write(self, data):
            writes.append(bytes(data))
            return super().write(data)

    opened = lambda self, mode: io.TextIOWrapper(io.BufferedWriter(Raw(self, mode)))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        lines.append({"step": 40, "value": [0.125] * 10_000}, {"step": 40, "value": []})
    (written,) = writes  # more than fits in a buffer
    assert path.read_bytes().endswith(written) and written.count(b"\n") == 2
