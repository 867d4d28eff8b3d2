"""Tokenizers lose nothing, count bytes right, and survive saving."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nl_models.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe

TEXTS = ["def forward(self, x):\n    return self.layer(x)\n" * 20, "Größe, 数, 🎉\tand\r\n the the the"]
BPE = train_bpe(TEXTS, vocab_size=400)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=60, deadline=None)
def test_decoding_an_encoding_gives_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator_id not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_the_separator_spelled_out_in_a_text_is_text():
    text = "before <|document|> after"
    ids = BPE.encode(text)
    assert BPE.separator_id not in ids
    assert BPE.decode(ids) == text
    assert BPE.decode([BPE.separator_id, *ids, BPE.separator_id]) == text


def test_bpe_merges_what_is_frequent():
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert BPE.vocab_size <= 400


def test_bpe_training_is_reproducible_and_the_saved_tokenizer_is_the_same(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    BPE.save(tmp_path / "one")
    train_bpe(TEXTS, vocab_size=400).save(tmp_path / "two")
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert load_tokenizer(tmp_path / "one").encode(TEXTS[1]) == BPE.encode(TEXTS[1])


def test_bytes_are_recognised_when_loaded(tmp_path):
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_a_foreign_or_missing_tokenizer_file_and_a_tiny_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(TEXTS, vocab_size=256)
