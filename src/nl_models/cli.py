"""``nl``: train, read, write, talk and measure from the command line; also ``python -m nl_models``."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from nl_kernels import doctor as doctor_command
from nl_models import demo, position, profile, train
from nl_models.console import OtherModel, explained_errors, fail, without_progress_bars
from nl_models.continual.memory_file import DTYPES, FileOptions
from nl_models.conversation import begin_conversation, other_text
from nl_models.data.corpus import read_documents
from nl_models.data.tokenizer import AnyTokenizer, for_transformers
from nl_models.files import new_directory, only_writer
from nl_models.open_model import OpenedModel, open_model
from nl_models.replies import Sampling, has_chat_template
from nl_models.surgery import convert_attention, convert_mlp_to_continuum
from nl_models.training.distributed import choose_device

app = typer.Typer(
    name="nl",
    help="Language models that go on learning while they read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo", help="Train, compare, generate and profile a small Hope on real text.")(demo.main)
app.command("train")(train.main)
app.command("evaluate")(position.main)
app.command("profile")(profile.main)

Model = Annotated[
    Path, typer.Argument(help="Folder of a training run, a checkpoint, or a saved or converted model.")
]
Memory = Annotated[
    Path | None,
    typer.Option(help="File of what the model remembers; made if it is not there, and kept up to date."),
]
Device = Annotated[str, typer.Option(help="'auto' (CUDA when there), 'cpu', 'cuda' or 'cuda:N'.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest.")]
TopP = Annotated[float, typer.Option(help="Share of the probability that is sampled from.")]
Seed = Annotated[int | None, typer.Option(help="Of what is sampled.")]
Threads = Annotated[
    int, typer.Option(min=1, help="CPU threads. More are faster for a large model on an idle machine.")
]
Rates = Annotated[
    list[float] | None,
    typer.Option(
        "--rate",
        help="Of the levels that learn, fast to slow, one option each. Default: 0.001 for a Hope (0: it "
        "only reads), 0.01, 0.0006 … for a converted model.",
    ),
]
_SMALLER = {"rich_help_panel": "A smaller file, without chunks that no level has stepped on yet"}


def _open(model: Path, device: str, threads: int) -> OpenedModel:
    torch.set_num_threads(threads)
    return open_model(model, choose_device(device))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Without it: what comes on standard input.")] = None,
    memory: Memory = None,
    max_new_tokens: Tokens = 200,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = None,
    allow_other_model: OtherModel = False,
    device: Device = "auto",
    threads: Threads = 1,
) -> None:
    """Write on from a prompt; with --memory after all that the file remembers, which stays as it is."""
    with explained_errors(NotImplementedError):
        sampling = Sampling(max_new_tokens, temperature, top_p)
        sampling.check()
        text = sys.stdin.read() if prompt is None else prompt
        if memory is not None and not memory.exists():
            raise ValueError(f"memory: no such file: {memory}")
        opened = _open(model, device, threads)
        conversation = begin_conversation(opened, memory, allow_other_model=allow_other_model)
        _seed(seed)
        typer.echo(text, nl=False)
        conversation.reply(text, sampling, _show)
        typer.echo()


@app.command()
def chat(
    model: Model,
    memory: Memory = None,
    max_new_tokens: Tokens = 200,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    stop: Annotated[
        str | None,
        typer.Option(
            help=r"Text that ends a reply, '' for none. Default: '\n', a line's end; for a model with a chat "
            "template none, for it ends its replies itself."
        ),
    ] = None,
    seed: Seed = None,
    rate: Rates = None,
    allow_other_model: OtherModel = False,
    device: Device = "auto",
    threads: Threads = 1,
) -> None:
    """Talk line by line; with --memory it knows tomorrow what it was told today.

    An empty line or the end of input ends it. The file is kept up to date
    after every reply, behind which stands (on standard error) what the memory
    is worth: the nats per token of your line with it, and with none.
    """
    console, aside = Console(), Console(stderr=True)
    with explained_errors(NotImplementedError), _writing(memory):
        sampling = Sampling(max_new_tokens, temperature, top_p)
        sampling.check()
        remembered = memory is not None and memory.exists()
        opened = _open(model, device, threads)
        conversation = begin_conversation(opened, memory, rate or (), allow_other_model=allow_other_model)
        compared = [] if memory is None else [conversation, begin_conversation(opened, None)]
        if stop is None:
            stop = "" if has_chat_template(opened.tokenizer) else "\n"
        sampling = sampling._replace(stop=stop.replace(r"\n", "\n") or None)
        _seed(seed)
        if sys.stdin.isatty():
            kept = "" if memory is None else f"; {memory} {'goes on' if remembered else 'begins'}"
            console.print(f"[dim]an empty line ends it{kept}[/]", highlight=False, soft_wrap=True)
        with contextlib.suppress(KeyboardInterrupt):  # what was said up to the last reply is kept
            for line in _lines():
                losses = [each.loss(f"{line}\n") for each in compared]
                conversation.reply(line, sampling, _show, message=True)
                typer.echo()
                conversation.save()
                if losses:
                    here, there = (f"{nats / max(count, 1):.2f}" for nats, count in losses)
                    aside.print(
                        f"[dim]  your line: {here} nats a token with the memory, {there} without[/]",
                        highlight=False,
                    )


@app.command()
def learn(
    model: Model,
    documents: Annotated[list[Path], typer.Argument(help="Text files (UTF-8), or folders of them.")],
    memory: Annotated[Path, typer.Option(help="File of what the model remembers; made or continued.")],
    rate: Rates = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"What was learned in {', '.join(DTYPES)}.", **_SMALLER)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="The change of each matrix as two factors of this rank.", **_SMALLER)
    ] = None,
    allow_other_model: OtherModel = False,
    device: Device = "auto",
    threads: Threads = 1,
) -> None:
    """Read documents into a memory file, and say what it is worth.

    In nats per token: of the documents with the memory as it was, as they
    were read (each token predicted before anything was learned from it), and
    read again; and of other text, which should not get much worse. A file
    that was made smaller stays so, until other options are given.
    """
    console = Console()
    with explained_errors(NotImplementedError), _writing(memory):
        texts = [document.text for path in documents for document in read_documents(path) if document.text]
        if not texts:
            raise ValueError("documents: all of them are empty; give some text")
        opened = _open(model, device, threads)
        conversation = begin_conversation(opened, memory, rate or (), allow_other_model=allow_other_model)
        smaller = {"--dtype bf16": _smaller("bf16", None), "--rank 8": _smaller(None, 8)}
        if dtype is not None or rank is not None:
            conversation.keep, smaller = _smaller(dtype, rank), {}
        name, other = other_text(opened)
        sizes = [f"{option}: {_mib(conversation.num_bytes(keep))}" for option, keep in smaller.items()]
        _print(
            console,
            f"{memory} will take about {_mib(conversation.num_bytes())}"
            + (f" ({', '.join(sizes)})" if sizes else ""),
        )
        if conversation.num_bytes() > shutil.disk_usage(memory.absolute().parent).free:
            raise ValueError(f"memory: the disk has no room for it; free some, or name another than {memory}")
        other_before = conversation.loss(other)
        began = time.monotonic()
        try:
            found = conversation.learn(texts, console)
        except KeyboardInterrupt:
            conversation.save()
            fail(f"stopped; {memory} has what was learned so far")
        seconds = time.monotonic() - began
        conversation.save()
        other_after = conversation.loss(other)
        count = f"{found.documents:,} document{'s' * (found.documents != 1)}"
        _print(console, f"{count}, {found.tokens:,} tokens, {seconds:,.0f} s")
        table = Table("nats per token", "before", "as read", "after", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_row("the documents", *(f"{x:.3f}" for x in (found.before, found.read, found.after)))
        losses = [f"{nats / max(count, 1):.3f}" for nats, count in (other_before, other_after)]
        table.add_row(name, losses[0], "–", losses[1])
        console.print(table)
        if not found.steps:
            why = "too short a text for a single step" if rate is None or any(rate) else "at a rate of 0"
            _print(console, f"nothing was learned: {why}; it was only read")
        _print(console, f"{memory}: {_mib(memory.stat().st_size)}")


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="Folder of a Llama, Qwen2, Qwen3, GPT-NeoX or GPT-2 model.")],
    output: Annotated[Path, typer.Argument(help="New folder for the converted model.")],
    level: Annotated[
        list[str] | None,
        typer.Option(
            help="FRACTION:CHUNK, the share of every MLP's units that learns every CHUNK tokens, fast to "
            "slow, one option each. Without any: 0.25:32 and 0.75:2048."
        ),
    ] = None,
    attention: Annotated[
        list[int] | None,
        typer.Option(help="Layer whose attention becomes a memory; the model is then to be trained on."),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Of these memories: self_modifying_titans or delta_memory.")
    ] = "self_modifying_titans",
) -> None:
    """Make the MLPs of a pre-trained transformer learn while it reads; its outputs stay the same."""
    with explained_errors(TypeError):
        if output.exists():
            raise ValueError(f"output: {output} exists; choose another folder")
        opened = open_model(model)
        levels = [_level(text) for text in level or ("0.25:32", "0.75:2048")]
        converted = convert_mlp_to_continuum(opened.model, levels)
        if attention:
            converted = convert_attention(converted, attention, kind)
        _save(output, converted, opened.tokenizer)
    typer.echo(f"{output}: {len(levels)} levels; teach it with: nl learn {output} FILES --memory FILE")


@app.command()
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="New folder for the model.")],
    memory: Annotated[Path | None, typer.Option(help="What was learned goes into the weights.")] = None,
    allow_other_model: OtherModel = False,
) -> None:
    """Write a model folder that transformers opens, with what a memory has learned in its weights."""
    with explained_errors(TypeError):
        if output.exists():
            raise ValueError(f"output: {output} exists; choose another folder")
        if memory is not None and not memory.exists():
            raise ValueError(f"memory: no such file: {memory}")
        opened = open_model(model)
        if memory is not None:
            begin_conversation(opened, memory, allow_other_model=allow_other_model).end()
        _save(output, opened.model, opened.tokenizer)
    typer.echo(f"{output}: opens with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)")


@app.command()
def doctor(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda where torch sees it.")
    ] = None,
) -> None:
    """Show what this machine runs, by which implementation, and whether every op is right on it."""
    raise typer.Exit(doctor_command.main([] if device is None else ["--device", device]))


def _writing(memory: Path | None) -> contextlib.AbstractContextManager[None]:
    """What is done with a memory that is kept up to date, which no other process may do meanwhile."""
    return contextlib.nullcontext() if memory is None else only_writer(memory)


def _save(output: Path, model: PreTrainedModel, tokenizer: AnyTokenizer) -> None:
    with new_directory(output) as folder, without_progress_bars():
        model.save_pretrained(folder)
        for_transformers(tokenizer).save_pretrained(folder)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _smaller(dtype: str | None, rank: int | None) -> FileOptions:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    keep = FileOptions(None if dtype is None else DTYPES[dtype], rank, momenta=False, chunks=False)
    keep.check()
    return keep


def _seed(seed: int | None) -> None:
    if seed is None:
        return
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    torch.manual_seed(seed)


def _lines() -> Iterator[str]:
    """What is typed, up to an empty line."""
    shown = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if shown else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def _level(text: str) -> dict[str, object]:
    fraction, _, chunk = text.partition(":")
    try:
        return {"fraction": float(fraction), "chunk_size": int(chunk)}
    except ValueError:
        raise ValueError(f"level: expected FRACTION:CHUNK such as 0.25:32, got {text!r}") from None


if __name__ == "__main__":
    app()
