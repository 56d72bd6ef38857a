import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import pytest
from numpy.testing import assert_array_equal

from train import data
from train.config import Data, flatten
from train.errors import UserError
from train.runs import directory
from train.runs.files import write_json

MAY_CHANGE = (
    *("run_dir", "data.path", "data.cache", "profile", "devices"),
    *("coordinator", "num_processes", "process_id", "peer_timeout"),
)


@functools.cache
def digits(**options):
    return data.load(Data(**options))


def begin(config, dataset=None):
    with directory.created_and_locked(Path(config.run_dir)):
        directory.begin(config, dataset or digits())


def finish(config, status="finished", step=30):
    begin(config)
    summary = {"status": status, "step": step, "best_step": step, "test_accuracy": 0.5}
    write_json(Path(config.run_dir) / "summary.json", summary)


def change(config, key, value):
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    changed = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: changed})


def test_unused_directory_has_no_earlier_run(make_config):
    config = make_config()
    assert directory.earlier_summary(config) is None
    Path(config.run_dir).mkdir()
    assert directory.earlier_summary(config) is None
    # A kill before there was a config.json.
    (Path(config.run_dir) / ".config.json.tmp").write_text('{"see')
    (Path(config.run_dir) / "checkpoints").mkdir()
    assert directory.earlier_summary(config) is None


def test_begin_writes_a_config_that_can_be_run_again_and_the_environment(make_config):
    config = make_config(seed=3)
    begin(config)
    assert directory.read_config(Path(config.run_dir)) == config
    environment = json.loads((Path(config.run_dir) / "environment.json").read_text())
    assert {"jax", "flax", "optax", "jbn"} <= set(environment["packages"])
    assert environment["backend"] and environment["devices"]


def test_same_job_may_come_back_with_its_data_or_itself_moved(make_config, tmp_path):
    config = make_config()
    finish(config)
    Path(config.run_dir).rename(tmp_path / "moved")
    moved = make_config(run_dir=tmp_path / "moved", data={"path": "/elsewhere"})
    assert directory.earlier_summary(moved).status == "finished"


def test_other_job_is_refused_with_the_keys_that_differ(make_config):
    begin(make_config())
    message = r"holds another job: model.widths = \(16,\), now \(8,\); seed = 0, now 1"
    with pytest.raises(UserError, match=message):
        directory.earlier_summary(make_config(seed=1, model={"widths": (8,)}))


def test_every_key_is_compared_but_how_and_where_a_job_runs(make_config):
    config = make_config()
    begin(config)
    for key, value in flatten(dataclasses.asdict(config)).items():
        changed = change(config, key, f"not {value}")
        if key in MAY_CHANGE:
            assert key == "run_dir" or directory.earlier_summary(changed) is None
        else:
            with pytest.raises(UserError, match=f"holds another job: {key} = "):
                directory.earlier_summary(changed)


def test_length_may_grow_once_a_job_is_finished(make_config):
    longer = make_config(steps=None, epochs=9.0)
    for status, refused in (("finished", False), ("stopped", True), ("failed", True)):
        finish(make_config(), status)
        assert not directory.has_same_length(longer) and directory.has_same_length(make_config())
        expected = (
            pytest.raises(UserError, match="epochs = None, now 9.0") if refused else contextlib.nullcontext()
        )
        with expected:
            assert directory.earlier_summary(longer).status == status


def test_summary_is_gone_before_a_longer_job_is_written_down(make_config, monkeypatch):
    """Or a run that is killed while it begins to grow would look finished."""
    finish(make_config())

    def killed(source, target):
        assert Path(target).name == "config.json" and not (Path(target).parent / "summary.json").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(directory.os, "replace", killed)
        begin(make_config(steps=40))
    assert directory.earlier_summary(make_config()) is None


def test_directory_of_something_else_is_never_written_to(make_config):
    config = make_config()
    path = Path(config.run_dir)
    for make in (lambda: path.write_text(""), lambda: (path / "thesis").mkdir(parents=True)):
        make()
        with pytest.raises(UserError, match="is in use, and not by a run"):
            directory.earlier_summary(config)
        if path.is_file():
            path.unlink()


