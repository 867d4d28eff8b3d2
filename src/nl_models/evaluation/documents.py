"""Loss of a model on documents of one's own, with what it remembers and without."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from nl_models.conversation import Conversation


@dataclass(frozen=True)
class DocumentLoss:
    """Nats of one document, summed; ``remembering``: with a memory, or ``None``."""

    name: str
    tokens: int
    size: int  # bytes of UTF-8
    nats: float
    remembering: float | None = None


def document_losses(
    documents: Mapping[str, str], plain: Conversation, remembering: Conversation | None = None
) -> list[DocumentLoss]:
    """The losses of texts by name, each read by itself; nothing is learned from them.

    Raises:
        ValueError: no document has a token that is predicted.
    """
    found = []
    for name, text in documents.items():
        nats, tokens = plain.loss(text) if text else (0.0, 0)
        if tokens:
            with_memory = None if remembering is None else remembering.loss(text)[0]
            found.append(DocumentLoss(name, tokens, len(text.encode()), nats, with_memory))
    if not found:
        raise ValueError("documents: none has a token that is predicted; give longer ones")
    return found


def documents_table(found: list[DocumentLoss]) -> Table:
    """A row for each document, and one for all."""
    with_memory = found[0].remembering is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=False)
    table.add_column("document", overflow="fold")
    more = ("with memory", "difference") if with_memory else ("bits/byte", "perplexity")
    for heading in ("tokens", "nats/token", *more):
        table.add_column(heading, justify="right")
    total = DocumentLoss(
        f"all {len(found):,}",
        *(sum(getattr(each, name) for each in found) for name in ("tokens", "size", "nats")),
        sum(each.remembering for each in found) if with_memory else None,
    )
    for each in [*found, *([total] if len(found) > 1 else [])]:
        if each is total:
            table.add_section()
        nats = each.nats / each.tokens
        if with_memory:
            remembering = each.remembering / each.tokens
            figures = (f"{remembering:.3f}", f"{remembering - nats:+.3f}")
        else:
            figures = (f"{each.nats / each.size / math.log(2):.3f}", f"{math.exp(min(nats, 700)):,.1f}")
        name = "/".join(Path(each.name).parts[-2:])  # a line has 80 columns
        table.add_row(name, f"{each.tokens:,}", f"{nats:.3f}", *figures)
    return table
