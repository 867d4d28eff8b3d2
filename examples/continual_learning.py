"""A small transformer that knows prose reads source code: what it learns, and what it forgets meanwhile.

A Llama of half a million parameters is trained on the prose that comes with every Python (the language
reference's topics, and docstrings). Then it reads a stream of the standard library's source code, once, and
learns from it by its next-token loss: not at all, by plain online gradient descent on its MLPs, or as a
continuum memory system of one, two or three levels. Held-out text of both kinds says what came of it.

    python -m examples.continual_learning --output runs/continual     # a few minutes on one core
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from nl_models.continual import ContinuumLearner, StepRule
from nl_models.data import BytePairTokenizer, Document, read_standard_library, split_by_file, train_bpe
from nl_models.files import write_json
from nl_models.surgery import convert_mlp_to_continuum
from nl_models.training.plots import COLOURS, MARKERS, new_figure, save_figure

CHUNKS = (32, 256, 2048)
METHODS = {
    "plain fine-tuning": ((1.0, CHUNKS[0], 1.0),),
    "CMS, 1 level": ((1 / 2, CHUNKS[0], 1.0),),
    "CMS, 2 levels": tuple((1 / 4, size, 1.0) for size in CHUNKS[:2]),
    "CMS, 3 levels": tuple((1 / 6, size, 1.0) for size in CHUNKS),
    "CMS, 3 levels, falling rates": tuple((1 / 6, size, (CHUNKS[0] / size) ** 0.5) for size in CHUNKS),
}
"""Of each level: its fraction of every MLP, the tokens between its steps, its share of the rate. One level of
everything, as often as the fastest, is online gradient descent on MLPs; half of every MLP of a CMS stays."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Counts of text are in tokens.

    Attributes:
        vocab_size: of the BPE, trained on both kinds of text.
        hidden_size, layers, heads: of the Llama; its MLPs are three times as wide.
        steps, batch_size, context: of the training on prose, and the window of every evaluation.
        search_tokens: read at every rate by every method, to choose its rate.
        stream_tokens: read by every method at its chosen rate, and at that of plain fine-tuning.
        document_tokens: of a file of source code at most; the rest of it is left out.
    held_out_tokens: of either kind, for every evaluation; another set for the search.
        evaluations: along the stream.
        modules: of the standard library at most.
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    steps: int = 400
    batch_size: int = 8
    context: int = 256
    search_tokens: int = 8192
    stream_tokens: int = 49_152
    document_tokens: int = 2048
    held_out_tokens: int = 8192
    evaluations: int = 8
    modules: int | None = None


SMALL = Sizes(
    vocab_size=300,
    hidden_size=16,
    layers=1,
    heads=2,
    steps=4,
    batch_size=2,
    context=64,
    search_tokens=256,
    stream_tokens=700,
    document_tokens=200,
    held_out_tokens=256,
    evaluations=2,
    modules=24,
)


@dataclass(frozen=True)
class Data:
    """Tokens of the two kinds. None of a file is in two of the sets."""

    tokenizer: BytePairTokenizer
    prose: torch.Tensor
    stream: tuple[torch.Tensor, ...]
    search_stream: tuple[torch.Tensor, ...]
    held_out: dict[str, torch.Tensor]  # "prose", "code", "search prose", "search code": [windows, context]


@dataclass
class Run:
    """One method at one rate: held-out losses (nats per token) at the tokens read."""

    method: str
    rate: float
    tokens: list[int]
    prose: list[float]
    code: list[float]
    online: float  # loss on the stream itself, every token before it was learned
    steps: list[int]


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


