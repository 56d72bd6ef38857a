"""Two processes of two devices each: one job after the other, which one process here has trained too."""

import json
import signal
import socket
import time

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.helpers.command import finish, start
from tests.helpers.jobs import final_state, fit, make_config, results
from train.runs.summary import read_summary
from train.training.trained import serving

pytestmark = pytest.mark.slow

# What could differ: augmentation, accumulation, an average, an evaluation of odd size, recalibration.
JOB = {
    "steps": 12,
    "eval_every": 5,
    "recalibrate": True,
    "data": {"shift": 1},
    "optimizer": {"schedule": "constant", "accumulate": 2, "average": 0.9, "weight_decay": 0.0},
}
FLAGS = [
    *("configs/digits_mlp.toml", "--steps", 12, "--eval-every", 5, "--model.widths", 16, "--data.shift", 1),
    *("--optimizer.schedule", "constant", "--optimizer.accumulate", 2, "--optimizer.average", 0.9),
    *("--optimizer.weight-decay", 0, "--peer-timeout", 20, "--recalibrate", True),
]

PROCESS = """
import json, os, signal, sys
from pathlib import Path
from train.__main__ import main

folder, *flags = sys.argv[1:]
folder, facts = Path(folder), {}
job = lambda name, *more: [*flags, "--run-dir", str(folder / name), *more]
facts["scratch"] = main(job("scratch"))

import jax
from train.training.trained import serving
from train.config import load
from train.errors import UserError
from train.runs import processes
from train.runs.stopping import StopRequests
from train.training import fit, loop, steps

me, train_steps = jax.process_index(), steps.train_steps
config = lambda *arguments: load(Path(flags[0]), job(*arguments)[1:])

def refused(config):
    try:
        fit(config, StopRequests())
    except UserError as error:
        return str(error)

import flax.linen as nn
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jbn.linen import recalibrate

mesh = jax.make_mesh((4,), ("data",))
place = lambda x, *spec: jax.make_array_from_callback(
    np.shape(x), NamedSharding(mesh, PartitionSpec(*spec)), lambda index: np.asarray(x)[index]
)
layer, rows = nn.BatchNorm(True), np.arange(48.0, dtype="float32").reshape(16, 3) ** 2
variables, batches = layer.init(jax.random.key(0), rows), [place(rows[:12], "data"), place(rows[12:], "data")]
facts["recalibrated"] = []
for here in jax.tree.map(np.asarray, variables), jax.tree.map(place, variables):
    found = recalibrate(layer.apply, here, batches)["batch_stats"]
    facts["recalibrated"].append([np.asarray(leaf).tolist() for leaf in jax.tree.leaves(found)])

facts["evaluated"] = serving.evaluate(folder / "alone")
facts["moved"] = fit(config("moved"), StopRequests()).step
facts["other seed"] = refused(config("different", "--seed", str(me)))
path = folder / ("data.npz" if me == 0 else "nothing.npz")
facts["other data"] = refused(config("different", "--data.name", "npz", "--data.path", str(path)))

loop.SECONDS_PER_DISPATCH = 0  # one step each

def signal_after_6(config, state, *arguments, **options):
    state = train_steps(config, state, *arguments, **options)
    if me == 1 and int(state.step) == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    return state

steps.train_steps = signal_after_6
with StopRequests() as stop:
    facts["stopped"] = fit(config("stopped"), stop).step, stop.received

(folder / f"facts{me}.json").write_text(json.dumps(facts))

def broken_after_2(config, state, *arguments, **options):
    if me == 1 and int(state.step) == 2:
        raise ZeroDivisionError("in the third step of process 1")
    return train_steps(config, state, *arguments, **options)

steps.train_steps = broken_after_2
processes._watch._interval = 0.4  # seconds: who is gone is known after two beats
processes.initialize = lambda config: None  # it is connected
sys.exit(main(job("exception")))
"""


def told_by_slurm(i, port):
    job = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": 2, "STEP_NUM_NODES": 1}
    variables = {f"SLURM_{name}": value for name, value in (job | {"PROCID": i, "LOCALID": i}).items()}
    return variables | {"JAX_COORDINATOR_PORT": port}


def told_by_open_mpi(i, port):
    world = {
        f"OMPI_COMM_WORLD_{name}": value for name, value in {"SIZE": 2, "RANK": i, "LOCAL_RANK": i}.items()
    }
    return world | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "JAX_COORDINATOR_PORT": port}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture
def done(folder):
    """Run the processes, once for all tests; return how they ended and the facts that they noted."""
    if not DONE:
        fit(make_config(folder / "alone", **JOB))
        assert not fit(make_config(folder / "moved", **JOB), stop_after=4).finished
        arrays = {"x_train": np.zeros((300, 4, 4), np.float32), "y_train": np.arange(300) % 3}
        arrays |= {"x_test": arrays["x_train"], "y_test": arrays["y_train"]}
        np.savez(folder / "data.npz", **arrays)
        port, started = free_port(), []
        for told, i in ((told_by_slurm, 0), (told_by_open_mpi, 1)):
            environment = {name: str(value) for name, value in told(i, port).items()}
            process = start(folder, *FLAGS, code=PROCESS, **environment | {"JAX_NUM_CPU_DEVICES": "2"})
            started.append(process)
        for i, ended in enumerate([finish(process) for process in started]):
            facts = folder / f"facts{i}.json"
            assert facts.exists(), ended
            DONE.append((ended, json.loads(facts.read_text())))
    return DONE


