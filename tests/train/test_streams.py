"""What the program prints to; tests/commands has a job whose reader goes away."""

import os
import sys

from train import streams


def test_what_nobody_reads_any_more_is_dropped():
    reading, writing = os.pipe()
    with streams._Outlet(writing, "w") as outlet:
        assert outlet.write(b"read") == 4 and os.read(reading, 100) == b"read"
        os.close(reading)
        assert outlet.write(b"dropped") == 7


def test_python_is_started_again_only_where_names_of_files_would_have_to_be_ascii(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train", "list"])
    streams.use_utf8()
    assert started == []
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    streams.use_utf8()
    assert started == [(sys.executable, [sys.executable, "-X", "utf8", "-m", "train", "list"])]
