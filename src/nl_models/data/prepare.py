"""From a corpus to a folder with a tokenizer and two token arrays, made once and memory mapped afterwards."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from nl_models.data.corpus import (
    CorpusError,
    Document,
    check_fraction,
    is_held_out,
    read_folder,
    read_standard_library,
    split_by_file,
    stream_dataset,
)
from nl_models.data.tokenizer import TOKENIZERS, ByteTokenizer, Tokenizer, open_tokenizer, train_bpe
from nl_models.files import make_folder, new_directory, remove_incomplete

_MANIFEST = "manifest.json"
_FORMAT = "nl-models-data-1"
_AT_ONCE = 64  # documents to encode


def option(default: object, text: str, expected: object = None) -> Any:
    """A field that is an option of the command line, with its help text and what its value may be."""
    return field(default=default, metadata={"help": text, "expected": expected})


@dataclass(frozen=True)
class DataOptions:
    """What determines the token arrays. Field metadata holds the help text of the command line."""

    corpus: str | None = option(
        None, "Folder of UTF-8 text files. Without it: Python's own library and documentation topics."
    )
    text_column: str | None = option(
        None,
        "Column with the text where the corpus is a dataset that Hugging Face datasets reads, as a stream: a "
        "folder of parquet, JSON-lines or CSV files, or a name on the Hub.",
    )
    tokenizer: str = option(
        "bpe", "'bytes', 'bpe' trained on the training files, or the folder of a ready one."
    )
    vocab_size: int = option(4096, "Ids of a BPE to train.")
    validation_fraction: float = option(0.05, "Share of the files held out for validation.")


def _described(options: DataOptions) -> dict[str, object]:
    """What determines the arrays, of options that may be those of a whole training."""
    return {each.name: getattr(options, each.name) for each in fields(DataOptions)}


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
    sides = _sides(options)
    if options.tokenizer not in TOKENIZERS:
        tokenizer = open_tokenizer(options.tokenizer)
    elif options.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = train_bpe((document.text for document in sides["train"]()), vocab_size=options.vocab_size)
    make_folder(folder.parent)
    remove_incomplete(folder.parent)
    with new_directory(folder) as temporary:
        tokenizer.save(temporary)
        description: dict[str, object] = {"format": _FORMAT, "options": _described(options)}
        description["vocab_size"] = tokenizer.vocab_size
        for side, documents in sides.items():
            about = description[side] = {"files": 0, "bytes": 0, "tokens": 0, "names": []}
            with (temporary / f"{side}.raw").open("wb") as raw:
                for document, tokens in _encoded(documents(), tokenizer):
                    raw.write(tokens.tobytes())
                    about["files"] += 1
                    about["bytes"] += len(document.text.encode())
                    about["tokens"] += len(tokens)
                    if options.text_column is None:
                        about["names"].append(document.name)
            if not about["files"]:
                raise CorpusError(f"corpus: {options.corpus} leaves no document for the {side} side")
            np.save(temporary / f"{side}.npy", np.memmap(raw.name, _dtype(tokenizer), mode="r"))
            Path(raw.name).unlink()
        (temporary / _MANIFEST).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def _sides(options: DataOptions) -> dict[str, Callable[[], Iterable[Document]]]:
    """The documents of both sides, each time anew: a dataset is streamed, and never held."""
    if options.text_column is not None:
        check_fraction(options.validation_fraction)

        def stream(held_out: bool) -> Iterator[Document]:
            for document in stream_dataset(options.corpus, options.text_column):
                if is_held_out(document.name, options.validation_fraction) == held_out:
                    yield document

        return {"train": lambda: stream(False), "validation": lambda: stream(True)}
    documents = read_standard_library() if options.corpus is None else read_folder(options.corpus)
    split = split_by_file(documents, validation_fraction=options.validation_fraction)
    return {"train": lambda: split.train, "validation": lambda: split.validation}


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its tokens and the separator."""
    left = iter(documents)
    while some := list(itertools.islice(left, _AT_ONCE)):
        for document, ids in zip(some, tokenizer.encode_batch([document.text for document in some])):
            yield document, np.array([*ids, tokenizer.separator_id], dtype=_dtype(tokenizer))


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def pack(documents: Sequence[Document], tokenizer: Tokenizer, *, enough: int | None = None) -> np.ndarray:
    """All documents after one another, each ended by the separator; no more than it takes for ``enough``."""
    pieces, count = [], 0
    for _, tokens in _encoded(documents, tokenizer):
        pieces.append(tokens)
        count += len(tokens)
        if enough is not None and count >= enough:
            break
    return np.concatenate(pieces)


def _load(options: DataOptions, folder: Path) -> PreparedData:
    try:
        description = json.loads((folder / _MANIFEST).read_text())
        if description["format"] != _FORMAT:
            raise ValueError(f"unknown format {description['format']!r}")
        made_with = {"text_column": None, **description["options"]}
        arrays = {side: np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("train", "validation")}
        for side, array in arrays.items():
            if array.shape != (description[side]["tokens"],):
                raise ValueError(f"{side}.npy has shape {array.shape}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: not a folder of prepared data ({error})") from error
    if made_with != _described(options):
        raise ValueError(f"{folder}: was prepared with {made_with}, but {_described(options)} is asked for")
    return PreparedData(arrays["train"], arrays["validation"], open_tokenizer(folder), description)
