import dataclasses
from pathlib import Path

import numpy as np
import pytest

from train.data.dataset import Preprocessing
from train.runs import directory as run_directory
from train.runs.directory import Description
from train.runs.files import write_json
from train.runs.log import Logs
from train.studies import series
from train.studies.runner import Outcome

FINISHED = {"status": "finished", "error": None}


@pytest.fixture
def config(make_config):
    """Makes the run directory of a job that has been evaluated twice and measured once."""
    config = make_config(inspect=True)
    path = Path(config.run_dir)
    path.mkdir()
    description = Description((8, 8, 1), "uint8", 7, Preprocessing(np.float32(0), np.float32(1)), "f")
    preprocessing = {name: float(value) for name, value in description.preprocessing._asdict().items()}
    write_json(path / "data.json", description._asdict() | {"preprocessing": preprocessing})
    with Logs(path, first_step=0, total_steps=20) as logs:
        logs.inspection(0, {"loss": 2.5, "movement": [0.5, float("nan")]})
        for step, reached in ((10, 0.5), (20, 0.75)):
            splits = {"train": 0.1, "validation": 0.2, "test": reached}
            logs.results(step, 1.0, {split: {"loss": 1.0, "accuracy": at} for split, at in splits.items()})
    assert run_directory.read_data(path) == description
    return config


def test_a_run_is_what_its_files_say(config):
    read = series.read(config, Outcome(0, FINISHED))
    assert (read.config, read.summary, read.classes) == (config, FINISHED, 7)
    assert read.curve == [(10, 0.5), (20, 0.75)] and read.final_accuracy == 0.75
    splits = [(line["step"], line["split"], line["accuracy"]) for line in read.metrics]
    assert splits[:3] == [(10, "train", 0.1), (10, "validation", 0.2), (10, "test", 0.5)] and len(splits) == 6
    assert read.inspections == [{"step": 0, "loss": 2.5, "movement": [0.5, None]}]


def test_refused_job_has_nothing_of_the_other_one_in_its_directory(config):
    refused = {"status": "refused", "error": "holds another job"}
    other = dataclasses.replace(config, batch_size=64)
    assert series.read(other, Outcome(2, refused)) == (other, refused, None, [], [])


def test_job_that_failed_before_its_data_were_there_has_nothing(make_config):
    config, failed = make_config(), {"status": "failed", "error": "out of memory"}
    assert series.read(config, Outcome(1, failed)) == (config, failed, None, [], [])


def test_job_that_failed_later_has_what_it_had_measured(config):
    read = series.read(config, Outcome(1, {"status": "failed", "error": "no number"}))
    assert (read.classes, read.curve) == (7, [(10, 0.5), (20, 0.75)])


def test_job_that_was_not_inspected_has_no_inspections(config):
    (Path(config.run_dir) / "inspection.jsonl").unlink()
    assert series.read(config, Outcome(0, FINISHED)).inspections == []


@pytest.mark.parametrize(
    "status, at_the_end", [("finished", 0.75), ("failed", None), ("stopped", None), ("refused", None)]
)
def test_only_a_job_that_came_to_its_end_has_a_final_accuracy(config, status, at_the_end):
    assert series.read(config, Outcome(0, {"status": status, "error": None})).final_accuracy == at_the_end


def test_job_without_evaluations_has_no_final_accuracy(config):
    assert series.Run(config, FINISHED, 7, [], []).final_accuracy is None


def test_jobs_of_one_name_are_a_series_in_the_order_of_their_first(make_config):
    runs = [series.Run(make_config(seed=seed), FINISHED, 7, [], []) for seed in range(5)]
    found = series.group(["b", "a", "b", "c", "a"], runs)
    assert [job.name for job in found] == ["b", "a", "c"]
    assert [job.over(lambda run: run.config.seed) for job in found] == [[0, 2], [1, 4], [3]]
    assert [job.config.seed for job in found] == [0, 1, 3]


def test_names_of_jobs_to_come_make_no_series(make_config):
    run = series.Run(make_config(), FINISHED, 7, [], [])
    assert series.group(["a", "b"], [run]) == [series.Series("a", (run,))]
    assert series.group(["a"], []) == []
