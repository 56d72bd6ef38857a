import io
import json
import os
from pathlib import Path

import pytest

from train.errors import UserError
from train.runs import files
from train.runs.files import JsonLines, read_lines

STEPS = [{"step": step, "value": [0.5 * step]} for step in (0, 10, 20, 30)]


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}


def test_file_of_the_same_name_with_another_ending_is_left_alone(tmp_path):
    (tmp_path / "model.tmp").write_text("mine")
    files.replace(tmp_path / "model.stablehlo", b"new")
    assert (tmp_path / "model.tmp").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.stablehlo", "model.tmp"]


def test_file_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "a.json"
    for content in (None, b"", b"{", b"\xff", b"[" * 10**5, b"1" * 5000):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match="a.json' cannot be read: "):
            files.read_json(path)
    path.unlink()
    os.mkfifo(path)  # for which a reader would wait for ever
    with pytest.raises(UserError, match="a.json' cannot be read: .* is not a file"):
        files.read_json(path)
    with pytest.raises(OSError, match="is not a file"):
        read_lines(path)


@pytest.fixture
def path(tmp_path):
    """A file of a run that has reached step 30."""
    path = tmp_path / "some.jsonl"
    JsonLines(path, first_step=0).append(*STEPS)
    return path


def test_objects_come_back_as_they_were_written_one_a_line(path):
    assert read_lines(path) == STEPS
    assert [json.loads(line) for line in path.read_text().splitlines()] == STEPS


def test_missing_file_has_no_lines_and_opening_does_not_create_it(tmp_path):
    path = tmp_path / "none.jsonl"
    assert read_lines(path) == JsonLines(path, first_step=10).kept == []
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
def test_resumed_run_keeps_the_lines_up_to_its_first_step(path, first_step, kept):
    lines = JsonLines(path, first_step=first_step)
    assert [line["step"] for line in lines.kept] == kept
    assert read_lines(path) == lines.kept
    lines.append({"step": 40})
    assert [line["step"] for line in read_lines(path)] == [*kept, 40]


def test_last_line_that_a_kill_cut_is_dropped_and_spoils_no_later_one(path):
    whole, line = path.read_text(), '{"step": 15, "value": [1.0]}'
    for size in range(1, len(line)):
        path.write_text(whole + line[:size])
        assert read_lines(path) == STEPS, size
        JsonLines(path, first_step=30).append({"step": 40})
        assert read_lines(path) == [*STEPS, {"step": 40}], size


def test_line_without_a_step_costs_no_other_line(path):
    whole = path.read_bytes()
    for broken in (
        *(b"[]", b"{}", b"3", b"null", b"\x00", b"", b"\xff\xfe"),
        *(b'{"value": 1}', b'{"step": null}', b'{"step": "1"}'),
    ):
        path.write_bytes(broken + b"\n" + whole + broken + b"\n")
        assert read_lines(path) == STEPS, broken
        assert JsonLines(path, first_step=30).kept == STEPS, broken
        assert path.read_bytes() == whole, broken


def test_number_that_is_not_finite_becomes_null_however_deep(path):
    for number in (float("nan"), float("inf"), -float("inf")):
        nested = {
            "a": number,
            "b": [1.5, number, {"c": ([number], "NaN", True, None, 2)}],
            "d": {"e": number},
        }
        expected = {"a": None, "b": [1.5, None, {"c": [[None], "NaN", True, None, 2]}], "d": {"e": None}}
        JsonLines(path, first_step=30).append({"step": 40, **nested})
        written = path.read_text().splitlines()[-1]
        assert json.loads(written, parse_constant=pytest.fail) == {"step": 40, **expected}
        files.write_json(path.with_suffix(".json"), nested)
        written = path.with_suffix(".json").read_text()
        assert json.loads(written, parse_constant=pytest.fail) == expected


def test_objects_are_written_in_one_call_so_that_a_kill_leaves_all_or_a_torn_last_line(path, monkeypatch):
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
