import dataclasses
import functools
import json
from pathlib import Path

import pytest
from numpy.testing import assert_array_equal

from train.data import dataset as data
from train.runs import directory as run_directory
from train.config import NOT_COMPARED, Data, flatten
from train.errors import UserError
from train.runs.files import write_json


@functools.cache
def digits(**options):
    return data.load(Data(**options))


def begin(config, dataset=None):
    run_directory.create(config)
    run_directory.begin(config, dataset or digits())


def finish(config, status="finished", step=30):
    begin(config)
    summary = {"status": status, "step": step, "best_step": step, "test_accuracy": 0.5}
    write_json(Path(config.run_dir) / "summary.json", summary)


def test_unused_directory_has_no_earlier_run(make_config):
    config = make_config()
    assert run_directory.earlier_summary(config) is None
    Path(config.run_dir).mkdir()
    assert run_directory.earlier_summary(config) is None
    # Killed before there was a config.json.
    (Path(config.run_dir) / ".config.json.tmp").write_text('{"see')
    (Path(config.run_dir) / "checkpoints").mkdir()
    assert run_directory.earlier_summary(config) is None


def test_begin_writes_a_config_that_can_be_run_again_and_the_environment(make_config):
    config = make_config(seed=3)
    begin(config)
    assert run_directory.read_config(Path(config.run_dir)) == config
    environment = json.loads((Path(config.run_dir) / "environment.json").read_text())
    assert {"jax", "flax", "optax", "jbn"} <= set(environment["packages"])
    assert environment["backend"] and environment["devices"]


def test_same_job_may_come_back_with_its_data_or_itself_moved(make_config, tmp_path):
    config = make_config()
    finish(config)
    Path(config.run_dir).rename(tmp_path / "moved")
    moved = make_config(run_dir=str(tmp_path / "moved"), data={"path": "/elsewhere"})
    assert run_directory.earlier_summary(moved)["status"] == "finished"


def test_other_job_is_refused_with_the_keys_that_differ(make_config):
    begin(make_config())
    with pytest.raises(
        UserError, match=r"holds another job: model.widths = \(16,\), now \(8,\); seed = 0, now 1"
    ):
        run_directory.earlier_summary(make_config(seed=1, model={"widths": (8,)}))


@pytest.mark.parametrize("status, refused", [("finished", False), ("stopped", True), ("failed", True)])
def test_length_may_grow_once_a_job_is_finished(make_config, status, refused):
    finish(make_config(), status)
    longer = make_config(steps=None, epochs=9.0)
    assert not run_directory.same_length(longer) and run_directory.same_length(make_config())
    if refused:
        with pytest.raises(UserError, match="epochs = None, now 9.0"):
            run_directory.earlier_summary(longer)
    else:
        assert run_directory.earlier_summary(longer)["status"] == status


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text(""), lambda path: (path / "thesis").mkdir(parents=True)]
)
def test_what_is_no_run_is_never_written_to(make_config, make):
    config = make_config()
    make(Path(config.run_dir))
    with pytest.raises(UserError, match="is in use, and not by a run"):
        run_directory.earlier_summary(config)


def test_directory_that_cannot_be_made_is_named(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="file/run' cannot be used: Not a directory: .* give another --run_dir"
    ):
        begin(make_config(run_dir=str(tmp_path / "file" / "run")))


def test_one_process_at_a_time_trains_in_a_directory(tmp_path):
    refused = pytest.raises(UserError, match="is in use by another process")
    with run_directory.locked(tmp_path), refused, run_directory.locked(tmp_path):
        pass
    with run_directory.locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "[]", '{"run_dir": "x"', '{"run_dir": "x", "colour": 3}'])
def test_config_that_cannot_be_read_is_named(make_config, text):
    config = make_config()
    begin(config)
    (Path(config.run_dir) / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json' (cannot be read|is not a job of this program)"):
        run_directory.earlier_summary(config)


def test_config_of_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        run_directory.read_config(tmp_path)


def test_every_key_of_the_schema_is_compared_but_how_and_where_a_job_runs(make_config):
    config = make_config()
    begin(config)
    for key, value in flatten(dataclasses.asdict(config)).items():
        changed = change(config, key, f"not {value}")
        if key in NOT_COMPARED:
            assert key == "run_dir" or run_directory.earlier_summary(changed) is None
        else:
            with pytest.raises(UserError, match=f"holds another job: {key} = "):
                run_directory.earlier_summary(changed)


def change(config, key, value):
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    changed = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: changed})


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"feature_scales": (0.01, 100.0)}], ids=str)
def test_what_the_data_are_like_is_noted_for_those_who_come_after(make_config, options):
    config = make_config()
    begin(config, digits(**options))
    described = run_directory.read_data(Path(config.run_dir))
    assert (described.shape, described.dtype, described.classes) == ((8, 8, 1), "float32", 10)
    assert described.fingerprint == digits().fingerprint
    for value, wanted in zip(described.preprocessing, digits(**options).preprocessing):
        assert_array_equal(value, wanted, strict=True)


def test_other_data_than_those_a_run_was_trained_on_are_refused(make_config):
    begin(make_config())
    other = digits()._replace(fingerprint="of others")
    with pytest.raises(UserError, match="was trained on other data .fingerprint .*, now of others"):
        begin(make_config(), other)
