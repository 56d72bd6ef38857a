"""Several devices and several processes: one job, whatever it runs on."""

import dataclasses
import json
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from command import finish, start
from numpy.testing import assert_allclose, assert_array_equal

from train.runs import processes as distributed
from train.runs import directory as run_directory
from train.runs.checkpoints import Checkpoints
from train.errors import UserError
from train.training.job import Job
from train.runs.log import read_metrics

# Every kind of thing that could differ: augmentation, accumulation, an average, an evaluation of odd size.
JOB = (
    *(
        "configs/digits_mlp.toml",
        "--eval-every",
        5,
        "--batch-size",
        128,
        "--data.shift",
        1,
        "--model.widths",
        16,
    ),
    *("--optimizer.schedule", "constant", "--optimizer.accumulate", 2, "--optimizer.average", 0.9),
)


def told_by_flags(i, processes, port):
    return ["--coordinator", f"127.0.0.1:{port}", "--num-processes", processes, "--process-id", i], {}


def told_by_slurm(i, processes, port):
    job = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": processes, "STEP_NUM_NODES": 1}
    variables = job | {"PROCID": i, "LOCALID": i}
    return [], {f"SLURM_{name}": value for name, value in variables.items()} | {"JAX_COORDINATOR_PORT": port}


def told_by_open_mpi(i, processes, port):
    world = {
        f"OMPI_COMM_WORLD_{name}": value
        for name, value in {"SIZE": processes, "RANK": i, "LOCAL_RANK": i}.items()
    }
    return [], world | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "JAX_COORDINATOR_PORT": port}


def start_processes(job, run_dir, processes=2, devices=2, *, told=told_by_flags, missing=(), peer_timeout=60):
    """Starts the processes of one job on this machine, all before any is waited for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for i in set(range(processes)) - set(missing):
        flags, variables = told(i, processes, port) if processes > 1 else ([], {})
        environment = {name: str(value) for name, value in variables.items()}
        flags = [*flags, "--run-dir", run_dir, "--peer-timeout", peer_timeout]
        started.append(start(*job, *flags, JAX_NUM_CPU_DEVICES=str(devices), **environment))
    return started


def wait_for(condition, processes):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def finish_all(processes, code=0):
    done = [finish(process) for process in processes]
    assert [process.returncode for process in done] == [code] * len(done), done
    return done


def final_state(run_dir):
    here = dict.fromkeys(("coordinator", "num_processes", "process_id")) | {"devices": 1}
    config = dataclasses.replace(run_directory.read_config(run_dir), **here)
    with Checkpoints(run_dir) as checkpoints:
        return checkpoints.restore(checkpoints.latest_step, Job(config).initial)


def assert_same_training(run_dir, wanted):
    close = lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    ours, theirs = final_state(run_dir), final_state(wanted)
    jax.tree.map(close, (ours.variables, ours.average), (theirs.variables, theirs.average))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same job in three layouts: (processes, devices of each)."""
    run_dirs, job = {}, [*JOB, "--steps", 12]
    for layout in ((1, 1), (1, 4), (2, 2)):
        run_dirs[layout] = tmp_path_factory.mktemp("layout") / "run"
        first = finish_all(start_processes(job, run_dirs[layout], *layout, told=told_by_slurm))[0]
        assert first.stdout.splitlines()[-1].startswith("Finished at step 12")
    return run_dirs


@pytest.mark.parametrize("layout", [(1, 4), (2, 2)])
def test_every_layout_gives_the_same_training_to_rounding(runs, layout):
    assert_same_training(runs[layout], runs[1, 1])
    for line, wanted in zip(read_metrics(runs[layout]), read_metrics(runs[1, 1]), strict=True):
        exact = ("step", "split", "accuracy")
        assert [line[key] for key in exact] == [wanted[key] for key in exact]
        assert_allclose(line["loss"], wanted["loss"], rtol=1e-5)


def test_only_the_first_of_several_processes_writes_and_prints(runs):
    environment = json.loads((runs[2, 2] / "environment.json").read_text())
    assert (environment["processes"], len(environment["devices"])) == (2, 4)
    lines = [(line["step"], line["split"]) for line in read_metrics(runs[2, 2])]
    assert len(lines) == len(set(lines)) == 9


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_evaluation_is_the_same_to_the_last_bit_on_any_number_of_devices(make_config, devices):
    results = []
    for count in (1, devices):
        job = Job(make_config(devices=count))
        results += [[job.evaluate(job.initial.variables, split) for split in (job.data.train, job.data.test)]]
    assert results[0] == results[1]


