import signal

import pytest

from train.errors import RunFailed, UserError
from train.runs.files import write_json
from train.runs.stopping import StopRequests
from train.studies import runner as several
from train.training import loop

NOTHING = dict.fromkeys(several.COLUMNS)


@pytest.fixture
def train(monkeypatch, tmp_path, make_config):
    """Returns a function that runs jobs which end like this: "finished", "stopped", or with an error."""

    def train(*ends, stop=None):
        stop, seen = stop or StopRequests(), []
        remaining = iter(ends)

        def fit(config, stop):
            end = next(remaining)
            if isinstance(end, Exception):
                raise end
            if end == "stopped":
                stop.received = signal.SIGTERM
            return NOTHING | {"status": end, "step": 7}

        monkeypatch.setattr(loop, "fit", fit)
        configs = [make_config(run_dir=str(tmp_path / f"{n}")) for n in range(len(ends))]
        code, outcomes = several.train_all(configs, stop, lambda outcomes: seen.append(list(outcomes)))
        assert outcomes == seen[-1]
        return code, seen

    return train


REFUSED, FAILED = UserError("no such data."), RunFailed("no number.")


@pytest.mark.parametrize(
    "ends, code",
    [
        (["finished"], 0),
        (["finished", FAILED, "finished"], 1),
        ([REFUSED, "finished", FAILED], 2),
        ([FAILED, FAILED], 1),
        (["finished", RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "finished"], 1),
    ],
)
def test_exit_code_is_that_of_the_worst_and_every_job_has_its_turn(train, ends, code):
    found, seen = train(*ends)
    assert found == code and len(seen[-1]) == len(ends)
    by_itself = {"finished": 0, REFUSED: 2}
    assert [outcome.code for outcome in seen[-1]] == [by_itself.get(end, 1) for end in ends]


def test_error_that_the_program_made_is_not_passed_over(train):
    with pytest.raises(ZeroDivisionError):
        train("finished", ZeroDivisionError(), "finished")


def test_after_each_job_the_outcomes_so_far_are_told(train):
    _, seen = train("finished", REFUSED, "finished")
    assert [[outcome.code for outcome in outcomes] for outcomes in seen] == [[0], [0, 2], [0, 2, 0]]


def test_every_outcome_has_all_columns_and_its_error(train):
    _, seen = train("finished", REFUSED, FAILED)
    finished, refused, failed = (outcome.summary for outcome in seen[-1])
    assert finished == NOTHING | {"status": "finished", "step": 7, "error": None}
    assert refused == NOTHING | {"status": "refused", "error": "no such data."}
    assert failed == NOTHING | {"status": "failed", "error": "no number."}


def test_job_that_failed_keeps_what_its_summary_says(train, tmp_path):
    (tmp_path / "0").mkdir()
    write_json(tmp_path / "0" / "summary.json", NOTHING | {"status": "failed", "step": 12, "best_step": 10})
    _, ((outcome,),) = train(FAILED)
    assert outcome.summary == NOTHING | {
        "status": "failed",
        "step": 12,
        "best_step": 10,
        "error": "no number.",
    }


def test_job_that_is_refused_has_nothing_of_the_summary_in_its_directory(train, tmp_path):
    (tmp_path / "0").mkdir()
    write_json(tmp_path / "0" / "summary.json", NOTHING | {"status": "finished", "step": 12})
    _, ((outcome,),) = train(REFUSED)
    assert outcome.summary["step"] is None


@pytest.mark.parametrize("before", [[], [REFUSED, FAILED]])
def test_stop_ends_all_with_128_and_its_signal(train, before):
    code, seen = train(*before, "stopped", "finished", "finished")
    assert code == 128 + signal.SIGTERM and len(seen[-1]) == len(before) + 1
    assert seen[-1][-1].code == code and seen[-1][-1].summary["status"] == "stopped"


@pytest.mark.parametrize(
    "end, others, code", [("finished", ["finished"], 130), (FAILED, ["finished"], 130), ("finished", [], 0)]
)
def test_stop_that_came_too_late_for_a_job_keeps_the_next_from_beginning(train, end, others, code):
    stop = StopRequests()
    stop.received = signal.SIGINT
    found, seen = train(end, *others, stop=stop)
    assert found == code and len(seen) == 1


def test_it_is_told_which_job_runs_and_what_became_of_it(train, capsys, tmp_path):
    train("finished", REFUSED, FAILED)
    assert capsys.readouterr().out.splitlines() == [
        f"[1/3] {tmp_path}/0",
        f"[2/3] {tmp_path}/1",
        "refused: no such data.",
        f"[3/3] {tmp_path}/2",
        "failed: no number.",
    ]


def test_folder_may_be_there_already(tmp_path):
    for _ in range(2):
        several.create(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_table_is_aligned_to_the_right():
    shown = several.table(["name", "steps"], [["a", "12,000"], ["longer", "-"]])
    assert shown.split("\n") == ["  name   steps", "     a  12,000", "longer       -"]
    assert several.table(["name"], []) == "name"


@pytest.mark.parametrize(
    "value, how, text",
    [
        (None, ".4f", "-"),
        (None, "", "-"),
        (0.5, ".4f", "0.5000"),
        (12345, ",.0f", "12,345"),
        (0.1, "", "0.1"),
        (0, "", "0"),
        (False, "", "False"),
        ("batch", "", "batch"),
        ("", "", ""),
        ((64, 32), "", "64 32"),
        ((), "", ""),
    ],
)
def test_text_is_what_a_table_shows(value, how, text):
    assert several.text(value, how) == text
