import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from train.runs.log import Logs, read_inspections, read_metrics

RESULTS = {
    "train": {"loss": 1.5, "accuracy": 0.5},
    "validation": {"loss": float("nan"), "accuracy": 0.25},
    "test": {"loss": 2.0, "accuracy": 0.125},
}


def write(run_dir, steps, first_step=0):
    run_dir.mkdir(exist_ok=True)
    with Logs(run_dir, first_step=first_step, total_steps=100) as logs:
        for step in steps:
            logs.results(step, step / 10, RESULTS)
            logs.advance(step)
        return logs.seconds


def test_metrics_are_one_valid_json_object_a_line_and_split(tmp_path):
    write(tmp_path, [10, 20])
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=None) for line in text.splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [
        (step, split) for step in (10, 20) for split in ("train", "validation", "test")
    ]
    assert [(line["loss"], line["accuracy"]) for line in lines[:3]] == [
        (1.5, 0.5),
        (None, 0.25),
        (2.0, 0.125),
    ]
    assert "NaN" not in text


def test_going_on_drops_what_was_logged_after_the_checkpoint(tmp_path):
    write(tmp_path, [10, 20, 30])
    write(tmp_path, [30, 40], first_step=20)
    assert [line["step"] for line in read_metrics(tmp_path)][::3] == [10, 20, 30, 40]


@pytest.mark.parametrize("broken", ["[]", "{}", "\x00", "3", '{"step": 1}'])
def test_line_that_is_no_result_costs_no_other_line(tmp_path, broken):
    write(tmp_path, [10])
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(broken + "\n" + whole)
    assert len(read_metrics(tmp_path)) == 3


def test_line_that_a_kill_cut_is_dropped(tmp_path):
    write(tmp_path, [10])
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 20, "spl')
    assert len(read_metrics(tmp_path)) == 3
    write(tmp_path, [20], first_step=10)
    assert [line["step"] for line in read_metrics(tmp_path)][::3] == [10, 20]


def inspect(run_dir, steps, first_step=0, writes=True):
    with Logs(run_dir, first_step=first_step, total_steps=100, writes=writes) as logs:
        for step in steps:
            logs.inspection(step, {"slope": [0.5, float("nan")], "losses": {"deep": [float("inf"), step]}})


def test_inspections_are_one_valid_json_object_a_step_beside_the_metrics(tmp_path):
    inspect(tmp_path, [0, 10])
    text = (tmp_path / "inspection.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()] == [
        {"step": step, "slope": [0.5, None], "losses": {"deep": [None, step]}} for step in (0, 10)
    ]
    assert read_inspections(tmp_path) == [json.loads(line) for line in text.splitlines()]
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("first_step, steps", [(0, [5]), (10, [0, 10, 5]), (15, [0, 10, 5])])
def test_going_on_drops_what_was_inspected_after_the_checkpoint(tmp_path, first_step, steps):
    inspect(tmp_path, [0, 10, 20])
    with (tmp_path / "inspection.jsonl").open("a") as file:
        file.write('{"step": 30, "slo')
    inspect(tmp_path, [5], first_step=first_step)
    assert [line["step"] for line in read_inspections(tmp_path)] == steps


def test_a_run_that_begins_drops_what_an_earlier_start_has_left(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [30])
    assert [line["step"] for line in read_metrics(tmp_path)][::3] == [30]


def test_logs_of_a_process_that_does_not_write_leave_no_file(tmp_path, capsys):
    inspect(tmp_path, [0, 10], writes=False)
    assert read_inspections(tmp_path) == [] == list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_seconds_go_on_counting_where_the_earlier_session_ended(tmp_path):
    write(tmp_path, [10])
    lines = read_metrics(tmp_path)
    later = [json.dumps({**line, "seconds": 1000.0}) for line in lines]
    (tmp_path / "metrics.jsonl").write_text("\n".join(later) + "\n")
    assert 1000 <= write(tmp_path, [20], first_step=10) < 1100


def test_console_shows_a_table_that_fits_80_columns_as_it_goes(tmp_path, capsys):
    write(tmp_path, [10, 20])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[:2]] == [
        ["train", "validation", "test"],
        ["step", "epoch", *["loss", "accuracy"] * 3, "seconds"],
    ]
    assert printed[2].split()[:8] == ["10", "1.0", "1.5000", "0.5000", "nan", "0.2500", "2.0000", "0.1250"]
    assert len(printed) == 4 and max(map(len, printed)) <= 80


def test_large_losses_keep_to_their_column(tmp_path, capsys):
    with Logs(tmp_path, first_step=0, total_steps=100) as logs:
        logs.results(10, 1.0, {split: {"loss": 3e30, "accuracy": 0.5} for split in RESULTS})
    assert capsys.readouterr().out.splitlines()[-1].split()[2:8] == ["3.0e+30", "0.5000"] * 3


@pytest.mark.parametrize(
    "seconds_per_step, shown",
    [(0.0625, "16 steps/s 0:00:03"), (0.5, "2 steps/s 0:00:20"), (40, "0.025 steps/s 0:26:40")],
)
def test_progress_shows_rate_and_time_left(tmp_path, capsys, seconds_per_step, shown):
    """Of a job that has gone on from step 50 of 100, and is at step 60."""
    with Logs(tmp_path, first_step=50, total_steps=100) as logs:
        progress, now = logs._progress, 0.0
        progress.get_time = lambda: now
        logs.advance(50)
        progress.print(progress)
        for step in range(51, 61):
            now = 7 + seconds_per_step * (step - 50)  # the first one compiled for 7 s
            logs.advance(step)
        progress.print(progress)
    compiling, training = capsys.readouterr().out.splitlines()
    assert compiling.split()[-3:] == ["50/100", "compiling", "-:--:--"]
    assert training.endswith(f" 60/100 {shown}")


def test_tensorboard_has_the_same_values(tmp_path):
    write(tmp_path, [10])
    (file,) = (tmp_path / "tensorboard").iterdir()
    scalars = {}
    data = file.read_bytes()
    while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        for value in Event.FromString(data[12 : 12 + size]).summary.value:
            scalars[value.tag] = value.simple_value
        data = data[16 + size :]
    assert scalars["loss/train"] == 1.5 and scalars["accuracy/test"] == 0.125
    assert len(scalars) == 5  # all but the NaN