def test_processes_evaluate_the_same_weights_to_the_same_last_bit(tmp_path):
    # A step too small to change a weight.
    still = ["--steps", 1, "--optimizer.learning-rate", 1e-30, "--optimizer.weight-decay", 0]
    lines = {}
    for layout in ((1, 1), (2, 2)):
        run_dir = tmp_path / str(layout)
        finish_all(start_processes([*JOB, *still, "--model.norm", "none"], run_dir, *layout))
        evaluated = [line for line in read_metrics(run_dir) if line["split"] != "train"]
        lines[layout] = [{**line, "seconds": None} for line in evaluated]
    assert lines[1, 1] == lines[2, 2] and len(lines[1, 1]) == 2


def test_checkpoint_moves_between_one_process_and_several(tmp_path, runs):
    for before, after in (((2, 2), (1, 1)), ((1, 1), (2, 2))):
        run_dir = tmp_path / str(after)
        shutil.copytree(runs[before], run_dir)
        longer = start_processes([*JOB, "--steps", 17], run_dir, *after, told=told_by_open_mpi)
        assert "going on from step 12" in finish_all(longer)[0].stdout
    assert_same_training(tmp_path / "(1, 1)", tmp_path / "(2, 2)")


def test_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    processes = start_processes([*JOB, "--steps", 100000], tmp_path / "run", devices=1)
    wait_for(lambda: read_metrics(tmp_path / "run"), processes)
    processes[1].send_signal(signal.SIGTERM)
    done = finish_all(processes, 143)
    step = json.loads((tmp_path / "run" / "summary.json").read_text())["step"]
    assert done[0].stdout.splitlines()[-1].startswith(f"Stopped at step {step}: ")
    assert step >= 5 and int(final_state(tmp_path / "run").step) == step


@pytest.mark.parametrize("missing", [0, 1])
def test_process_that_never_comes_ends_the_others_with_a_message(tmp_path, missing):
    (process,) = start_processes([*JOB, "--steps", 5], tmp_path / "run", missing=[missing], peer_timeout=2)
    (done,) = finish_all([process], code=1)
    assert "failed: not all 2 processes met at 127.0.0.1:" in done.stderr and "within 2 s" in done.stderr
    assert "raise --peer-timeout" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("number, dead", [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1)])
def test_process_that_dies_or_falls_silent_ends_the_others_with_a_message(tmp_path, number, dead):
    job = [*JOB, "--steps", 100000, "--eval-every", 50]
    processes = start_processes(job, tmp_path / "run", devices=1, peer_timeout=5)
    wait_for(lambda: read_metrics(tmp_path / "run"), processes)
    processes[dead].send_signal(number)
    other = finish(processes[1 - dead])
    processes[dead].kill()
    processes[dead].communicate()
    # Whichever comes first: our message, or that of JAX's runtime, which ends the process.
    assert other.returncode in (1, -signal.SIGABRT)
    assert "another process of the job has ended" in other.stderr or "another task died" in other.stderr


def test_mistake_that_one_process_finds_ends_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("of another job")
    first, other = finish_all(start_processes([*JOB, "--steps", 5], tmp_path / "run", devices=1), code=2)
    assert "config.json' cannot be read" in first.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ({"devices": 99}, r"devices = 99; wanted at most 8"),
        ({"devices": 3}, r"batch_size = 128 cannot be split evenly over 3 devices; wanted 129, say"),
        (
            {"devices": 8, "batch_size": 24, "optimizer": {"accumulate": 2}},
            "batch_size = 24 in 2 parts cannot be split evenly over 8 devices; wanted 32, say",
        ),
    ],
)
def test_devices_that_do_not_fit_are_refused(make_config, options, message):
    with pytest.raises(UserError, match=message):
        distributed.make_mesh(make_config(**options))


def test_arrays_lie_whole_on_every_device_or_by_rows():
    mesh = distributed.mesh_of(jax.devices()[:4])
    x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    whole, rows = distributed.replicate(mesh, x), distributed.shard(mesh, x)
    for i, shard in enumerate(rows.addressable_shards):
        assert_array_equal(shard.data, x[2 * i : 2 * i + 2])
    assert len(whole.addressable_shards) == 4
    for shard in whole.addressable_shards:
        assert_array_equal(shard.data, x)
