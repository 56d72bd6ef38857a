"""What may go wrong, told apart by whose turn it is."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

# What mends what the system refuses: a full disk, quota or file; a place that may not be read or written to.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow access to it"),
}


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
    text = str(error).strip()
    first_line = text.partition("\n")[0][:300].rstrip(". ")
    # First, for TensorStore says of a full disk too that a resource is exhausted.
    number = next((number for number in REMEDIES if os.strerror(number) in text), None)
    if number is not None or isinstance(error, OSError):
        remedy = REMEDIES.get(number, "mend that")
        said = first_line if number is None else os.strerror(number)
        if isinstance(error, OSError) and error.strerror:
            said = error.strerror + (f": '{error.filename}'" if error.filename else "")
        return f"{said}. What was saved before is kept; {remedy}, and start again to go on from there."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        size = re.search(r"allocating (\d+) bytes", text)
        said = f"{int(size[1]) / 2**30:,.2f} GiB more were wanted" if size else first_line or "none is left"
        return (
            f"out of memory: {said}. Try a smaller batch_size, a larger optimizer.accumulate, "
            "model.dtype = 'bfloat16', a smaller data.device_gib, or a smaller network. What was saved "
            "before is kept."
        )
    if any(name in text for name in ("Gloo", "NCCL", "coordination service", "heartbeat")):
        return (
            f"another process of the job has ended, or cannot be reached: {first_line}. Its own output says "
            "why; start all of them again."
        )
    return None
