"""Where the program prints to, and how: nothing of that may end a job."""

import io
import os
import sys
from typing import Any


def use_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale has only ASCII: names of files may have more."""
    if sys.getfilesystemencoding() == "ascii":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def outlast_readers() -> None:
    """Drop what is printed once nobody reads it any more, as after `| head`, or where a stream is closed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, or a file of the job would
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(_Outlet(number, "w", closefd=False)),
                encoding=getattr(stream, "encoding", "utf-8"),
                errors="backslashreplace",
                line_buffering=stream is None or stream.line_buffering or stream.write_through,
            ),
        )


class _Outlet(io.FileIO):
    """A file to write to, also when its reader has gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes
