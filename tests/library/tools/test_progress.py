"""What takes long shows on a terminal how far it is, and nothing anywhere else."""

import io
import sys

from jbn._tools import progress as _progress


class Stderr(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def test_progress_is_shown_on_a_terminal_when_it_takes_long(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for terminal, seconds, items, expected in (
        (True, 0, [1, 2, 3, 4], "4/4"),
        (True, 0, iter([1, 2, 3, 4]), "4/4"),
        (True, 0, (i for i in [1, 2, 3, 4]), "4/?"),
        (True, 60, [1, 2, 3, 4], ""),
        (False, 0, [1, 2, 3, 4], ""),
    ):
        stderr = Stderr(terminal)
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(_progress, "SECONDS", seconds)
        assert list(_progress.with_progress(items, "batches")) == [1, 2, 3, 4]
        assert expected in stderr.getvalue() if expected else stderr.getvalue() == ""
