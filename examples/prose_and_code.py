"""Two kinds of real text that every Python brings along, and a small transformer that knows one of them."""

from __future__ import annotations

import ast
import contextlib
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from nl_models.data import BytePairTokenizer, Document, read_standard_library, split_by_file, train_bpe


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Counts of text are in tokens.

    Attributes:
        vocab_size: of the BPE, trained on both kinds of text.
        hidden_size, layers, heads: of the Llama; its MLPs are three times as wide.
        steps, batch_size, context: of the training on prose, and the window of every evaluation.
        stream_tokens: of source code, read by every reader at every setting.
        middle_tokens: read after those, for a look at levels that stand in the middle of their chunks.
        document_tokens: of a file of source code at most; the rest of it is left out.
        held_out_tokens: of either kind, for every evaluation of the weights as they stand.
        read_on_tokens: of either kind, read on after the stream.
        evaluations: along the stream.
        streams: in how many orders the files are read, each a row of its own.
        modules: of the standard library at most.
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    steps: int = 400
    batch_size: int = 8
    context: int = 256
    stream_tokens: int = 16_384
    middle_tokens: int = 1024
    document_tokens: int = 2048
    held_out_tokens: int = 4096
    read_on_tokens: int = 2048
    evaluations: int = 4
    streams: int = 3
    modules: int | None = None


SMALL = Sizes(
    vocab_size=300,
    hidden_size=16,
    layers=1,
    heads=2,
    steps=4,
    batch_size=2,
    context=64,
    stream_tokens=4096,
    middle_tokens=100,
    document_tokens=200,
    held_out_tokens=256,
    read_on_tokens=128,
    evaluations=2,
    modules=24,
)


@dataclass(frozen=True)
class Data:
    """Tokens of the two kinds. None of a file is in two of the sets."""

    tokenizer: BytePairTokenizer
    prose: torch.Tensor  # [N], what the model is trained on
    streams: torch.Tensor  # [streams, T], source code
    held_out: dict[str, torch.Tensor]  # "prose", "code": [windows, context]
    read_on: dict[str, torch.Tensor]  # "prose", "code": [T]


def prepare(sizes: Sizes, seed: int, console: Console) -> Data:
    """Tokenize both kinds and share the files out; ``seed`` is of the streams' orders."""
    prose, code = (split_by_file(texts, validation_fraction=0.2) for texts in read_texts(sizes.modules))
    sample = [document.text[:4000] for document in (*prose.train, *code.train)]
    tokenizer = train_bpe(sample, vocab_size=sizes.vocab_size)

    def encode(documents: tuple[Document, ...], longest: int) -> list[torch.Tensor]:
        ids = ([*tokenizer.encode(document.text), tokenizer.separator_id] for document in documents)
        return [torch.tensor(document[:longest]) for document in ids]

    def shuffled(documents: list[torch.Tensor], seed: int, count: int) -> torch.Tensor:
        # Until there are enough: few or short files come again.
        generator = torch.Generator().manual_seed(seed)
        taken: list[torch.Tensor] = []
        while sum(map(len, taken)) < count:
            order = torch.randperm(len(documents), generator=generator).tolist()
            taken += [documents[index] for index in order]
        return torch.cat(taken)[:count]

    files = encode(code.train, sizes.document_tokens)
    held_out, read_on = {}, {}
    for kind, split in (("prose", prose), ("code", code)):
        documents = encode(split.validation, sizes.document_tokens)
        held_out[kind] = shuffled(documents[::2], 0, sizes.held_out_tokens).view(-1, sizes.context)
        read_on[kind] = shuffled(documents[1::2], 0, sizes.read_on_tokens)
    data = Data(
        tokenizer=tokenizer,
        prose=torch.cat(encode(prose.train, 10**9)),
        # One more: a stream's first token is not predicted.
        streams=torch.stack(
            [
                shuffled(files, 1000 * seed + row + 1, sizes.stream_tokens + sizes.middle_tokens + 1)
                for row in range(sizes.streams)
            ]
        ),
        held_out=held_out,
        read_on=read_on,
    )
    console.print(
        f"{len(data.prose):,} tokens of prose; {sizes.streams} streams of {sizes.stream_tokens:,} tokens "
        f"out of {sum(map(len, files)):,} of source code"
    )
    return data


def read_texts(modules_at_most: int | None) -> tuple[list[Document], list[Document]]:
    """Prose and source code of this Python, from different files."""
    library = read_standard_library()
    topics = [document for document in library if document.name.startswith("topics/")]
    modules = [document for document in library if not document.name.startswith("topics/")]
    modules = modules[:modules_at_most]
    split = split_by_file(modules, validation_fraction=0.5)
    # Other names, since the files' own have just decided on which side they are.
    prose = [Document(f"prose/{file.name}", "\n\n".join(docstrings(file.text))) for file in split.train]
    code = [Document(f"code/{file.name}", file.text) for file in split.validation]
    return [*topics, *(document for document in prose if document.text)], code


def docstrings(source: str) -> list[str]:
    """The docstrings of a module, its classes and its functions."""
    with contextlib.suppress(SyntaxError):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
        return [text for text in found if text]
    return []


def train_on_prose(data: Data, sizes: Sizes, seed: int) -> LlamaForCausalLM:
    """A Llama trained on the prose."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=data.tokenizer.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=True,
        initializer_range=(0.4 / sizes.hidden_size) ** 0.5,
        bos_token_id=None,
        eos_token_id=data.tokenizer.separator_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    warmup = min(20, sizes.steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(sizes.steps - warmup, 1), eta_min=1e-4),
        ],
        [warmup],
    )
    for _ in track(range(sizes.steps), description="training on prose"):
        starts = torch.randint(len(data.prose) - sizes.context, (sizes.batch_size,))
        batch = torch.stack([data.prose[start : start + sizes.context] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)
