"""Scalars in TensorBoard's format, without TensorFlow."""

import platform
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar


class TensorBoard:
    """Writes scalars to a new event file in a folder.

    tensorboardX's own SummaryWriter writes in a thread, whose errors, as of a full disk, reach nobody.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        """Opens the file; what earlier files have from `purge_step` on counts no longer."""
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}"  # as TensorBoard looks for
        self._writer = RecordWriter(str(folder / name))
        self._write(0, file_version="brain.Event:2")
        self._write(purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Writes one value."""
        self._write(step, summary=scalar(name, value))

    def flush(self) -> None:
        """Leaves all of it on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
