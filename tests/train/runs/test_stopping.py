import os
import signal

import pytest

from train.errors import Stopped
from train.runs import stopping
from train.runs.stopping import StopRequests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted_and_handlers_are_put_back(number, capfd):
    before = signal.getsignal(number)
    with StopRequests() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == "\nstopping: saves first; a second signal ends it at once\n"


def test_second_signal_has_its_usual_effect_at_once(monkeypatch):
    killed = []

    def kill(pid, number):
        killed.append((pid, number, signal.getsignal(number)))

    with StopRequests():
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(stopping.os, "kill", kill)
        signal.raise_signal(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]


def test_signal_ends_at_once_what_has_nothing_to_save(capfd):
    for number in (signal.SIGTERM, signal.SIGINT):
        with StopRequests() as stop:
            with pytest.raises(Stopped) as raised, stop.at_once():
                signal.raise_signal(number)
            assert (raised.value.number, stop.received) == (number, number)
            with pytest.raises(Stopped), stop.at_once():  # as one that came before
                raise AssertionError("is not begun")
        with StopRequests() as stop, stop.at_once():
            pass
        with StopRequests() as stop:
            with stop.at_once():
                pass
            signal.raise_signal(number)
            assert stop.received == number
    assert capfd.readouterr().err.count("saves first") == 2


def test_signal_that_a_library_has_taken_is_noted_again_after_install_handlers():
    with StopRequests() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is None
        stop.install_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_signal_is_noted_where_nobody_reads_what_is_said_of_it(monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(stopping.os, "write", broken)
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