def prepare(sizes: Sizes, console: Console) -> Data:
    """Tokenize both kinds and share the files out."""
    texts = read_texts(sizes.modules)
    prose, code = (split_by_file(documents, validation_fraction=0.2) for documents in texts)
    sample = [document.text[:4000] for document in (*prose.train, *code.train)]
    tokenizer = train_bpe(sample, vocab_size=sizes.vocab_size)

    def encode(documents: tuple[Document, ...], limit: int, longest: int) -> list[torch.Tensor]:
        # In an order that depends on neither names nor sizes, so that a cut takes a cross-section.
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
        taken, count = [], 0
        for index in order:
            if count >= limit:
                break
            ids = [*tokenizer.encode(documents[index].text), tokenizer.separator_id]
            taken.append(torch.tensor(ids[: min(longest, limit - count)]))
            count += len(taken[-1])
        return [document for document in taken if len(document) > 1]

    def windows(documents: tuple[Document, ...]) -> torch.Tensor:
        count = sizes.held_out_tokens // sizes.context
        return torch.cat(encode(documents, count * sizes.context, sizes.document_tokens))[
            : count * sizes.context
        ].view(count, -1)

    data = Data(
        tokenizer=tokenizer,
        prose=torch.cat(encode(prose.train, limit=10**9, longest=10**9)),
        search_stream=tuple(encode(code.train[::2], sizes.search_tokens, sizes.document_tokens)),
        stream=tuple(encode(code.train[1::2], sizes.stream_tokens, sizes.document_tokens)),
        held_out={
            "prose": windows(prose.validation[::2]),
            "code": windows(code.validation[::2]),
            "search prose": windows(prose.validation[1::2]),
            "search code": windows(code.validation[1::2]),
        },
    )
    console.print(
        f"{len(data.prose):,} tokens of prose; streams of {sum(map(len, data.search_stream)):,} (search) and "
        f"{sum(map(len, data.stream)):,} tokens of source code"
    )
    return data


def train_base(data: Data, sizes: Sizes, seed: int) -> LlamaForCausalLM:
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
    return model.eval()


def read_stream(
    model: LlamaForCausalLM,
    method: str,
    rate: float,
    rule: StepRule,
    stream: tuple[torch.Tensor, ...],
    held_out: dict[str, torch.Tensor],
    *,
    evaluations: int,
    save_to: Path | None = None,
) -> Run:
    """Read the stream once with one method; held-out losses before, along it and after.

    ``rule`` is that of all levels but for its rate.
    """
    levels = [{"fraction": fraction, "chunk_size": size} for fraction, size, _ in METHODS[method]]
    rules = [dataclasses.replace(rule, rate=rate * share) for _, _, share in METHODS[method]]
    learner = ContinuumLearner(convert_mlp_to_continuum(model, levels), rules)
    total = sum(len(document) for document in stream)
    run = Run(method, rate, [], [], [], 0.0, [0] * len(levels))

    def evaluate() -> None:
        run.tokens.append(learner.tokens_read)
        run.prose.append(float(learner.loss(held_out["prose"]).mean()))
        run.code.append(float(learner.loss(held_out["code"]).mean()))

    evaluate()
    losses, counts = 0.0, 0
    for document in stream:
        report = learner.learn([document])
        losses, counts = losses + float(report.loss) * sum(report.tokens), counts + sum(report.tokens)
        run.steps = [done + new for done, new in zip(run.steps, report.steps)]
        if learner.tokens_read >= (len(run.tokens)) * total / evaluations:
            evaluate()
    run.online = losses / counts
    if save_to is not None:
        learner.save(save_to)
    return run


def report(console: Console, base: dict[str, float], runs: list[Run]) -> None:
    """A table of the held-out losses after the stream, on the terminal."""
    table = Table("method", "rate", "new: code", "old: prose", "sum", "in the stream", "steps")
    frozen = (f"{value:.3f}" for value in (base["code"], base["prose"], base["code"] + base["prose"]))
    table.add_row("frozen", "–", *frozen, f"{base['online']:.3f}", "–")
    for run in runs:
        values = (run.code[-1], run.prose[-1], run.code[-1] + run.prose[-1], run.online)
        steps = ", ".join(map(str, run.steps))
        table.add_row(run.method, f"{run.rate:g}", *(f"{value:.3f}" for value in values), steps)
    console.print(table)