def test_directory_that_cannot_be_created_is_named(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    message = "file/run' cannot be used: Not a directory: .* Give another --run_dir"
    with pytest.raises(UserError, match=message):
        begin(make_config(run_dir=tmp_path / "file" / "run"))


def test_full_disk_is_not_taken_for_a_directory_that_cannot_be_used(tmp_path):
    with pytest.raises(OSError, match="No space left"), directory.usable(tmp_path):
        raise OSError(28, "No space left on device")


def test_one_process_at_a_time_trains_in_a_directory(tmp_path):
    refused = pytest.raises(UserError, match="is in use by another process")
    with directory.created_and_locked(tmp_path), refused, directory.created_and_locked(tmp_path):
        pass
    with directory.created_and_locked(tmp_path):
        pass
    with pytest.raises(BlockingIOError), directory.created_and_locked(tmp_path):
        raise BlockingIOError  # of the job, not of the lock


def test_config_that_cannot_be_read_is_named(make_config, tmp_path):
    config = make_config()
    begin(config)
    for text in ("", "[]", '{"run_dir": "x"', '{"run_dir": "x", "colour": 3}', '{"run_dir": "x"}'):
        (Path(config.run_dir) / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json' (cannot be read|is not a job of this program)"):
            directory.earlier_summary(config)
    with pytest.raises(UserError, match="is not a run directory: it has no config.json"):
        (tmp_path / "empty").mkdir()
        directory.read_config(tmp_path / "empty")
    study = Path(config.run_dir).parent
    (study / "job.toml").touch()
    for path, message in (
        (study, f"such as '{config.run_dir}'"),
        (study / "no", "no' does not exist; exp"),
        (study / "job.toml", "Give the folder that training it made."),
        (Path(config.run_dir) / "config.json", "Give the folder of a run."),
    ):
        with pytest.raises(UserError, match=message):
            directory.read_config(path)


def test_data_are_described_for_those_who_use_the_network_later(make_config):
    for options in ({}, {"normalize": True}, {"feature_scales": (0.01, 100.0)}):
        config = make_config()
        begin(config, digits(**options))
        described = directory.read_data(Path(config.run_dir))
        assert (described.shape, described.dtype, described.labels.outputs) == ((8, 8, 1), "float32", 10)
        assert described.fingerprint == digits().fingerprint
        for value, expected in zip(described.preprocessing, digits(**options).preprocessing):
            assert_array_equal(value, expected, strict=True)


def test_data_json_that_does_not_describe_data_is_named(make_config):
    begin(make_config())
    path = Path(make_config().run_dir) / "data.json"
    whole = json.loads(path.read_text())
    for spoilt in (
        *({"shape": []}, {"shape": [8, 0, 1]}, {"shape": [-1]}, {"shape": "x"}, {"shape": [10**400]}),
        *({"dtype": "int3"}, {"preprocessing": []}, {"fingerprint": 3}),
        *({"labels": None, "classes": 3}, {"labels": []}, {"labels": {"counts": [1]}}),
        *(
            {"labels": whole["labels"] | change}
            for change in ({"counts": [-1]}, {"counts": [10**400]}, {"names": ["a"]}, {"mean": "x"})
        ),
        *(
            {"preprocessing": {"mean": value, "std": 1}}
            for value in ("x", [1, 2, 3], [[1], [2, 3]], 10**400, None)
        ),
        *({"preprocessing": {"mean": 0, "std": value}} for value in (None, 0, -1, [None])),
    ):
        path.write_text(json.dumps(whole | spoilt))
        with pytest.raises(UserError, match="data.json' does not describe data: .* Delete it"):
            directory.read_data(path.parent)
    del whole["labels"]  # as in earlier versions
    for classes, outputs in ((10, 10), (0, None), (10**9, None), (10**400, None)):
        path.write_text(json.dumps(whole | {"classes": classes}))
        if outputs:
            assert directory.read_data(path.parent).labels.outputs == outputs
        else:
            with pytest.raises(UserError, match="data.json' does not describe data: .* Delete it"):
                directory.read_data(path.parent)


def test_other_data_than_those_of_the_run_are_refused(make_config):
    begin(make_config())
    path = Path(make_config().run_dir)
    directory.check_same_data(path, digits().fingerprint)
    with pytest.raises(UserError, match="was trained on other data .fingerprint .*, now 0{32}."):
        directory.check_same_data(path, "0" * 32)
    written = json.loads((path / "data.json").read_text())
    (path / "data.json").write_text(json.dumps(written | {"fingerprint": "1" * 16}))
    directory.check_same_data(path, "0" * 32)  # an earlier version's, of a part of the data, tells nothing
