"""What may go wrong, told apart by whose turn it is."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something that the user can mend: a bad key, a missing file. The program prints it and exits with 2."""


class RunFailed(Exception):
    """The job itself went wrong: its loss is no number any more, a disk is full. The program exits with 1."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns what the system, or JAX, could not do into a RunFailed that says what helps."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{error}. What was saved before is kept; mend that, and start again.") from error
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
            raise RunFailed(
                f"out of memory: {text.partition(chr(10))[0][:200]}. Try a smaller batch_size, a larger "
                "optimizer.accumulate, model.dtype = 'bfloat16', or a smaller data.device_gib."
            ) from error
        if any(name in text for name in ("Gloo", "NCCL", "coordination service", "heartbeat")):
            raise RunFailed(
                "another process of the job has ended, or cannot be reached: "
                f"{text.partition(chr(10))[0][:200]}. Its own output says why; start all of them again."
            ) from error
        raise
