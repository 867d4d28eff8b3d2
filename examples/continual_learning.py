"""A small transformer that knows prose reads source code: what it learns, and what it forgets meanwhile.

A Llama of half a million parameters is trained on the prose that comes with every Python (the language
reference's topics, and docstrings). Then it reads streams of the standard library's source code, once, and
learns from them by its next-token loss: by online fine-tuning of its MLPs (SGD, AdamW, Muon), or as a
continuum memory system of one, two or three levels. Held-out text of both kinds says what came of it.

    python -m examples.continual_learning --output runs/continual     # minutes on one core
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from transformers import LlamaForCausalLM

from examples.continual_report import plot_exchange, plot_streams, report
from examples.prose_and_code import SMALL, Data, Sizes, prepare, train_on_prose
from nl_models.console import explained_errors
from nl_models.continual import ContinuumLearner, StepRule
from nl_models.files import make_folder, write_bytes
from nl_models.surgery import convert_mlp_to_continuum


@dataclass(frozen=True)
class Level:
    """One level of a reader: its share of every MLP, the tokens between its steps, its rule, its rates.

    ``rates`` are per token, one for each setting that is tried (of ``"adamw"``: learning rates).
    """

    fraction: float
    chunk_size: int
    rule: str
    rates: tuple[float, ...]
    momentum_decay: float = 0.0
    anchored: bool = False

    def step_rule(self, rates: torch.Tensor) -> StepRule:
        """The learner's rule, with a rate for each row."""
        options = {"momentum_decay": self.momentum_decay, "anchored": self.anchored}
        return StepRule(rule=self.rule, rate=rates, **options)


COMPARED = {
    "SGD": (Level(1.0, 32, "sgd", (1e-4, 3e-4, 1e-3, 3e-3)),),
    "AdamW": (Level(1.0, 32, "adamw", (3e-5, 1e-4, 3e-4, 1e-3)),),
    "CMS, 1 slow": (Level(1.0, 2048, "muon", (1e-4, 2e-4, 4e-4, 8e-4)),),
    "CMS, 1 fast": (
        Level(15 / 16, 32, "sgd", (3e-4, 1e-3, 3e-3, 5e-3)),
        Level(1 / 16, 2048, "sgd", (0.0, 0.0, 0.0, 0.0)),
    ),
    "CMS, 2 levels": (
        Level(1 / 4, 32, "sgd", (1e-2, 1e-2, 1e-2, 1e-2)),
        Level(3 / 4, 2048, "muon", (3e-4, 6e-4, 1e-3, 2e-3)),
    ),
    "CMS, 3 levels": (
        Level(1 / 4, 32, "sgd", (1e-2, 1e-2, 1e-2, 1e-2)),
        Level(3 / 8, 2048, "muon", (1e-3, 1e-3, 1e-3, 1e-3)),
        Level(3 / 8, 8192, "muon", (1e-3, 2e-3, 3e-3, 4e-3)),
    ),
}
"""Online fine-tuning is one level of everything. Of more levels, a step of one takes the faster ones back to
where they began (nested): what they learned serves its own context. All get the same number of settings."""

OTHERS = {
    # With a momentum of 0.9 a token's step is ten times its rate, in the end.
    "Muon": (Level(1.0, 32, "muon", (1e-5, 3e-5, 1e-4, 3e-4), momentum_decay=0.9),),
    "DGD": (Level(1.0, 32, "dgd", (1e-6, 1e-5, 1e-4, 1e-3)),),
    "DGD, anchored": (Level(1.0, 32, "dgd", (3e-4, 1e-3, 3e-3, 1e-2), anchored=True),),
    "DGD and Muon": (
        Level(1 / 4, 32, "dgd", (1e-2, 3e-2, 3e-2, 1e-1), anchored=True),
        Level(3 / 4, 2048, "muon", (6e-4, 6e-4, 1e-3, 1e-3)),
    ),
}
"""For ``--readers``; they take longer."""

READERS = {**COMPARED, **OTHERS}


