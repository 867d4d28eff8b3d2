"""The corpus: what is read, what is left out, and a split that depends on names alone."""

import pytest

from nl_models.data.corpus import CorpusError, Document, read_folder, read_standard_library, split_by_file


def test_a_folder_is_read_in_order_without_binaries_hidden_files_and_duplicates(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "b" / "two.txt").write_text("zwei é")
    (tmp_path / "a.md").write_text("eins")
    (tmp_path / "z_copy.md").write_text("eins")
    (tmp_path / "__pycache__" / "x.txt").write_text("cached")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "nul.bin").write_bytes(b"a\0b")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    assert read_folder(tmp_path) == [Document("a.md", "eins"), Document("b/two.txt", "zwei é")]


def test_missing_wrong_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="does not exist"):
        read_folder(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CorpusError, match="expected a folder"):
        read_folder(file)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CorpusError, match="no UTF-8 text file"):
        read_folder(empty)


def test_the_standard_library_has_sources_and_topics_but_no_tests():
    names = [document.name for document in read_standard_library()]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert "topics/lambda.rst" in names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "__pycache__", "encodings"}


def test_a_file_keeps_its_side_when_others_come_and_go():
    documents = [Document(f"file{i}", f"text {i}") for i in range(400)]
    split = split_by_file(documents, validation_fraction=0.2)
    sides = {d.name for d in split.validation}
    assert 0.1 < len(sides) / 400 < 0.3
    assert not sides & {d.name for d in split.train}
    fewer = split_by_file(reversed(documents[::3]), validation_fraction=0.2)
    assert {d.name for d in fewer.validation} == sides & {d.name for d in documents[::3]}
    # A known value: the split is the same in every process and on every machine.
    assert sorted(sides)[:4] == ["file100", "file105", "file106", "file118"]


def test_two_files_always_give_both_sides():
    documents = [Document("a", "x"), Document("b", "y")]
    for fraction in (0.001, 0.999):
        split = split_by_file(documents, validation_fraction=fraction)
        assert len(split.train) == len(split.validation) == 1


def test_too_few_files_and_bad_fractions_are_refused():
    with pytest.raises(CorpusError, match="at least two different text files, got 1"):
        split_by_file([Document("a", "x")], validation_fraction=0.1)
    with pytest.raises(ValueError, match="validation_fraction"):
        split_by_file([Document("a", "x"), Document("b", "y")], validation_fraction=0.0)
