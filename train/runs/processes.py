"""Many devices and many processes: connecting them, placing arrays, and agreeing.

JAX's own runtime connects the processes. It finds Slurm, Open MPI, Kubernetes (with the `kubernetes` package)
and TPU pods by itself; elsewhere the flags `--coordinator`, `--num-processes` and `--process-id` say so.
"""

import atexit
import contextlib
import dataclasses
import os
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.config import Config, flatten
from train.errors import RunFailed, UserError
from train.runs.peers import ADVICE, Watch
from train.runs.stopping import StopRequests

AXIS = "data"  # the one axis of the mesh, over which batches are split
# What may differ between the processes of a job: where each finds the others, and the data.
OF_A_PROCESS = ("data.path", "data.cache", "coordinator", "num_processes", "process_id", "peer_timeout")


def initialize(config: Config) -> None:
    """Connect this process with the others of the job, if there are any. No device may be touched before.

    A process that does not come within `peer_timeout` seconds, or is silent for as long, ends the program,
    with exit code 1.
    """
    if config.num_processes == 1:
        return
    watch = threading.Timer(config.peer_timeout, _give_up, [config])
    watch.daemon = True
    watch.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns where it finds no cluster, as on a single machine
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                # Longer than ours, which say what to do; its own end the process with a core dump.
                initialization_timeout=config.peer_timeout + 60,
                heartbeat_timeout_seconds=config.peer_timeout + 60,
            )
        _watch_others(config)
    except ValueError:
        if config.coordinator is not None:
            raise
        # Told nothing and no cluster found: one process.
    except RuntimeError as error:
        raise UserError(f"{error}\nGive --num-processes 1 to train in this process alone.") from error
    finally:
        watch.cancel()


_watch: Watch | None = None  # over the other processes, if there are any


def _watch_others(config: Config) -> None:
    global _watch
    state: Any = distributed.global_state
    if state.client is not None and state.num_processes > 1:
        _watch = Watch(
            state.client,
            address=state.coordinator_address,
            me=state.process_id,
            count=state.num_processes,
            timeout=config.peer_timeout,
        )
        atexit.register(_watch.stop)  # before JAX disconnects, which it has registered earlier


def explain_lost(error: Exception) -> str | None:
    """Say which process is gone if that is why JAX could not go on, else None."""
    # What JAX raises when it has lost a process depends on where it was.
    kinds = (RuntimeError, ValueError)
    if _watch is None or not (isinstance(error, kinds) or isinstance(error.__cause__, kinds)):
        return None
    gone = " and ".join(f"process {i}" for i in _watch.gone())
    return f"{gone} has ended or cannot be reached. {ADVICE}" if gone else None


def _give_up(config: Config) -> None:
    where = f" at {config.coordinator}" if config.coordinator else ""
    count = f"{config.num_processes} " if config.num_processes else ""
    # The main thread waits inside JAX, where no exception reaches it.
    os.write(
        2,
        f"failed: not all {count}processes met{where} within {config.peer_timeout} s. "
        "Start all of them at the same time with the same --coordinator, or raise --peer-timeout.\n".encode(),
    )
    os._exit(1)


def is_primary() -> bool:
    """Return whether this is the one process that writes files and prints."""
    return jax.process_index() == 0


def make_mesh(config: Config) -> Mesh:
    """Return the mesh of the devices of all processes, or of the first `devices` ones of this.

    Raises:
      UserError: there are fewer devices, or a batch cannot be split evenly over them.
    """
    devices = jax.devices()
    if config.devices is not None and config.devices > len(devices):
        raise UserError(
            f"devices: expected at most {len(devices)}, the number of devices here, got {config.devices}."
        )
    devices = devices[: config.devices]
    part = config.batch_size // config.optimizer.accumulate
    if part % len(devices):
        accumulate = f" times optimizer.accumulate = {config.optimizer.accumulate}" * (
            config.optimizer.accumulate > 1
        )
        larger = (part // len(devices) + 1) * len(devices) * config.optimizer.accumulate
        raise UserError(
            f"batch_size: expected a multiple of {len(devices)} devices{accumulate}, such as {larger}, got "
            f"{config.batch_size}; or give other --devices."
        )
    return mesh_of(devices)


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """Return a mesh of devices in a row."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put host arrays, the same in every process, whole onto every device."""
    return jax.tree.map(lambda leaf: _place(NamedSharding(mesh, P()), leaf), tree)


def replicated_like(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Describe an array that is whole on every device."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P()))


def shard(mesh: Mesh, tree: Any) -> Any:
    """Put host arrays, the same in every process, onto the devices, each with its rows."""
    return jax.tree.map(lambda leaf: _place(NamedSharding(mesh, P(AXIS)), leaf), tree)


def _place(sharding: NamedSharding, leaf: Any) -> jax.Array:
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def max_over_processes(*values: int) -> list[int]:
    """Return the largest of each value over all processes. All of them have to call."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.array(values, np.int32)).max(0).tolist()


@contextlib.contextmanager
def raise_on_all(what: str) -> Iterator[None]:
    """End every process if one of them cannot do what is in the block. All of them have to enter it."""
    error = None
    try:
        yield
    except (UserError, RunFailed, OSError) as raised:
        error = raised
    (failed,) = max_over_processes(int(error is not None))
    if error is not None:
        raise error
    if failed:
        raise UserError(f"another process could not {what}; it says why.")


def check_same_job(config: Config) -> None:
    """Raise a UserError in every process if they were started with different jobs. All have to call."""
    values = flatten(dataclasses.asdict(config))
    check_equal({key: value for key, value in values.items() if key not in OF_A_PROCESS})


def check_equal(values: dict[str, Any]) -> None:
    """Raise a UserError in every process if one of the values differs. All have to call, with equal keys."""
    digests = [zlib.crc32(repr(value).encode()) >> 1 for value in values.values()]  # int32
    highest, negated = np.split(np.array(max_over_processes(*digests, *(-digest for digest in digests))), 2)
    differing = [key for key, high, low in zip(values, highest, -negated) if high != low]
    if differing:
        here = ", ".join(f"{key} = {values[key]!r}" for key in differing)
        raise UserError(
            f"expected the same job in every process, got {here} in process {jax.process_index()} and other "
            "values elsewhere. Start all processes with the same config and flags."
        )


def say_alone(message: str) -> None:
    """Print why this process ends; from here on no other one is waited for, or ends it."""
    if _watch is not None:
        _watch.claim()
    print(message, file=sys.stderr, flush=True)


def exit_alone(code: int) -> None:
    """End this process, if it is one of several, without waiting for the others, which may wait for it."""
    if jax.distributed.is_initialized():
        if _watch is not None and is_primary():
            time.sleep(1)  # The others may be about to say the same, and end when this one does.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Agreement(NamedTuple):
    """What the processes of a job do next."""

    steps: int  # to take at once: the smallest number of all processes
    signal: int  # after which to stop: one that any process has received; 0 if none has


def agree(steps: int, stop: StopRequests) -> Agreement:
    """Agree with all processes on the next steps. All of them have to call; a signal counts from here on."""
    negated, signal = max_over_processes(-min(steps, 2**20), stop.received or 0)
    if signal and stop.received is None:
        stop.received = signal
    return Agreement(-negated, signal)
