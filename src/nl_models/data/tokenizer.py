"""Text to token ids and back: bytes, a BPE trained on the corpus (both lossless), or a ready tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZERS = ("bytes", "bpe")
SMALLEST_BPE = 257  # every byte and the separator
_SEPARATOR = "<|document|>"
_FILE = "tokenizer.json"
_BYTES_FORMAT = "nl-models-bytes"  # of older files


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    vocab_size: int
    separator_id: int  # ends every document; encodes no text

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without a separator."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of several texts."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; separators vanish, incomplete UTF-8 becomes U+FFFD."""

    def token_bytes(self) -> np.ndarray:
        """``[vocab_size]`` int64: how many bytes of text each id stands for (the separator: 0)."""

    def for_transformers(self) -> PreTrainedTokenizerBase:
        """The same as one of transformers, whose end-of-text token is the separator."""

    def save(self, folder: Path) -> None:
        """Write it into ``folder``; :func:`load_tokenizer` and ``AutoTokenizer`` read it."""


AnyTokenizer = Tokenizer | PreTrainedTokenizerBase


class BytePairTokenizer:
    """Byte-level byte-pair encoding (GPT-2's pre-tokenisation), by the ``tokenizers`` library."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # A document that spells the separator out is text like any other.
        inner.encode_special_tokens = True
        self._inner = inner
        self.vocab_size = inner.get_vocab_size()
        self.separator_id: Any = inner.token_to_id(_SEPARATOR)  # an int: whoever makes one has put it in

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        # In byte-level BPE a token is written with one character per byte.
        lengths = [len(self._inner.id_to_token(token) or "") for token in range(self.vocab_size)]
        lengths[self.separator_id] = 0
        return np.array(lengths, dtype=np.int64)

    def for_transformers(self) -> PreTrainedTokenizerFast:
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=_SEPARATOR, pad_token=_SEPARATOR)

    def save(self, folder: Path) -> None:
        self.for_transformers().save_pretrained(folder)


class ByteTokenizer(BytePairTokenizer):
    """No pairs: ids 0–255 are the bytes of the UTF-8 text, 256 is the separator."""

    def __init__(self) -> None:
        signs = {ord(sign) for sign in pre_tokenizers.ByteLevel.alphabet()}
        # Byte-level BPE writes a byte as the character of its number, blank ones by one from 256 on.
        unseen = iter(sorted(signs - set(range(256))))
        vocabulary = {chr(byte if byte in signs else next(unseen)): byte for byte in range(256)}
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([_SEPARATOR])
        super().__init__(inner)


class ReadyTokenizer:
    """A tokenizer of transformers; its end-of-text token is the separator.

    Raises:
        ValueError: it has no end-of-text token.
    """

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        if inner.eos_token_id is None:
            raise ValueError("tokenizer: has no end-of-text token (eos_token), which is to end documents")
        self._inner = inner
        self.vocab_size = len(inner)
        self.separator_id = inner.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # A document that spells special tokens out is text like any other.
        return self._inner(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for i, token in enumerate(self._inner.convert_ids_to_tokens(list(range(self.vocab_size)))):
            text = str(self._inner.decode([i]))
            if i in self._inner.all_special_ids or token is None:
                continue
            if "\ufffd" in text:  # part of a character: a byte by itself, or written with one sign per byte
                lengths[i] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token)
            else:
                lengths[i] = len((token.replace("▁", " ") if "▁" in token else text).encode())
        return lengths

    def for_transformers(self) -> PreTrainedTokenizerBase:
        return self._inner

    def save(self, folder: Path) -> None:
        self._inner.save_pretrained(folder)


def for_transformers(tokenizer: AnyTokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer of ours as one of transformers, and one of these as it is."""
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer.for_transformers()


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> BytePairTokenizer:
    """Learn a byte-level BPE of at most ``vocab_size`` ids (fewer when the texts have fewer distinct pairs).

    Raises:
        ValueError: ``vocab_size`` below 257, which 256 bytes and the separator need.
    """
    if vocab_size < SMALLEST_BPE:
        raise ValueError(f"vocab_size: expected at least {SMALLEST_BPE} for BPE, got {vocab_size}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return BytePairTokenizer(inner)


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder: of this package, or any of transformers.

    Raises:
        ValueError: there is none, or it has no end-of-text token.
    """
    try:
        return load_tokenizer(folder)
    except ValueError as ours:
        try:
            return ReadyTokenizer(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        except (ValueError, OSError) as error:
            raise ValueError(f"tokenizer: {folder} has no usable one ({ours}; {error})") from error


def load_tokenizer(folder: str | Path) -> BytePairTokenizer:
    """Load what :meth:`Tokenizer.save` wrote into ``folder``.

    Raises:
        ValueError: there is no ``tokenizer.json`` of this package in ``folder``.
    """
    path = Path(folder, _FILE)
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.get("format") == _BYTES_FORMAT:
            return ByteTokenizer()
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer file ({error})") from error
    if inner.token_to_id(_SEPARATOR) is None:
        raise ValueError(f"{path}: a tokenizer without the separator {_SEPARATOR} is not of this package")
    return BytePairTokenizer(inner)
