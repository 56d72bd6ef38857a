import shutil
from pathlib import Path

import pytest

from tests.helpers import jobs


@pytest.fixture(scope="session")
def _finished():
    return []


@pytest.fixture
def finished(_finished, tmp_path_factory, capsys):
    """Return the config, summary and output of a job that was trained to its end; only to be read."""
    if not _finished:
        config = jobs.make_config(tmp_path_factory.mktemp("finished") / "run")
        _finished.extend((config, jobs.fit(config), capsys.readouterr().out))
    return _finished


@pytest.fixture
def copied(finished, make_config):
    """Return the config and summary of a copy of that run, which a test may change."""
    shutil.copytree(finished[0].run_dir, Path(make_config().run_dir))
    return make_config(), finished[1]
