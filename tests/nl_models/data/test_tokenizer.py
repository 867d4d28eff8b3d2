"""Tokenizers lose nothing, count bytes right, and survive saving."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nl_models.data.tokenizer import ByteTokenizer, ReadyTokenizer, load_tokenizer, open_tokenizer, train_bpe

TEXTS = ["def forward(self, x):\n    return self.layer(x)\n" * 20, "Größe, 数, 🎉\tand\r\n the the the"]
BPE = train_bpe(TEXTS, vocab_size=400)
READY = ReadyTokenizer(PreTrainedTokenizerFast(tokenizer_object=BPE._inner, eos_token="<|document|>"))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE, READY], ids=["bytes", "bpe", "ready"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=60, deadline=None)
def test_decoding_an_encoding_gives_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator_id not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("tokenizer", [BPE, READY], ids=["bpe", "ready"])
def test_the_separator_spelled_out_in_a_text_is_text(tokenizer):
    text = "before <|document|> after"
    ids = tokenizer.encode(text)
    assert tokenizer.separator_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.separator_id, *ids, tokenizer.separator_id]) == text


def test_a_ready_tokenizer_comes_from_any_folder_of_transformers(tmp_path):
    """One with signs for spaces and bytes, as sentencepiece makes them, and no byte-level alphabet."""
    tokens = ["<s>", "</s>", "▁", "a", "é", "▁a", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path
    )
    ready = open_tokenizer(tmp_path)
    ids = ready.encode("a aé数")
    assert ready.decode(ids) == "a aé数"
    assert ids[:3] == [5, 5, 4]  # no <s> before them
    assert ready.token_bytes()[ids].tolist() == [2, 2, 2, 1, 1, 1]
    assert ready.token_bytes()[[0, 1]].tolist() == [0, 0]
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no end-of-text token"):
        open_tokenizer(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no usable one"):
        open_tokenizer(tmp_path / "nowhere")


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


def test_bytes_are_bytes_in_old_files_too(tmp_path):
    text = "".join(map(chr, range(0x250))) + "数🎉"
    ByteTokenizer().save(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/tokenizer.json").write_text('{"format": "nl-models-bytes"}\n')
    for folder in (tmp_path, tmp_path / "old"):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.separator_id == 256
        assert tokenizer.decode([*"é".encode(), 256, 0xC3]) == "é\ufffd"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_transformers_opens_a_saved_tokenizer_that_ends_and_pads(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    ready = AutoTokenizer.from_pretrained(tmp_path)
    assert ready.eos_token_id == ready.pad_token_id == tokenizer.separator_id
    batch = ready(TEXTS, padding=True)
    assert batch["input_ids"][0] == tokenizer.encode(TEXTS[0])
    short = tokenizer.encode(TEXTS[1])
    assert batch["input_ids"][1][: len(short)] == short
    assert sum(batch["attention_mask"][1]) == len(short)
    assert ready.decode(short) == TEXTS[1]


def test_a_foreign_or_missing_tokenizer_file_and_a_tiny_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(TEXTS, vocab_size=256)
