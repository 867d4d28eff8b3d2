"""Files and folders appear whole or not at all."""

import ast
import contextlib
import errno
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nl_models.files import new_directory, only_writer, remove_incomplete, write_bytes, write_json
from nl_models.hope import HopeConfig, HopeForCausalLM
from tests.nl_models.full_disk import small_files

ROOT = Path(__file__).parents[2]


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


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("there", "missing"):
        target, link = tmp_path / "elsewhere" / name, tmp_path / name
        link.symlink_to(target)
        if name == "there":
            target.write_text("old")
        write_bytes(link, b"new")
        assert link.is_symlink()
        assert target.read_bytes() == b"new"


def test_only_ordinary_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    for name, message in (("pipe", "is no ordinary"), ("link", "is no ordinary"), ("folder", "is a folder")):
        with pytest.raises(FileExistsError, match=f"path: .*{message}"):
            write_bytes(tmp_path / name, b"new")
    assert {path: path.lstat() for path in tmp_path.iterdir()} == before


def test_left_overs_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".incomplete-x-1").mkdir()
    (tmp_path / ".incomplete-y-2").write_text("half")
    (tmp_path / "kept").write_text("whole")
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_another_process_is_writing_stays(tmp_path):
    """The last one's file is there, and neither takes the other's half for a left-over."""
    path, (begun, go_on) = tmp_path / "memory", os.pipe()
    (tmp_path / ".incomplete-memory-of-a-killed-one").write_text("half")
    child = os.fork()
    if child == 0:
        os.close(begun)
        flush, failed = os.fsync, 1

        def slowly(descriptor):
            flush(descriptor)
            os.write(go_on, b"x")
            time.sleep(0.5)

        os.fsync = slowly
        try:
            write_bytes(path, b"theirs")
            failed = 0
        finally:
            os._exit(failed)
    os.close(go_on)
    assert os.read(begun, 1) == b"x"  # its half is on the disk
    write_bytes(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["memory"]


def test_one_process_at_a_time_keeps_a_file_up_to_date(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "memory")
    with only_writer(tmp_path / "memory"):
        for name in ("memory", "link"):
            with (
                pytest.raises(ValueError, match="kept up to date by another process"),
                only_writer(tmp_path / name),
            ):
                pass
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "link"):
        pass
    with (
        pytest.raises(FileNotFoundError, match="has no folder to lie in"),
        only_writer(tmp_path / "no/memory"),
    ):
        pass


def test_a_file_has_the_rights_of_any_new_file_and_is_on_the_disk_first(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(descriptor), real(descriptor)))
    model = HopeForCausalLM(
        HopeConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    cache = model(torch.arange(5)[None], use_cache=True).past_key_values
    before = os.umask(0o027)
    try:
        (tmp_path / "plain").touch()
        write_json(tmp_path / "json", {})
        cache.save(tmp_path / "conversation")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert set(modes) == {"plain", "json", "conversation"}
    assert len(set(modes.values())) == 1
    assert len(flushed) == 4  # each of the two files, and its folder's names


def test_what_is_in_the_way_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-folder/file' has no folder to lie in"):
        write_bytes(tmp_path / "no-folder" / "file", b"")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileNotFoundError, match="file/below' has no folder to lie in"):
        write_bytes(tmp_path / "file" / "below", b"")
    with pytest.raises(NotADirectoryError), new_directory(tmp_path / "file" / "below"):
        raise AssertionError("entered the block")


def test_a_full_disk_is_the_same_error_whoever_writes(tmp_path):
    """safetensors has an exception of its own, which is no OSError. Here a limit stands for the disk."""

    def write():
        with new_directory(tmp_path / "folder") as temporary:
            save_file({"a": torch.zeros(1 << 16)}, temporary / "file")

    with small_files(1 << 16), pytest.raises(OSError, match="File too large") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "folder")
    with small_files(1 << 16), pytest.raises(OSError, match="File too large") as caught:
        write_bytes(tmp_path / "file", bytes(1 << 17))
    assert caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", ["mkstemp", "mkdtemp"])
def test_what_is_refused_is_told_by_its_own_name(writer, tmp_path, monkeypatch):
    """As in a folder in which nothing may be written: not by the hidden name it has until it is whole."""

    def refused(prefix, dir):
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/{prefix}x")

    monkeypatch.setattr(f"nl_models.files.tempfile.{writer}", refused)
    write = {"mkstemp": lambda path: write_bytes(path, b"new"), "mkdtemp": lambda path: new_directory(path)}
    with pytest.raises(PermissionError) as caught, contextlib.ExitStack() as stack:
        stack.enter_context(write[writer](tmp_path / "name"))
    assert caught.value.filename == str(tmp_path / "name")


# What writes within `new_directory`, which flushes it and gives it its rights; the kernel's own files.
OTHERS = {
    ("data/prepare.py", "write_text"),
    ("profiling/memory.py", "write_text"),
    ("measure.py", "write_text"),
    # Programs that run where the models cannot be imported.
    ("gpu_check.py", "write_text"),
    ("test_regression.py", "write_text"),
}


def test_nothing_writes_in_a_way_of_its_own():
    """In the package, and what benchmarks and examples draw."""
    writers = {"write_text", "save_file", "mkstemp", "savefig"}
    found = set()
    for folder in ("src/nl_models", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else None
                if called in writers:
                    found.add((path.relative_to(ROOT / folder).as_posix(), called))
    assert found == OTHERS | {("files.py", "mkstemp"), ("plots.py", "savefig")}
