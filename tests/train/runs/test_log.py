import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from train.runs.log import Log, read_inspections
from train.runs.summary import read_metrics

RESULTS = {
    "train": {"loss": 1.5, "accuracy": 0.5},
    "validation": {"loss": float("nan"), "accuracy": 0.25},
    "test": {"loss": 2.0, "accuracy": 0.125},
}


def write(run_dir, steps, first_step=0, results=RESULTS):
    with Log(run_dir, first_step=first_step, total_steps=100) as log:
        for step in steps:
            log.results(step, step / 10, results)
            log.advance(step)
        return log.seconds


def test_metrics_are_one_valid_json_object_a_line_and_split(tmp_path):
    write(tmp_path, [10, 20])
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert lines == read_metrics(tmp_path)
    assert [(line["step"], line["split"]) for line in lines] == [
        (step, split) for step in (10, 20) for split in ("train", "validation", "test")
    ]
    found = [(line["loss"], line["accuracy"]) for line in lines[:3]]
    assert found == [(1.5, 0.5), (None, 0.25), (2.0, 0.125)]


def test_resuming_drops_what_was_logged_after_the_checkpoint(tmp_path):
    write(tmp_path, [10, 20, 30])
    write(tmp_path, [30, 40], first_step=20)
    assert [line["step"] for line in read_metrics(tmp_path)][::3] == [10, 20, 30, 40]
    write(tmp_path, [50])  # a run that begins anew
    assert [line["step"] for line in read_metrics(tmp_path)][::3] == [50]


def test_line_that_is_not_a_result_costs_no_other_line(tmp_path):
    write(tmp_path, [10])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    long = "1" * 5000
    for broken in (
        *("[]", "{}", "\x00", "3", '{"step": 1}', '{"step": 10}', "[" * 10**5, f'{{"step": {long}}}'),
        *('{"step": true, "split": "test", "loss": 1}', '{"step": -1, "split": "test", "loss": 1}'),
        '{"step": 10, "split": "test", "loss": "low", "accuracy": 1, "seconds": "x"}',
        '{"step": 10, "split": ["test"], "loss": 1, "seconds": [1]}',
        '{"step": 10, "split": "test", "accuracy": 1, "seconds": null}',
        '{"step": 10, "split": "test", "loss": [1]}',
        '{"step": 10, "split": "test", "loss": 1, "class_accuracy": {"cat": "high"}}',
        '{"step": 10, "split": "test", "loss": 1, "class_accuracy": 3}',
        f'{{"step": 10, "split": "test", "loss": {long[:400]}, "seconds": {long[:400]}}}',
    ):
        path.write_text(broken + "\n" + whole + broken + "\n")
        assert len(read_metrics(tmp_path)) == 3, broken
        write(tmp_path, [20], first_step=10)
        assert [line["step"] for line in read_metrics(tmp_path)][::3] == [10, 20], broken


def inspect(run_dir, steps, first_step=0, writes=True):
    with Log(run_dir, first_step=first_step, total_steps=100, writes=writes) as log:
        for step in steps:
            log.inspection(step, {"slope": [0.5, float("nan")], "losses": {"deep": [float("inf"), step]}})


def test_inspections_are_one_valid_json_object_a_step_in_a_file_of_their_own(tmp_path):
    inspect(tmp_path, [0, 10])
    text = (tmp_path / "inspection.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()] == [
        {"step": step, "slope": [0.5, None], "losses": {"deep": [None, step]}} for step in (0, 10)
    ]
    assert read_inspections(tmp_path) == [json.loads(line) for line in text.splitlines()]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_inspection_of_another_shape_than_the_others_is_left_out(tmp_path):
    inspect(tmp_path, [0, 10])
    path = tmp_path / "inspection.jsonl"
    whole = path.read_text()
    for broken in (
        *('{"step": 5}', '{"step": 5, "slope": [0.5], "losses": {"deep": [1, 2]}}'),
        *(
            '{"step": 5, "slope": [0.5, "x"], "losses": {"deep": [1, 2]}}',
            '{"step": 5, "slope": 1, "losses": []}',
        ),
    ):
        path.write_text(broken + "\n" + whole)
        assert [line["step"] for line in read_inspections(tmp_path)] == [0, 10], broken


@pytest.mark.parametrize("first_step, steps", [(0, [5]), (10, [0, 10, 5]), (15, [0, 10, 5])])
def test_resuming_drops_what_was_inspected_after_the_checkpoint(tmp_path, first_step, steps):
    inspect(tmp_path, [0, 10, 20])
    with (tmp_path / "inspection.jsonl").open("a") as file:
        file.write('{"step": 30, "slo')
    inspect(tmp_path, [5], first_step=first_step)
    assert [line["step"] for line in read_inspections(tmp_path)] == steps


