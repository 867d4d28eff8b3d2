"""From a corpus to a folder with a tokenizer and two token arrays, made once and memory mapped afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nl_models.data.corpus import Document, read_folder, read_standard_library, split_by_file
from nl_models.data.tokenizer import TOKENIZERS, ByteTokenizer, Tokenizer, open_tokenizer, train_bpe
from nl_models.files import make_folder, new_directory, remove_incomplete

_MANIFEST = "manifest.json"
_FORMAT = "nl-models-data-1"
_AT_ONCE = 64  # documents to encode


@dataclass(frozen=True)
class DataOptions:
    """What determines the token arrays.

    Attributes:
        corpus: folder of text files; ``None``: the running interpreter's standard library and topics.
        tokenizer: ``"bytes"``, ``"bpe"`` (trained on the training documents only), or the folder of a ready
            one, of this package or of transformers.
        vocab_size: ids of a BPE to train (ignored otherwise).
        validation_fraction: share of the files held out, in (0, 1).
    """

    corpus: str | None = None
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    validation_fraction: float = 0.05


@dataclass(frozen=True)
class PreparedData:
    """Tokens ``[N]`` (uint16 or uint32, memory mapped) of both sides, the tokenizer, and their origin."""

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    description: dict[str, object]


def prepare_data(options: DataOptions, folder: str | Path) -> PreparedData:
    """Load the arrays from ``folder``, or make them there first.

    The folder appears whole or not at all. If it holds the arrays of *other* options it is left alone.

    Raises:
        CorpusError: missing, empty or too small corpus.
        ValueError: ``folder`` holds something else, or data made with other options.
    """
    folder = Path(folder)
    if not folder.exists():
        _build(options, folder)
    return _load(options, folder)


def data_folder(run: Path) -> Path | None:
    """The prepared data of a training run: its own, or what the demo's runs share beside them."""
    return next((folder for folder in (run / "data", run.parent / "data") if folder.is_dir()), None)


def check_tokenizer(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is a kind of tokenizer or a folder that may hold one."""
    if name not in TOKENIZERS and not Path(name).is_dir():
        raise ValueError(
            f"tokenizer: expected one of {TOKENIZERS}, or a folder with a ready tokenizer, got {name!r}"
        )


def _build(options: DataOptions, folder: Path) -> None:
    check_tokenizer(options.tokenizer)
    documents = read_standard_library() if options.corpus is None else read_folder(options.corpus)
    split = split_by_file(documents, validation_fraction=options.validation_fraction)
    if options.tokenizer not in TOKENIZERS:
        tokenizer = open_tokenizer(options.tokenizer)
    elif options.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = train_bpe((document.text for document in split.train), vocab_size=options.vocab_size)
    make_folder(folder.parent)
    remove_incomplete(folder.parent)
    with new_directory(folder) as temporary:
        tokenizer.save(temporary)
        description: dict[str, object] = {"format": _FORMAT, "options": asdict(options)}
        description["vocab_size"] = tokenizer.vocab_size
        for side in ("train", "validation"):
            files: Sequence[Document] = getattr(split, side)
            tokens = pack(files, tokenizer)
            np.save(temporary / f"{side}.npy", tokens)
            description[side] = {
                "files": len(files),
                "bytes": sum(len(document.text.encode()) for document in files),
                "tokens": len(tokens),
                "names": [document.name for document in files],
            }
        (temporary / _MANIFEST).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def pack(documents: Sequence[Document], tokenizer: Tokenizer, *, enough: int | None = None) -> np.ndarray:
    """All documents after one another, each ended by the separator; no more than it takes for ``enough``."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    separator = np.array([tokenizer.separator_id], dtype=dtype)
    pieces, count = [], 0
    for first in range(0, len(documents), _AT_ONCE):
        if enough is not None and count >= enough:
            break
        texts = [document.text for document in documents[first : first + _AT_ONCE]]
        for ids in tokenizer.encode_batch(texts):
            pieces += [np.array(ids, dtype=dtype), separator]
            count += len(ids) + 1
    return np.concatenate(pieces)


def _load(options: DataOptions, folder: Path) -> PreparedData:
    try:
        description = json.loads((folder / _MANIFEST).read_text())
        if description["format"] != _FORMAT:
            raise ValueError(f"unknown format {description['format']!r}")
        made_with = description["options"]
        arrays = {side: np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("train", "validation")}
        for side, array in arrays.items():
            if array.shape != (description[side]["tokens"],):
                raise ValueError(f"{side}.npy has shape {array.shape}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: not a folder of prepared data ({error})") from error
    if made_with != asdict(options):
        raise ValueError(f"{folder}: was prepared with {made_with}, but {asdict(options)} is asked for")
    return PreparedData(arrays["train"], arrays["validation"], open_tokenizer(folder), description)
