"""Preparing data: made once, whole or not at all, never mixed up with other options."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nl_models.data import prepare
from nl_models.data.corpus import CorpusError, Document
from nl_models.data.prepare import DataOptions, prepare_data
from nl_models.data.tokenizer import ByteTokenizer


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"file {i}: " + "the quick brown fox " * i)
    return folder


def test_documents_are_packed_with_separators(corpus, tmp_path):
    options = DataOptions(corpus=str(corpus), tokenizer="bytes", validation_fraction=0.3)
    data = prepare_data(options, tmp_path / "data")
    for side in ("train", "validation"):
        documents = bytes(min(t, 255) for t in getattr(data, side)).split(b"\xff")
        names = data.description[side]["names"]
        assert documents == [(corpus / name).read_bytes() for name in names] + [b""]
    assert data.train.dtype == np.uint16


def test_the_tokenizer_never_sees_the_validation_files(corpus, tmp_path):
    options = DataOptions(corpus=str(corpus), vocab_size=300, validation_fraction=0.3)
    data = prepare_data(options, tmp_path / "one")
    for name in data.description["validation"]["names"]:
        (corpus / name).write_text("completely different words " * 30)
    changed = prepare_data(options, tmp_path / "two")
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert len(data.validation) != len(changed.validation)


def test_prepared_data_is_used_again_even_if_the_corpus_is_gone(corpus, tmp_path):
    options = DataOptions(corpus=str(corpus), vocab_size=300)
    first = prepare_data(options, tmp_path / "data").train.tolist()
    for file in corpus.iterdir():
        file.unlink()
    assert prepare_data(options, tmp_path / "data").train.tolist() == first


def test_other_options_and_damaged_folders_are_refused_and_left_alone(corpus, tmp_path):
    options = DataOptions(corpus=str(corpus), vocab_size=300)
    prepare_data(options, tmp_path / "data")
    with pytest.raises(ValueError, match="was prepared with"):
        prepare_data(DataOptions(corpus=str(corpus), vocab_size=301), tmp_path / "data")
    content = (tmp_path / "data" / "train.npy").read_bytes()
    (tmp_path / "data" / "train.npy").write_bytes(content[:-20])
    with pytest.raises(ValueError, match="not a folder of prepared data"):
        prepare_data(options, tmp_path / "data")
    with pytest.raises(ValueError, match="tokenizer: expected one of"):
        prepare_data(DataOptions(corpus=str(corpus), tokenizer="words"), tmp_path / "words")


def test_a_failure_while_preparing_leaves_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_encoded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_data(DataOptions(corpus=str(corpus), vocab_size=300), tmp_path / "run" / "data")
    assert list((tmp_path / "run").iterdir()) == []


def test_no_more_documents_are_encoded_than_it_takes():
    documents = [Document(str(i), "abc") for i in range(200)]
    tokenizer = ByteTokenizer()
    whole = prepare.pack(documents, tokenizer)
    assert whole.tolist() == [97, 98, 99, tokenizer.separator_id] * 200
    some = prepare.pack(documents, tokenizer, enough=300)
    assert 300 <= len(some) < 800
    assert (some == whole[: len(some)]).all()
    assert len(prepare.pack(documents, tokenizer, enough=10_000)) == 800


def test_a_dataset_is_streamed(tmp_path):
    """Rows of JSON lines, split by their number; bytes, so that tokens are what is in the files."""
    texts = [f"text number {i}" * (i % 3) for i in range(200)]
    (tmp_path / "rows").mkdir()
    for part in (0, 1):
        lines = [json.dumps({"body": text, "id": 0}) for text in texts[part * 100 : part * 100 + 100]]
        (tmp_path / "rows" / f"{part}.jsonl").write_text("\n".join(lines))
    options = DataOptions(
        corpus=str(tmp_path / "rows"), text_column="body", tokenizer="bytes", validation_fraction=0.2
    )
    data = prepare_data(options, tmp_path / "data")
    ends = [[i for i, t in enumerate(side.tolist()) if t == 256] for side in (data.train, data.validation)]
    found = [
        bytes(side[start:stop].tolist()).decode()
        for side, stops in zip((data.train, data.validation), ends)
        for start, stop in zip([0, *(stop + 1 for stop in stops)], stops)
    ]
    assert sorted(found) == sorted(text for text in texts if text)
    assert 10 < data.description["validation"]["files"] < 50
    assert not list((tmp_path / "data").glob("*.raw"))
    trained = prepare_data(replace(options, tokenizer="bpe", vocab_size=300), tmp_path / "bpe")
    assert len(trained.train) < len(data.train)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.jsonl").write_text('{"body": "text"}\n{"body": ')
    for changed, message in (
        ({"corpus": str(tmp_path / "broken")}, "datasets cannot read .*broken"),
        ({"text_column": "text"}, r"no text in a column 'text'; it has \['body', 'id'\]"),
        ({"text_column": "id"}, "no text in a column 'id'"),
        ({"corpus": str(tmp_path / "nowhere")}, "datasets cannot read"),
    ):
        with pytest.raises(CorpusError, match=message):
            prepare_data(replace(options, **changed), tmp_path / "other")
        assert not (tmp_path / "other").exists()
