import os
import signal
import subprocess
import sys

import pytest

from train.runs.stopping import StopRequests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopRequests() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) == before


def test_second_signal_acts_at_once():
    code = """
import os, signal
from train.runs.stopping import StopRequests
with StopRequests():
    os.kill(os.getpid(), signal.SIGINT)
    print("first", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("second", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("first\n", -signal.SIGTERM)


def test_signal_that_another_has_begun_to_handle_is_noted_again_once_asked_for():
    with StopRequests() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is None
        stop.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
