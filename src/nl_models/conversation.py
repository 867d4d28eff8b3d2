"""A conversation with a model whose memory is a file: it knows tomorrow what it was told today."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import StoppingCriteria, StoppingCriteriaList

from nl_kernels.checks import check_positive_int
from nl_models.continual import ContinuumLearner, StepRule
from nl_models.continual.memory_file import read as read_memory_file
from nl_models.evaluation.token_losses import token_losses
from nl_models.hope import HopeCache, HopeForCausalLM
from nl_models.open_model import OpenedModel
from nl_models.surgery.modules import ContinuumCausalLM

_PIECE = 512  # tokens that are read at once


class Sampling(NamedTuple):
    """How a reply is written: ``temperature`` 0 is greedy; ``stop`` ends it where it has been written."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    stop: str | None = None

    def check(self) -> None:
        """Raise ``ValueError`` for what cannot be."""
        check_positive_int("max_new_tokens", self.max_new_tokens)
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")


class Learned(NamedTuple):
    """What came of reading documents: nats a token as they were read, and when they are read again."""

    documents: int
    tokens: int
    before: float
    after: float


class Conversation(Protocol):
    """A model, what it remembers, and the file that keeps it."""

    def learn(self, documents: Sequence[str], console: Console) -> Learned:
        """Read documents and remember them."""

    def reply(self, text: str, sampling: Sampling, write: Callable[[str], None]) -> str:
        """What the model says to a text; ``write`` gets each piece as it comes."""

    def num_bytes(self) -> int:
        """What the file will take, but for names, and for what grows with the text: its context."""

    def save(self) -> None:
        """Keep the memory in its file, whole or not at all."""


def begin_conversation(
    opened: OpenedModel, memory: str | os.PathLike | None, rates: Sequence[float] = ()
) -> Conversation:
    """A conversation that goes on from the file ``memory``, if there is one already.

    Args:
        rates: of a converted model, one for each of its levels; see ``DEFAULT_RATES``.

    Raises:
        ValueError: a file of another model, or a model that has no memory to keep in one.
    """
    memory = None if memory is None else Path(memory)
    if memory is not None and not memory.absolute().parent.is_dir():
        raise ValueError(f"memory: {memory} has no folder to lie in; make it first")
    if isinstance(opened.model, HopeForCausalLM):
        if rates:
            raise ValueError(
                "rates: a Hope makes the rates of its memories itself; they are of converted models"
            )
        return HopeConversation(opened, memory)
    if isinstance(opened.model, ContinuumCausalLM) and opened.model.config.level_units():
        return LearnerConversation(opened, memory, rates)
    if memory is not None:
        raise ValueError(
            f"memory: {type(opened.model).__name__} has no memory to keep in a file; convert it first: "
            "nl convert FOLDER NEW_FOLDER"
        )
    return PlainConversation(opened)


class HopeConversation:
    """With a Hope, whose memories learn whatever they read: the file is its cache, of one size for ever."""

    def __init__(self, opened: OpenedModel, memory: Path | None):
        self.model, self.tokenizer, _ = opened
        self.memory = memory
        self.cache = HopeCache(self.model.config)
        if memory is not None and memory.exists():
            self.cache = HopeCache.load(memory, self.model.config, self.model.device)

    def learn(self, documents: Sequence[str], console: Console) -> Learned:
        ids = [[*self.tokenizer.encode(text), self.tokenizer.separator_id] for text in documents]
        total = sum(map(len, ids))
        with _progress(console) as bar:
            task = bar.add_task("reading", total=total, note="")
            before = self._read(ids, lambda n: bar.update(task, advance=n))
            task = bar.add_task("again", total=total, note="")
            remembered, self.cache = self.cache, copy.deepcopy(self.cache)
            after = self._read(ids, lambda n: bar.update(task, advance=n))
            self.cache = remembered
        return Learned(len(documents), total, before, after)

    @torch.no_grad()
    def _read(self, documents: list[list[int]], advance: Callable[[int], None]) -> float:
        """Nats a token of all documents, read one after another into the cache."""
        losses, count = 0.0, 0
        for document in documents:
            rows = torch.tensor([[*self._unread(), *document]])
            for start in range(0, rows.shape[1] - 1, _PIECE):
                piece = rows[:, start : start + _PIECE + 1]
                found = token_losses(self.model, piece, self.cache)
                losses, count = losses + float(found.double().sum()), count + found.numel()
                advance(found.numel())
            last = rows[:, -1:].to(self.model.device)
            self.cache.layers[0].unread = (last, torch.ones_like(last))
        return losses / max(count, 1)

    def _unread(self) -> list[int]:
        """What comes before the next token: the last one that was written, or the beginning of a text."""
        layer = self.cache.layers[0]
        if layer.unread is not None:
            return layer.unread[0][0].tolist()
        return [] if layer.seen else [self.tokenizer.separator_id]

    def reply(self, text: str, sampling: Sampling, write: Callable[[str], None]) -> str:
        begun = self.cache.get_seq_length() > 0
        ids = [*([] if begun else self._unread()), *self.tokenizer.encode(text)]
        return _generate(
            self.model,
            ids,
            self.tokenizer,
            sampling,
            write,
            cache=self.cache,
            new_tokens_only=begun,
        )

    @torch.no_grad()
    def num_bytes(self) -> int:
        return HopeCache.initial(self.model).num_bytes()

    def save(self) -> None:
        if self.memory is not None:
            self.cache.save(self.memory)


