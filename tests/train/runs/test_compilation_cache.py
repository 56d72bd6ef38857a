import os
from pathlib import Path

import pytest
from command import run

from train.runs import compilation_cache
from train.runs.compilation_cache import use_compilation_cache


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The environment of a user who has set nothing but where caches go."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XDG_"))}
    monkeypatch.setattr(os, "environ", variables | {"XDG_CACHE_HOME": str(tmp_path / "caches")})
    return os.environ


def test_second_start_loads_what_the_first_one_compiled(environment, tmp_path):
    def train(name):
        done = run("configs/digits_mlp.toml", "--steps", 3, "--run-dir", tmp_path / name)
        assert (done.returncode, done.stderr) == (0, "")
        (folder,) = (tmp_path / "caches" / "jbn").iterdir()
        files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        written = {name: time for name, time in files.items() if name.endswith("-cache")}
        used = {name: time for name, time in files.items() if name.endswith("-atime")}
        return folder, written, used

    folder, written, used = train("first")
    (entry,) = [name for name in written if "many_steps" in name]
    assert len(used) == len(written)

    # A kill while the entry was written would have left it like this.
    (folder / entry).write_bytes((folder / entry).read_bytes()[:1000])
    (folder / entry.replace("-cache", "-atime")).unlink()
    _, written_again, used_again = train("second")
    assert written_again.keys() == written.keys() and used_again.keys() == used.keys()
    assert [name for name in written if written_again[name] != written[name]] == [entry]
    assert all(used_again[name] > used[name] for name in used)
    assert (folder / entry).stat().st_size > 1000


def test_cache_lies_in_the_home_where_nothing_else_is_said(environment, tmp_path, monkeypatch):
    del environment["XDG_CACHE_HOME"]
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    use_compilation_cache()
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / ".cache" / "jbn"))
    assert environment["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(2**30)


def test_what_the_user_has_set_stays(environment, tmp_path):
    environment["JAX_COMPILATION_CACHE_MAX_SIZE"] = "5"
    use_compilation_cache()
    assert environment["JAX_COMPILATION_CACHE_MAX_SIZE"] == "5"
    environment["JAX_COMPILATION_CACHE_DIR"] = "elsewhere"
    before = dict(environment)
    use_compilation_cache()
    assert environment == before and not Path("elsewhere").exists()


def test_without_a_home_that_can_be_written_to_there_is_no_cache(environment, tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    def no_lock(*_, **__):
        raise PermissionError("no write access")

    def without(**changes):
        environment.pop("XDG_CACHE_HOME", None)
        environment.update(changes)
        before = dict(environment)
        use_compilation_cache()
        assert environment == before

    (tmp_path / "file").touch()
    without(XDG_CACHE_HOME=str(tmp_path / "file"))
    monkeypatch.setattr(Path, "home", no_home)
    without()
    monkeypatch.setattr(compilation_cache, "FileLock", no_lock)
    without(XDG_CACHE_HOME=str(tmp_path / "caches"))


def test_only_torn_entries_are_removed(environment):
    use_compilation_cache()
    folder = Path(environment.pop("JAX_COMPILATION_CACHE_DIR"))
    for name in ("whole-cache", "whole-atime", "torn-cache", "other"):
        (folder / name).write_text(name)
    use_compilation_cache()
    assert {path.name for path in folder.iterdir()} >= {"whole-cache", "whole-atime", "other"}
    assert not (folder / "torn-cache").exists()
