"""The text to learn from: a folder of text files or a dataset, split by document."""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_NEVER_TEXT = frozenset({"__pycache__", "node_modules"})
# Parts of an installation that are tests, other people's packages, build files or tables of character codes.
_NOT_THE_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload", "encodings"}
)


class CorpusError(ValueError):
    """The corpus is missing, empty or too small."""


@dataclass(frozen=True)
class Document:
    """One file of the corpus: its path below the corpus folder (POSIX style) and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents to validate on, each in a fixed order."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]


def check_folder(folder: str | Path) -> Path:
    """The folder of a corpus, which need not have been read yet.

    Raises:
        CorpusError: it does not exist, or is not a folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise CorpusError(f"corpus: the folder {folder} does not exist")
    if not folder.is_dir():
        raise CorpusError(f"corpus: expected a folder of text files, got the file {folder}")
    return folder


def read_folder(folder: str | Path) -> list[Document]:
    """Read every UTF-8 text file below ``folder``, sorted by path.

    Hidden files, ``__pycache__`` and ``node_modules`` are left out, as are empty files, files that are not
    UTF-8 or contain NUL (binary), and all but the first of several files with the same content.

    Raises:
        CorpusError: the folder does not exist, is not a folder, or has no text file.
    """
    folder = check_folder(folder)
    documents = _without_duplicates(_read(folder, skip=_NEVER_TEXT, suffix=""))
    if not documents:
        raise CorpusError(f"corpus: no UTF-8 text file in {folder}")
    return documents


def read_documents(path: str | Path) -> list[Document]:
    """Read a text file, or all of a folder as :func:`read_folder` does.

    Raises:
        CorpusError: there is no such file or folder, or no UTF-8 text in it.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return read_folder(path)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CorpusError(f"documents: no such file or folder: {path}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"documents: {path} is not UTF-8 text ({error})") from error
    except CorpusError as error:
        raise CorpusError(f"documents: {str(error).removeprefix('corpus: ')}") from error
    if "\0" in text:
        raise CorpusError(f"documents: {path} is no text, it has bytes of 0")
    return [Document(str(path), text)]


def stream_dataset(path: str, column: str) -> Iterator[Document]:
    """Read the rows that Hugging Face ``datasets`` finds at ``path`` one after the other, as a stream.

    Args:
        path: of ``datasets.load_dataset``: a folder of parquet, JSON-lines or CSV files, or a name on the
            Hub; its split "train".
        column: the one with the text. Empty rows are left out.

    Raises:
        CorpusError: ``datasets`` is not installed or cannot read it, or there is no such column of text.
    """
    for number, row in enumerate(_rows(path)):
        text = row.get(column)
        if not isinstance(text, str | None) or column not in row:
            raise CorpusError(f"text_column: {path} has no text in a column {column!r}; it has {sorted(row)}")
        if text:
            yield Document(f"row {number}", text)


def _rows(path: str) -> Iterator[dict[str, object]]:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError("text_column: needs datasets: pip install nl-kernels[datasets]") from error
    try:  # what is wrong with a file shows when its rows are read
        yield from datasets.load_dataset(path, split="train", streaming=True)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise CorpusError(f"corpus: datasets cannot read {path} ({error})") from error


def check_fraction(validation_fraction: float) -> None:
    """Raise ``ValueError`` unless it is inside (0, 1)."""
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(
            f"validation_fraction: expected a number between 0 and 1, got {validation_fraction!r}"
        )


def is_held_out(name: str, validation_fraction: float) -> bool:
    """The side of a document, which depends on its own name alone."""
    return _place(name) < validation_fraction


def read_standard_library() -> list[Document]:
    """Read the running interpreter's standard library (``*.py``) and its language reference topics.

    About 10 MB of real text on any machine, without a network; what exactly depends on the Python version.
    Tests, installed packages and the character tables of ``encodings`` are left out.

    Raises:
        CorpusError: this installation has no sources (some are shipped as bytecode only).
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = list(_read(library, skip=_NEVER_TEXT | _NOT_THE_LIBRARY, suffix=".py"))
    # The topics' own module is one huge dictionary literal: taken as text below, not as source.
    documents = [document for document in documents if not document.name.startswith("pydoc_data/")]
    if not documents:
        raise CorpusError(f"corpus: no Python sources in {library}; give a folder of text files instead")
    return _without_duplicates([*documents, *read_topics()])


def read_topics() -> list[Document]:
    """What ``help("topics")`` lists of the language reference, as ``topics/<TOPIC>.rst``; maybe nothing."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package the documentation separately
        topics = {}
    return [Document(f"topics/{name}.rst", text) for name, text in sorted(topics.items())]


def split_by_file(documents: Iterable[Document], *, validation_fraction: float) -> Split:
    """Split whole documents by a hash of their name.

    A document's side depends on its own name alone, so it stays there when others come and go. If the hash
    puts every document on one side (few files), the one nearest to the boundary changes over.

    Raises:
        CorpusError: fewer than two documents.
        ValueError: ``validation_fraction`` is not inside (0, 1).
    """
    check_fraction(validation_fraction)
    ordered = sorted(documents, key=lambda document: document.name)
    if len(ordered) < 2:
        raise CorpusError(
            f"corpus: a split by file needs at least two different text files, got {len(ordered)}"
        )
    place = {document.name: _place(document.name) for document in ordered}
    held_out = {name for name in place if is_held_out(name, validation_fraction)}
    if not held_out:
        held_out = {min(place, key=place.__getitem__)}
    elif len(held_out) == len(ordered):
        held_out.remove(max(place, key=place.__getitem__))
    return Split(
        train=tuple(document for document in ordered if document.name not in held_out),
        validation=tuple(document for document in ordered if document.name in held_out),
    )


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone (not on Python's salted ``hash``)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2.0**64


def _read(folder: Path, *, skip: frozenset[str], suffix: str) -> Iterator[Document]:
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        for file in sorted(files):
            path = Path(current, file)
            if file.startswith(".") or not file.endswith(suffix) or not path.is_file():
                continue
            content = path.read_bytes()
            if not content or b"\0" in content:
                continue
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            yield Document(path.relative_to(folder).as_posix(), text)


def _without_duplicates(documents: Iterable[Document]) -> list[Document]:
    seen: set[bytes] = set()
    kept = []
    for document in sorted(documents, key=lambda document: document.name):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept
