"""Many devices and many processes: joining them, laying arrays over them, and agreeing with the others.

JAX's own runtime connects the processes. It finds Slurm, Open MPI, Kubernetes (with the `kubernetes` package)
and TPU pods by itself; elsewhere the flags `--coordinator`, `--num-processes` and `--process-id` tell.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.config import Config
from train.errors import RunFailed, UserError

AXIS = "data"  # the one axis of the mesh, over which batches are split


def join(config: Config) -> None:
    """Connects this process with the others of the job, if there are any. No device may be touched before.

    A process that does not come within `peer_timeout` seconds ends the program, with exit code 1.
    """
    if config.num_processes == 1:
        return
    watch = threading.Timer(config.peer_timeout, _give_up, [config])
    watch.daemon = True
    watch.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a cluster lacks for being asked is no news on one machine
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                # Longer than ours, which says what to do; its own ends the process with a core dump.
                initialization_timeout=config.peer_timeout + 60,
                heartbeat_timeout_seconds=config.peer_timeout,
            )
    except ValueError:
        if config.coordinator is not None:
            raise
        # Told nothing and no cluster found: one process.
    except RuntimeError as error:
        raise UserError(f"{error}\nGive --num-processes 1 to train in this process alone.") from error
    finally:
        watch.cancel()


def _give_up(config: Config) -> None:
    where = f" at {config.coordinator}" if config.coordinator else ""
    # The main thread waits inside JAX, where no exception reaches it.
    os.write(
        2,
        f"failed: not all {config.num_processes or ''} processes met{where} within {config.peer_timeout} s. "
        "Start all of them at the same time with the same --coordinator, or raise --peer-timeout.\n".encode(),
    )
    os._exit(1)


def is_first() -> bool:
    """Tells whether this is the one process that writes files and prints."""
    return jax.process_index() == 0


def make_mesh(config: Config) -> Mesh:
    """Returns the devices of all processes, or the first `devices` ones of this, in a row.

    Raises:
      UserError: there are fewer devices, or a batch cannot be split evenly over them.
    """
    devices = jax.devices()
    if config.devices is not None and config.devices > len(devices):
        raise UserError(
            f"devices = {config.devices}; wanted at most {len(devices)}, which is how many are here."
        )
    devices = devices[: config.devices]
    part = config.batch_size // config.optimizer.accumulate
    if part % len(devices):
        accumulate = f" in {config.optimizer.accumulate} parts" * (config.optimizer.accumulate > 1)
        larger = (part // len(devices) + 1) * len(devices) * config.optimizer.accumulate
        raise UserError(
            f"batch_size = {config.batch_size}{accumulate} cannot be split evenly over {len(devices)} "
            f"devices; wanted {larger}, say, or other --devices."
        )
    return mesh_of(devices)


def mesh_of(devices: list[jax.Device]) -> Mesh:
    """Returns devices in a row."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts host arrays, the same in every process, whole onto every device."""
    return jax.tree.map(lambda leaf: _place(NamedSharding(mesh, P()), leaf), tree)


def replicated_like(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Describes an array that lies whole on every device."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P()))


def shard(mesh: Mesh, tree: Any) -> Any:
    """Puts host arrays, the same in every process, onto the devices, each with its rows."""
    return jax.tree.map(lambda leaf: _place(NamedSharding(mesh, P(AXIS)), leaf), tree)


def _place(sharding: NamedSharding, leaf: Any) -> jax.Array:
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def largest(*values: int) -> list[int]:
    """Returns the largest of each value over all processes. All of them have to call."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.array(values, np.int32)).max(0).tolist()


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """Ends every process if one of them cannot do what is in the block. All of them have to come here."""
    error = None
    try:
        yield
    except (UserError, RunFailed, OSError) as raised:
        error = raised
    (failed,) = largest(int(error is not None))
    if error is not None:
        raise error
    if failed:
        raise UserError(f"another process could not {what}; it says why.")


def leave(code: int) -> None:
    """Ends this process of several without waiting for the others, who may wait for it."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
