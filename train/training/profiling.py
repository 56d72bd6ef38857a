"""A trace of some steps, to be opened in TensorBoard, XProf or Perfetto."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the first steps after those that compile the program, as many as the job asks for.

    Its `with` block is the job. The trace ends with the block, however that ends.
    """

    def __init__(self, run_dir: Path, steps: int, *, writes: bool):
        self._directory, self._left, self._writes = run_dir / "profile", steps, writes
        self._active = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def before(self, steps: int) -> int:
        """Returns how many of the next `steps` to take, and starts the trace if it has to begin now."""
        if self._left and not self._active:
            self._active = True
            if self._writes:
                jax.profiler.start_trace(str(self._directory))
        return min(steps, self._left) if self._active else steps

    def after(self, steps: int) -> None:
        """Notes that steps were taken, and ends the trace with the last one."""
        if self._active:
            self._left -= steps
            if self._left == 0:
                self._stop()

    def _stop(self) -> None:
        if self._active and self._writes:
            jax.profiler.stop_trace()
        self._active = False