DEFAULT_RATES = (1e-2, 6e-4)
"""Of the fastest level, by plain steps, and of the slower ones, by Muon; see docs/continual_learning.md."""


class LearnerConversation:
    """With a converted model, whose levels learn what they are told by its own loss."""

    def __init__(self, opened: OpenedModel, memory: Path | None, rates: Sequence[float]):
        self.model, self.tokenizer, _ = opened
        self.memory = memory
        count = len(self.model.config.level_units())
        rates = list(rates) or [DEFAULT_RATES[0], *[DEFAULT_RATES[1]] * (count - 1)]
        if len(rates) != count:
            raise ValueError(f"rates: expected one for each of {count} levels, got {len(rates)}")
        rules = [StepRule(rate=rates[0])]
        rules += [StepRule(rule="muon", rate=rate, momentum_decay=0.0) for rate in rates[1:]]
        nested = count > 1
        if memory is not None and memory.exists():
            saved = read_memory_file(memory)["header"]["options"]
            nested, kinds = saved["nested"], saved["rules"]
            if len(kinds) == count:
                rules = [
                    StepRule(rate=rate, **{k: v for k, v in kind.items() if v is not None})
                    for rate, kind in zip(rates, kinds)
                ]
        self.learner = ContinuumLearner(self.model, rules, nested=nested, tokenizer=self.tokenizer)
        if memory is not None and memory.exists():
            self.learner.load(memory)
        self.said: list[int] = []

    def learn(self, documents: Sequence[str], console: Console) -> Learned:
        report = self.learner.learn(list(documents), progress=console.is_terminal)
        lengths = [len(self.tokenizer.encode(text)) for text in documents]
        again = [float(self.learner.loss(text)) * n for text, n in zip(documents, lengths) if n > 1]
        total = sum(n for n in lengths if n > 1)
        return Learned(len(documents), sum(report.tokens), float(report.loss), sum(again) / max(total, 1))

    def reply(self, text: str, sampling: Sampling, write: Callable[[str], None]) -> str:
        told = self.tokenizer.encode(text)
        self.said += told
        limit = self.learner.context_length
        if limit is not None:
            self.said = self.said[-max(1, limit - sampling.max_new_tokens) :]
        reply = _generate(self.learner, self.said, self.tokenizer, sampling, write)
        self.said += self.tokenizer.encode(reply)
        if self.memory is not None:
            self.learner.learn(text)
        return reply

    def num_bytes(self) -> int:
        return self.learner.num_bytes()

    def save(self) -> None:
        if self.memory is not None:
            self.learner.save(self.memory)


class PlainConversation:
    """With any other model: what was said is read again with every turn."""

    def __init__(self, opened: OpenedModel):
        self.model, self.tokenizer, _ = opened
        self.said: list[int] = []

    def learn(self, documents: Sequence[str], console: Console) -> Learned:
        raise ValueError("memory: this model cannot learn; convert it first: nl convert FOLDER NEW_FOLDER")

    def reply(self, text: str, sampling: Sampling, write: Callable[[str], None]) -> str:
        self.said += self.tokenizer.encode(text)
        reply = _generate(self.model, self.said, self.tokenizer, sampling, write)
        self.said += self.tokenizer.encode(reply)
        return reply

    def num_bytes(self) -> int:
        return 0

    def save(self) -> None:
        pass


class _Written(StoppingCriteria):
    """Hands on what is written, and stops behind ``stop``."""

    def __init__(self, tokenizer, stop: str | None, write: Callable[[str], None]):
        self.tokenizer, self.stop, self.write = tokenizer, stop, write
        self.prompt, self.shown = None, ""

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if self.prompt is None:  # the first call comes behind the first token written
            self.prompt = input_ids.shape[1] - 1
        whole = self.tokenizer.decode(input_ids[0, self.prompt :].tolist())
        text = _until(whole, self.stop)
        done = text != whole
        if not text.endswith("\ufffd"):  # a character of which only some bytes are there
            self.write(text[len(self.shown) :])
            self.shown = text
        return torch.full((len(input_ids),), done, device=input_ids.device)


def _generate(model, ids: list[int], tokenizer, sampling: Sampling, write, **options) -> str:
    """What ``model`` writes after ``ids``."""
    sampling.check()
    if not ids:
        raise ValueError("text: expected at least one character")
    prompt = torch.tensor([ids])
    if hasattr(model, "device"):
        prompt = prompt.to(model.device)
    written = _Written(tokenizer, sampling.stop, write)
    chosen = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    found = model.generate(
        prompt,
        max_new_tokens=sampling.max_new_tokens,
        stopping_criteria=StoppingCriteriaList([written]),
        **chosen,
        **options,
    )
    text = tokenizer.decode(found[0, len(ids) :].tolist())
    return _until(text, sampling.stop)


def _until(text: str, stop: str | None) -> str:
    """What comes before ``stop``; a reply may begin with white space."""
    start = len(text) - len(text.lstrip())
    place = -1 if stop is None else text.find(stop, start)
    return text if place < 0 or start == len(text) else text[:place]


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
