import pytest

from train.runs import files
from train.errors import UserError


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}


def test_file_of_the_same_name_with_another_ending_is_left_alone(tmp_path):
    (tmp_path / "model.tmp").write_text("mine")
    files.replace(tmp_path / "model.stablehlo", b"new")
    assert (tmp_path / "model.tmp").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.stablehlo", "model.tmp"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[" * 10**5])
def test_file_that_is_no_json_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a.json' cannot be read: "):
        files.read_json(tmp_path / "a.json")
