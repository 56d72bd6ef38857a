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
    except Exception as error:
        if isinstance(error, (UserError, RunFailed)) or (explanation := explain(error)) is None:
            raise
        raise RunFailed(explanation) from error


def explain(error: Exception) -> str | None:
    """Says what happened and what helps, where it is nothing that the program did wrong; else None."""
    text = str(error)
    first_line = text.partition("\n")[0][:300]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return (
            f"out of memory: {first_line}. Try a smaller batch_size, a larger optimizer.accumulate, "
            "model.dtype = 'bfloat16', or a smaller data.device_gib."
        )
    if any(name in text for name in ("Gloo", "NCCL", "coordination service", "heartbeat")):
        return (
            f"another process of the job has ended, or cannot be reached: {first_line}. Its own output says "
            "why; start all of them again."
        )
    if isinstance(error, OSError):
        return f"{error}. What was saved before is kept; mend that, and start again."
    return None