def plot(base: dict[str, float], runs: list[Run], search: list[Run], path: Path) -> None:
    """Held-out losses along the stream, each method at its own rate, and what the search saw."""
    figure, (code, prose, exchange) = new_figure(3, width=4.6, height=4.2)
    shown = {run.method: run for run in reversed(runs)}  # the first of a method: at its own rate
    for axis, kind in ((code, "code"), (prose, "prose")):
        axis.axhline(base[kind], color="#888888", linestyle="--", linewidth=1.2, label="frozen")
        axis.set_xlabel("tokens of source code read")
        axis.set_ylabel("held-out loss, nats per token")
    start = search[0].prose[0], search[0].code[0]
    exchange.plot(*start, marker="*", color="#888888", markersize=10, linestyle="")
    for method, colour, marker in zip(METHODS, COLOURS, MARKERS):
        run = shown[method]
        look = {"color": colour, "marker": marker, "markersize": 4, "label": f"{method}, η {run.rate:g}"}
        code.plot(run.tokens, run.code, **look)
        prose.plot(run.tokens, run.prose, **look)
        tried = sorted((run for run in search if run.method == method), key=lambda run: run.rate)
        exchange.plot([run.prose[-1] for run in tried], [run.code[-1] for run in tried], **look)
    # A rate at which a method falls apart would leave nothing to see of the others.
    exchange.set_xlim(right=min(max(run.prose[-1] for run in search), start[0] + 0.3) + 0.02)
    exchange.set_ylim(top=start[1] + 0.05)
    code.set_title("new: source code")
    prose.set_title("old: prose")
    exchange.set_title("after each rate of the search (star: before)")
    exchange.set_xlabel("old: prose")
    exchange.set_ylabel("new: source code")
    figure.legend(*code.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def main(
    output: Annotated[Path, typer.Option(help="Folder for results, plot and memories.")] = Path(
        "runs/continual"
    ),
    rule: Annotated[str, typer.Option(help="sgd, dgd, momentum or muon, for every method.")] = "sgd",
    rates: Annotated[
        str, typer.Option(help="Rates per token that every method tries.")
    ] = "3e-5,1e-4,3e-4,1e-3",
    restore_norms: Annotated[bool, typer.Option(help="Give rows their norm back after each step.")] = False,
    seed: Annotated[int, typer.Option(help="Of the model and its training.")] = 0,
    small: Annotated[bool, typer.Option(help="Sizes of a smoke test: seconds, and no result.")] = False,
) -> None:
    """Train a small Llama on prose, let it read source code, and compare what it learns and forgets."""
    torch.set_num_threads(1)
    console = Console()
    sizes = Sizes()
    if small:
        sizes = SMALL
    output.mkdir(parents=True, exist_ok=True)
    data = prepare(sizes, console)
    model = train_base(data, sizes, seed)

    step = StepRule(rule=rule, restore_norms=restore_norms)
    chosen_rates = [float(rate) for rate in rates.split(",")]
    search_sets = {kind: data.held_out[f"search {kind}"] for kind in ("prose", "code")}
    search = []
    for method in track(METHODS, description="searching rates"):
        for rate in chosen_rates:
            search.append(
                read_stream(model, method, rate, step, data.search_stream, search_sets, evaluations=1)
            )
    # What is learned of the new beside what is lost of the old, equally weighted.
    best = {
        method: min(
            (run for run in search if run.method == method), key=lambda run: run.code[-1] + run.prose[-1]
        )
        for method in METHODS
    }

    final = [(method, best[method].rate) for method in METHODS]
    common = best["plain fine-tuning"].rate
    final += [(method, common) for method in METHODS if best[method].rate != common]
    runs = []
    for method, rate in track(final, description="reading the stream"):
        name = method.replace(",", "").replace(" ", "-")
        runs.append(
            read_stream(
                model,
                method,
                rate,
                step,
                data.stream,
                data.held_out,
                evaluations=sizes.evaluations,
                save_to=output / f"memory-{name}-{rate:g}.safetensors",
            )
        )
    frozen = read_stream(model, "CMS, 1 level", 0.0, step, data.stream, data.held_out, evaluations=1)
    base = {"prose": frozen.prose[-1], "code": frozen.code[-1], "online": frozen.online}
    report(console, base, runs)
    plot(base, runs, search, output / "continual-learning.png")
    results = {
        "sizes": dataclasses.asdict(sizes),
        "frozen": base,
        "runs": [dataclasses.asdict(run) for run in runs],
        "search": [dataclasses.asdict(run) for run in search],
    }
    write_json(output / "results.json", results)
    console.print(f"[dim]{output}: plot, results.json and the memories[/dim]")


if __name__ == "__main__":
    typer.run(main)
