"""The two exceptions that end the program with a sentence, and what the system could not do in words."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """Bad input: an unknown key, a missing file. The program prints it and exits with 2."""


class RunFailed(Exception):
    """The job itself failed: its loss is not finite, the disk is full. The program exits with 1."""


class Stopped(KeyboardInterrupt):
    """A signal came while there was nothing to save. The program exits with 128 + its number."""

    def __init__(self, number: int):
        """Take the signal's number."""
        super().__init__(number)
        self.number = number


def shortened(items: Sequence[str], *, most: int = 10, separator: str = ", ") -> str:
    """Join items for a sentence: of many the first ones, and how many more there are."""
    more = [f"and {len(items) - most:,} more"] * (len(items) > most)
    return separator.join([*items[:most], *more])


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn errors of disk and memory into a RunFailed that says what helps."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, RunFailed)) or (explanation := explain(error)) is None:
            raise
        raise RunFailed(explanation) from error


def explain(error: Exception) -> str | None:
    """Return what happened and what helps if disk or memory is the cause, else None."""
    text = str(error).strip()
    # First, for TensorStore says of a full disk too that a resource is exhausted.
    number = next((n for n in (*DISK_FULL, *NO_ACCESS) if os.strerror(n) in text), None)
    if number is not None or isinstance(error, OSError):
        reason = os.strerror(number) if number else text.partition("\n")[0][:300].rstrip(". ")
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror + (f": '{error.filename}'" if error.filename else "")
        remedy = "make room" if number in DISK_FULL else "allow access to it" if number else "mend that"
        return f"{reason}. What was saved before is kept; {remedy}, and start again to go on from there."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        size = re.search(r"allocating (\d+) bytes", text)
        needed = f" ({int(size[1]) / 2**30:,.2f} GiB more)" if size else ""
        return (
            f"out of memory{needed}. Try a smaller batch_size, a larger optimizer.accumulate, model.dtype = "
            "'bfloat16', a smaller data.device_gib, or a smaller network. What was saved before is kept."
        )
    return None
