"""What several processes agree on, with the others simulated; tests/commands has real ones."""

import dataclasses
import os
import threading

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from train.config import flatten
from train.errors import RunFailed, UserError
from train.runs import processes
from train.runs.stopping import StopRequests


def test_devices_that_do_not_fit_are_refused(make_config):
    for options, message in (
        ({"devices": 99}, "devices: expected at most 8, the number of devices here, got 99"),
        ({"devices": 3}, "batch_size: expected a multiple of 3 devices, such as 129, got 128; or give other"),
        (
            {"devices": 8, "batch_size": 24, "optimizer": {"accumulate": 2}},
            "expected a multiple of 8 devices times optimizer.accumulate = 2, such as 32, got 24",
        ),
    ):
        with pytest.raises(UserError, match=message):
            processes.make_mesh(make_config(**options))
    assert processes.make_mesh(make_config(devices=4)).size == 4
    assert processes.make_mesh(make_config(devices=None)).size == 8


def test_arrays_are_whole_on_every_device_or_split_by_rows():
    mesh = processes.mesh_of(jax.devices()[:4])
    x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    whole, rows = processes.replicate(mesh, x), processes.shard(mesh, x)
    for i, shard in enumerate(rows.addressable_shards):
        assert_array_equal(shard.data, x[2 * i : 2 * i + 2])
    assert len(whole.addressable_shards) == 4
    for shard in whole.addressable_shards:
        assert_array_equal(shard.data, x)
    like = processes.replicated_like(mesh, jax.ShapeDtypeStruct((3,), np.float32))
    assert like.sharding.is_equivalent_to(whole.sharding, 1) and like.shape == (3,)


@pytest.fixture
def others(monkeypatch):
    """Give each call to `max_over_processes` the values that another process passes in it."""
    values = []

    def largest(*ours):
        return list(map(max, ours, values.pop(0)))

    monkeypatch.setattr(processes, "max_over_processes", largest)
    return values


def passed_by(monkeypatch, call):
    """Return what a call passes to `max_over_processes`."""
    passed = []
    with monkeypatch.context() as patch:
        patch.setattr(processes, "max_over_processes", lambda *values: passed.append(values) or list(values))
        call()
    return passed


def test_processes_with_different_jobs_are_refused_with_the_keys_that_differ(
    make_config, monkeypatch, others
):
    ours = make_config(seed=1, model={"widths": (8,)})
    others += passed_by(monkeypatch, lambda: processes.check_same_job(make_config(seed=2)))
    with pytest.raises(
        UserError, match=r"expected the same job in every process, got .*widths = \(8,\), seed = 1"
    ):
        processes.check_same_job(ours)


def test_processes_may_differ_in_how_they_find_each_other_and_the_data_and_in_nothing_else(
    make_config, monkeypatch, others
):
    config = make_config()
    for key, value in flatten(dataclasses.asdict(config)).items():
        section, _, name = key.rpartition(".")
        part = getattr(config, section) if section else config
        changed = dataclasses.replace(part, **{name: f"not {value}"})
        other = dataclasses.replace(config, **{section: changed}) if section else changed
        others += passed_by(monkeypatch, lambda other=other: processes.check_same_job(other))
        if key in ("data.path", "data.cache", "coordinator", "num_processes", "process_id", "peer_timeout"):
            processes.check_same_job(config)
        else:
            with pytest.raises(UserError, match=f"got {key} = "):
                processes.check_same_job(config)


def test_failure_of_one_process_is_one_of_all(others):
    for error in (UserError("bad key"), RunFailed("no memory"), OSError(28, "full")):
        others.append([0])
        with pytest.raises(type(error)) as raised, processes.raise_on_all("begin"):
            raise error
        assert raised.value is error
    others.append([1])
    with pytest.raises(UserError, match="another process could not begin; it says why"):  # noqa: SIM117
        with processes.raise_on_all("begin"):
            pass
    others.append([0])
    with processes.raise_on_all("begin"):
        pass


def test_all_processes_take_as_many_steps_as_the_slowest_and_stop_for_a_signal_to_one(others):
    stop = StopRequests()
    others += [[-5, 0], [-9, 0], [-9, 15]]
    assert processes.agree(7, stop) == (5, 0) and processes.agree(7, stop) == (7, 0)
    assert stop.received is None
    assert processes.agree(10**9, stop) == (9, 15)
    assert stop.received == 15
    stop.received = 2  # its own signal stays
    others.append([-9, 15])
    assert processes.agree(7, stop) == (7, 15)
    assert stop.received == 2


@pytest.fixture
def connect(monkeypatch):
    """Note how JAX is asked to connect; the answer is an error if a test gives one."""
    calls, errors = [], []

    def initialize(*arguments, **options):
        calls.append((arguments, options))
        if errors:
            raise errors.pop()

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls, errors


def test_processes_are_connected_as_the_flags_or_the_cluster_say(make_config, connect):
    calls, errors = connect
    flags = {"coordinator": "host:1234", "num_processes": 2, "process_id": 1}
    processes.initialize(make_config(**flags, peer_timeout=7))
    ((arguments, options),) = calls
    assert arguments == ("host:1234", 2, 1)
    # Longer than the job's own, for JAX's end is a core dump.
    assert options["heartbeat_timeout_seconds"] > 7 < options["initialization_timeout"]
    processes.initialize(make_config(num_processes=1))
    assert len(calls) == 1  # asks no cluster
    errors.append(ValueError("no cluster"))
    processes.initialize(make_config())
    assert calls[1][0] == (None, None, None)
    errors.append(ValueError("odd address"))
    with pytest.raises(ValueError, match="odd address"):
        processes.initialize(make_config(**flags))
    errors.append(RuntimeError("must be called before any JAX computations"))
    with pytest.raises(UserError, match="must be called before .*\nGive --num-processes 1"):
        processes.initialize(make_config())


@pytest.mark.slow
def test_process_that_never_comes_ends_the_others_with_a_message(make_config, monkeypatch, capfd):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: ended.wait(60))
    processes.initialize(make_config(coordinator="host:1234", num_processes=2, process_id=1, peer_timeout=1))
    assert codes == [1]
    complaint = capfd.readouterr().err
    assert complaint.startswith("failed: not all 2 processes met at host:1234 within 1 s.")
    assert "raise --peer-timeout" in complaint


def test_process_by_itself_does_not_exit_alone():
    processes.exit_alone(1)