def test_process_that_does_not_write_leaves_no_file_and_prints_nothing(tmp_path, capsys):
    with Log(tmp_path, first_step=0, total_steps=100, writes=False) as log:
        log.print("heading")
        log.print_once("warning")
        log.results(10, 1.0, RESULTS)
        log.inspection(10, {"slope": [0.5]})
        log.advance(10)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_warning_is_printed_once(tmp_path, capsys):
    with Log(tmp_path, first_step=0, total_steps=100) as log:
        for number in range(3):
            log.print_once(f"warning {number}")
    assert capsys.readouterr().out == "warning 0\n"


def test_seconds_continue_where_the_earlier_session_ended(tmp_path):
    write(tmp_path, [10])
    later = [json.dumps({**line, "seconds": 1000.0}) for line in read_metrics(tmp_path)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(later) + "\n")
    assert 1000 <= write(tmp_path, [20], first_step=10) < 1100


def test_console_shows_a_table_that_fits_80_columns(tmp_path, capsys):
    write(tmp_path, [10, 20])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[:2]] == [
        ["train", "validation", "test"],
        ["step", "epoch", *["loss", "accuracy"] * 3, "seconds"],
    ]
    assert printed[2].split()[:8] == ["10", "1.0", "1.5000", "0.5000", "nan", "0.2500", "2.0000", "0.1250"]
    assert len(printed) == 4 and len(set(map(len, printed[1:]))) == 1 and max(map(len, printed)) <= 80


def test_table_has_a_column_for_each_metric_and_a_dash_where_a_split_is_missing(tmp_path, capsys):
    results = {split: {"loss": 3e30, "mean_error": 0.5} for split in ("train", "test")}
    write(tmp_path, [10], results=results)
    _, above, header, row = capsys.readouterr().out.splitlines()
    assert above.split() == ["mean"] * 3  # a long name takes several lines
    assert header.split() == ["step", "epoch", *["loss", "error"] * 3, "seconds"]
    assert row.split()[2:8] == ["3.0e+30", "0.5000", "-", "-", "3.0e+30", "0.5000"]
    assert len(row) == len(header)  # large losses keep to their column


def test_what_is_measured_of_each_class_has_no_column_and_a_curve_each_in_tensorboard(tmp_path, capsys):
    values = {"loss": -12.5, "r2": None, "class_accuracy": {"a b": 0.5, "c": None}}
    write(tmp_path, [10], results={"train": values})
    (*_, header, row), (line,) = capsys.readouterr().out.splitlines(), read_metrics(tmp_path)
    assert header.split() == ["step", "epoch", *["loss", "r2"] * 3, "seconds"]
    assert row.split()[2:4] == ["-1e+01", "-"] and len(row) == len(header)
    assert line.items() >= values.items()
    found = {value.tag: value.simple_value for event in events(tmp_path) for value in event.summary.value}
    assert found == {"loss/train": -12.5, "class_accuracy/a_b/train": 0.5}  # as TensorBoard takes names


@pytest.mark.parametrize(
    "seconds_per_step, shown",
    [(0.0625, "16 steps/s 0:00:03"), (0.5, "2 steps/s 0:00:20"), (40, "0.025 steps/s 0:26:40")],
)
def test_progress_shows_rate_and_time_left(tmp_path, capsys, seconds_per_step, shown):
    """Of a job that has resumed at step 50 of 100, and is at step 60."""
    with Log(tmp_path, first_step=50, total_steps=100) as log:
        progress, now = log._progress, 0.0
        progress.get_time = lambda: now
        log.advance(50)
        progress.print(progress)
        for step in range(51, 61):
            now = 7 + seconds_per_step * (step - 50)  # the first one compiled for 7 s
            log.advance(step)
        progress.print(progress)
    compiling, training = capsys.readouterr().out.splitlines()
    assert compiling.split()[-3:] == ["50/100", "compiling", "-:--:--"]
    assert training.endswith(f" 60/100 {shown}")


def events(run_dir):
    """Yields the events of the one file that TensorBoard reads."""
    (file,) = (run_dir / "tensorboard").iterdir()
    data = file.read_bytes()
    while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_tensorboard_has_the_same_values_before_the_next_step_is_taken(tmp_path):
    with Log(tmp_path, first_step=0, total_steps=100) as log:
        log.results(10, 0.5, RESULTS)
        # Not closed yet: a kill may come at any time.
        found = {value.tag: value.simple_value for event in events(tmp_path) for value in event.summary.value}
    assert found["loss/train"] == 1.5 and found["accuracy/test"] == 0.125
    assert len(found) == 5  # all but the NaN


def test_tensorboard_drops_what_was_logged_after_the_checkpoint(tmp_path):
    write(tmp_path, [30], first_step=20)
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [21]