class Reader:
    """Reads with every setting and every stream at once: rows, the streams of a setting side by side."""

    def __init__(self, model: LlamaForCausalLM, levels: Sequence[Level], streams: int):
        sizes = [{"fraction": level.fraction, "chunk_size": level.chunk_size} for level in levels]
        rates = [torch.tensor(level.rates).repeat_interleave(streams) for level in levels]
        self.learner = ContinuumLearner(
            convert_mlp_to_continuum(model, sizes),
            [level.step_rule(rate) for level, rate in zip(levels, rates)],
            nested=len(levels) > 1,
            batch_size=len(rates[0]),
        )

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read a text, ``tokens [B, T]``; nats per token ``[B]``, each before it was learned."""
        return self.learner.learn([tokens]).loss

    def held_out(self, windows: torch.Tensor) -> torch.Tensor:
        """Nats per token ``[B]`` with the weights as they stand."""
        rows = self.learner.batch_size
        return self.learner.loss(windows.repeat(rows, 1)).view(rows, -1).mean(1)

    def fork(self) -> Reader:
        """Another reader that has learned the same."""
        other = copy.copy(self)
        other.learner = self.learner.fork()
        return other


class AdamWReader(Reader):
    """AdamW on the MLPs: a step on the mean loss of every chunk, for every row apart."""

    def __init__(self, model: LlamaForCausalLM, levels: Sequence[Level], streams: int):
        (level,) = levels
        super().__init__(model, [dataclasses.replace(level, rule="sgd")], streams)
        self.chunk_size = level.chunk_size
        # One tensor for each setting, since an optimizer has a rate for each tensor.
        self.changes = {
            name: [part.clone().requires_grad_() for part in change.split(streams)]
            for name, change in self.learner.state.changes.items()
        }
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [parts[setting] for parts in self.changes.values()], "lr": rate}
                for setting, rate in enumerate(level.rates)
            ],
            weight_decay=0.0,
        )

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        parameters, losses = self.learner.parameters, []
        for window in range(0, tokens.shape[1] - 1, self.learner.context_length):
            context = None
            end = min(window + self.learner.context_length, tokens.shape[1] - 1)
            for start in range(window, end, self.chunk_size):
                stop = min(start + self.chunk_size, end)
                changes = {name: torch.cat(parts) for name, parts in self.changes.items()}
                output = parameters.run(changes, tokens[:, start:stop], context)
                targets = tokens[:, start + 1 : stop + 1]
                loss = F.cross_entropy(output.logits.mT, targets, reduction="none")
                self.optimizer.zero_grad()
                loss.mean(1).sum().backward()
                self.optimizer.step()
                context = parameters.detach(output.context)
                losses.append(loss.detach())
        changes = {name: torch.cat(parts).detach() for name, parts in self.changes.items()}
        self.learner.state = dataclasses.replace(self.learner.state, changes=changes)
        return torch.cat(losses, dim=1).mean(1)

    def fork(self) -> Reader:
        return copy.deepcopy(self)


def read_everything(model: LlamaForCausalLM, name: str, data: Data, sizes: Sizes) -> list[dict]:
    """Records of one reader, one for each setting and stream; losses in nats per token.

    ``tokens``, ``prose`` and ``code`` are along the stream: held-out text with the weights as they stand.
    ``middle_prose`` and ``middle_code``: the same where the levels stand in the middle of their chunks.
    ``as_read``: the stream itself, every token before it was learned. ``next_prose``, ``next_code``: held-out
    text read after the stream, learning goes on; ``returned_code``: more code after that prose.
    """
    levels, begin = READERS[name], time.perf_counter()
    reader = (AdamWReader if levels[0].rule == "adamw" else Reader)(model, levels, sizes.streams)
    settings = list(zip(*(level.rates for level in levels), strict=True))
    streams = data.streams.repeat(len(settings), 1)

    def same(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.expand(len(streams), -1)

    tokens: list[int] = []
    prose: list[torch.Tensor] = []
    code: list[torch.Tensor] = []

    def look(read: int) -> None:
        tokens.append(read)
        prose.append(reader.held_out(data.held_out["prose"]))
        code.append(reader.held_out(data.held_out["code"]))

    look(0)
    as_read = torch.zeros(len(streams))
    part = sizes.stream_tokens // sizes.evaluations
    for start in track(range(0, part * sizes.evaluations, part), description=name):
        as_read += reader.read(streams[:, start : start + part + 1]) / sizes.evaluations
        look(start + part)
    middle, back = reader.fork(), reader.fork()
    middle.read(streams[:, sizes.stream_tokens :])
    measured = {
        "as_read": as_read,
        "middle_prose": middle.held_out(data.held_out["prose"]),
        "middle_code": middle.held_out(data.held_out["code"]),
        "next_code": reader.fork().read(same(data.read_on["code"])),
        "next_prose": back.read(same(data.read_on["prose"])),
        "returned_code": back.read(same(data.read_on["code"])),
    }
    seconds = time.perf_counter() - begin
    return [
        {
            "reader": name,
            "rates": list(settings[row // sizes.streams]),
            "stream": row % sizes.streams,
            "tokens": tokens,
            "prose": [float(loss[row]) for loss in prose],
            "code": [float(loss[row]) for loss in code],
            **{key: float(loss[row]) for key, loss in measured.items()},
            "seconds_of_all": round(seconds, 1),
        }
        for row in range(len(streams))
    ]


def read_frozen(model: LlamaForCausalLM, data: Data, sizes: Sizes) -> list[dict]:
    """The records of the model as it is."""
    reader = Reader(model, [Level(1.0, 32, "sgd", (0.0,))], sizes.streams)
    as_read = reader.read(data.streams[:, : sizes.stream_tokens + 1])
    prose, code = (float(reader.held_out(data.held_out[kind])[0]) for kind in ("prose", "code"))
    read_on = {kind: reader.read(text.expand(sizes.streams, -1)) for kind, text in data.read_on.items()}
    return [
        {
            "reader": "frozen",
            "rates": [],
            "stream": row,
            "tokens": [0, sizes.stream_tokens],
            "prose": [prose] * 2,
            "code": [code] * 2,
            "as_read": float(as_read[row]),
            "middle_prose": prose,
            "middle_code": code,
            "next_code": float(read_on["code"][row]),
            "next_prose": float(read_on["prose"][row]),
            "returned_code": float(read_on["code"][row]),
        }
        for row in range(sizes.streams)
    ]


@explained_errors()
def main(
    output: Annotated[Path, typer.Option(help="Folder for results and plots.")] = Path("runs/continual"),
    readers: Annotated[
        str, typer.Option(help=f"Separated by semicolons, out of: {'; '.join(READERS)}.")
    ] = "; ".join(COMPARED),
    streams: Annotated[int, typer.Option(help="Orders in which the files are read.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Of the model, its training, and the streams' files.")] = 0,
    small: Annotated[bool, typer.Option(help="Sizes of a smoke test: seconds, and no result.")] = False,
) -> None:
    """Train a small Llama on prose, let it read source code, and compare what it learns and forgets."""
    chosen = [name.strip() for name in readers.split(";")]
    for name in chosen:
        if name not in READERS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(READERS)}", param_hint="--readers")
    torch.set_num_threads(1)
    console = Console()
    sizes = dataclasses.replace(SMALL if small else Sizes(), streams=streams)
    make_folder(output)
    data = prepare(sizes, seed, console)
    model = train_on_prose(data, sizes, seed)
    records = read_frozen(model, data, sizes)
    for name in chosen:
        records += read_everything(model, name, data, sizes)
        # After every reader: what is there is kept, whatever stops the next.
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_bytes(output / "results.jsonl", lines.encode())
    show(records, output, console)


def show(records: list[dict], output: Path, console: Console) -> None:
    """Tables on the terminal and plots in the folder."""
    report(records, console)
    plot_exchange(records, output / "continual-learning.png")
    plot_streams(records, output / "continual-learning-streams.png")
    console.print(f"[dim]{output}: results.jsonl and two plots[/dim]")


if __name__ == "__main__":
    typer.run(main)
