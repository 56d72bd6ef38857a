"""Processes that watch each other, simulated as threads of this one; tests/commands has real ones."""

import os
import socket
import threading
import time

import jax
import pytest

from train.runs.peers import Watch

pytestmark = pytest.mark.slow  # silence takes time


class Service:
    """What Watch needs of JAX's coordination service."""

    def __init__(self):
        self.values, self.answers = {}, True

    def key_value_set(self, key, value, allow_overwrite):
        self._require_an_answer()
        self.values[key] = value

    def key_value_dir_get(self, folder):
        self._require_an_answer()
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def blocking_key_value_get(self, key, milliseconds):
        deadline = time.monotonic() + milliseconds / 1000
        while not self.answers or key not in self.values:
            if time.monotonic() > deadline:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            time.sleep(0.01)
        return self.values[key]

    def _require_an_answer(self):
        if not self.answers:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")


@pytest.fixture
def port():
    """A port at which process 0 listens, for as long as it is there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def watch(monkeypatch, port):
    """Let a process watch the others; what ends it is noted instead."""
    watches, service = [], Service()

    def start(me, timeout=1, count=2):
        address = "{}:{}".format(*port.getsockname())
        watches.append(Watch(service, address=address, me=me, count=count, timeout=timeout))
        return watches[-1]

    start.service = service
    yield start
    for watch in watches:
        watch.stop()


@pytest.fixture
def said(monkeypatch):
    """Return what a process says when it ends; wait for it."""
    texts, ended = [], threading.Event()
    monkeypatch.setattr(os, "write", lambda file, text: texts.append(text.decode()))
    monkeypatch.setattr(os, "_exit", lambda code: (texts.append(code), ended.set()))

    def wait():
        assert ended.wait(20)
        return texts[:2]

    wait.texts = texts
    return wait


def test_process_that_is_silent_ends_the_others_which_say_its_name(watch, said):
    watch(0)
    other = watch(1)
    time.sleep(1.3)
    assert said.texts == []
    other.stop()
    watch.service.values["train/beat/1"] = "7"  # it has not said that it ends
    sentence, code = said()
    assert (
        sentence.startswith("failed: process 1 is silent since 1 s: it has ended, or hangs. ") and code == 1
    )
    assert watch.service.values["train/beat/0"] == sentence.removeprefix("failed: ").rstrip("\n")


def test_process_is_told_by_the_first_who_is_silent(watch, said):
    watch.service.values["train/beat/0"] = "process 2 is silent."
    watch(1, count=3)
    assert said() == ["failed: process 2 is silent.\n", 1]


def test_process_0_that_is_silent_or_has_ended_is_named(watch, said, port):
    watch.service.values["train/beat/0"] = "0"
    watch(1, timeout=20)
    accepted, _ = port.accept()
    accepted.close()  # as of a service that gives up a connection
    accepted, _ = port.accept()
    assert said.texts == []
    port.close()
    accepted.close()
    assert said()[0].startswith(
        "failed: process 0 has ended, without which the others cannot go on. What it has"
    )
    said.texts.clear()


def test_process_0_that_does_not_answer_is_named(watch, said):
    watch.service.values["train/beat/0"] = "0"
    watch(1)
    time.sleep(0.2)
    watch.service.answers = False
    assert said()[0].startswith("failed: process 0 is silent since 1 s: it has ended, or hangs.")


def test_process_that_ends_as_it_should_is_not_missed_and_those_that_beat_are_not_gone(watch, said):
    first, second, third = (watch(i, timeout=3, count=4) for i in range(3))
    assert third.gone() == [3]
    watch.service.values["train/beat/3"] = "ended"
    second.stop()
    time.sleep(1)
    assert first.gone() == [] and said.texts == []


def test_process_that_says_itself_why_it_ends_is_not_ended(watch, said):
    watch.service.values["train/beat/0"] = "0"
    watch(1).claim()
    watch.service.answers = False
    time.sleep(1.5)
    assert said.texts == []
