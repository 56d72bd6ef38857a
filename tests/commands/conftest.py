"""Commands in this process, where one of their own would prove nothing more."""

import shutil

import jax
import pytest

from tests.helpers.command import JOB, ROOT, Forks
from train.__main__ import main
from train.runs import curves, processes


@pytest.fixture(autouse=True)
def _no_charts(standard_promotion, monkeypatch):
    monkeypatch.setattr(curves, "draw", lambda run_dir: None)


@pytest.fixture(scope="session")
def forks():
    """Return what runs the command in processes of their own, which are forked from one."""
    with Forks() as forks:
        yield forks


@pytest.fixture
def command(capfd, monkeypatch):
    """Run the command in this process: return its exit code, what it printed, and what it complained of."""
    monkeypatch.chdir(ROOT)
    # JAX looks for a cluster before it computes, and not after; and most machines have one device.
    monkeypatch.setattr(processes, "initialize", lambda config: None)
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: devices[:1])

    def run(*arguments):
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # how tyro ends
            code = exit.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="session")
def _finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished(_finished, command):
    """Train JOB without interruption, once for all tests; return its run directory."""
    if not _finished.exists():
        code, _, complaint = command(*JOB, "--run-dir", _finished)
        assert (code, complaint) == (0, "")
    return _finished


@pytest.fixture
def run_dir(tmp_path, finished):
    """A copy of that run, which may be broken."""
    return shutil.copytree(finished, tmp_path / "run")
