"""Files and folders appear whole or not at all."""

import pytest

from nl_models.files import new_directory, remove_incomplete, write_bytes, write_json


def test_a_folder_appears_with_all_its_files(tmp_path):
    with new_directory(tmp_path / "new" / "folder") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("content")
        assert not (tmp_path / "new" / "folder").exists()
    assert (tmp_path / "new" / "folder" / "sub" / "file").read_text() == "content"
    with pytest.raises(FileExistsError), new_directory(tmp_path / "new" / "folder"):
        raise AssertionError("entered the block")


def test_a_failed_folder_leaves_nothing(tmp_path):
    def write_half():
        with new_directory(tmp_path / "folder") as temporary:
            (temporary / "file").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "file", {"a": [1]})
    assert (tmp_path / "file").read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    monkeypatch.setattr("nl_models.files.os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text().startswith("{")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_left_overs_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".incomplete-x-1").mkdir()
    (tmp_path / ".incomplete-y-2").write_text("half")
    (tmp_path / "kept").write_text("whole")
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