DONE = []


def assert_same_training(ours, theirs):
    close = lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    ours, theirs = (final_state(make_config(path, **JOB)) for path in (ours, theirs))
    jax.tree.map(close, (ours.variables, ours.average), (theirs.variables, theirs.average))


def test_several_processes_train_as_one_does_to_rounding(folder, done):
    assert [facts["scratch"] for _, facts in done] == [0, 0]
    assert_same_training(folder / "scratch", folder / "alone")
    for line, expected in zip(results(folder / "scratch"), results(folder / "alone"), strict=True):
        exact = ("step", "split", "accuracy")
        assert [line[key] for key in exact] == [expected[key] for key in exact]
        assert_allclose(line["loss"], expected["loss"], rtol=1e-5)
    found, expected = (read_summary(folder / name).recalibrated for name in ("scratch", "alone"))
    assert found["accuracy"] == expected["accuracy"]
    assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


def test_only_the_first_of_several_processes_writes_and_prints(folder, done):
    environment = json.loads((folder / "scratch" / "environment.json").read_text())
    assert (environment["processes"], len(environment["devices"])) == (2, 4)
    lines = [(line["step"], line["split"]) for line in results(folder / "scratch")]
    assert len(lines) == len(set(lines)) == 9
    (first, _), (other, _) = done
    for word in ("data   digits", "model  mlp", "train", "Finished at step 12: test accuracy 0."):
        assert word in first.stdout and word not in other.stdout


def test_processes_evaluate_the_same_weights_to_the_same_last_bit(folder, done):
    expected = serving.evaluate(folder / "alone")
    assert [facts["evaluated"] for _, facts in done] == [expected, expected]


def test_recalibration_finds_the_same_in_each_process_over_all_data(done):
    rows = np.arange(48.0).reshape(16, 3) ** 2
    for _, facts in done:
        for found in facts["recalibrated"]:  # with variables of each process, and over all devices
            assert_allclose(found, [rows.mean(0), rows.var(0)], rtol=1e-5)
    (_, first), (_, other) = done
    assert first["recalibrated"] == other["recalibrated"]


def test_checkpoint_moves_between_one_process_and_several(folder, done, capfd):
    assert [facts["moved"] for _, facts in done] == [12, 12]
    assert_same_training(folder / "moved", folder / "alone")
    assert fit(make_config(folder / "stopped", **JOB)).finished
    assert "going on from step 6" in capfd.readouterr().out
    assert_same_training(folder / "stopped", folder / "alone")


def test_processes_that_were_started_differently_are_refused(folder, done):
    for i, (_, facts) in enumerate(done):
        expected = f"expected the same job in every process, got seed = {i} in process {i} and other values"
        assert facts["other seed"].startswith(expected)
    assert not (folder / "different").exists()


def test_mistake_that_one_process_finds_ends_all(done):
    (_, first), (_, other) = done
    assert first["other data"] == "another process could not read the data; it says why."
    assert "nothing.npz' does not exist" in other["other data"]


def test_signal_to_one_process_stops_all_after_the_same_step(done):
    assert [facts["stopped"] for _, facts in done] == 2 * [[6, signal.SIGTERM]]


def test_exception_in_one_process_ends_it_alone_and_does_not_hang_the_others(done):
    (first, _), (other, _) = done
    assert other.returncode == 1
    assert other.stderr.endswith("ZeroDivisionError: in the third step of process 1\n")
    assert first.returncode == 1
    assert "failed: process 1 has ended or cannot be reached. What it has printed" in first.stderr


def test_process_that_is_killed_is_named_by_the_others_without_a_core_dump(tmp_path):
    """That which JAX's coordination service is a part of; another one is in the test before."""
    address = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2]
    flags = [*FLAGS, "--steps", 10**6, "--run-dir", tmp_path / "run", *address]
    first, other = (start(*flags, "--process-id", i, JAX_NUM_CPU_DEVICES="1") for i in range(2))
    while not results(tmp_path / "run"):
        assert first.poll() is None and other.poll() is None
        time.sleep(0.1)
    first.kill()
    finish(first)
    done = finish(other)
    assert done.returncode == 1
    assert "failed: process 0 has ended" in done.stderr and "Traceback" not in done.stderr


def test_process_that_never_comes_ends_the_other_with_a_message(tmp_path):
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id", 1]
    done = finish(start(*FLAGS, *flags, "--peer-timeout", 1, "--run-dir", tmp_path / "run"))
    assert done.returncode == 1
    assert "failed: not all 2 processes met at 127.0.0.1:" in done.stderr and "within 1 s" in done.stderr
    assert "raise --peer-timeout" in done.stderr and not (tmp_path / "run").exists()
