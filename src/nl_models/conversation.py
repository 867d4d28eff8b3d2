"""A conversation with a model whose memory is a file: it knows tomorrow what it was told today."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import safetensors
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nl_models.console import Display
from nl_models.continual import ContinuumLearner, StepRule, memory_file
from nl_models.continual.memory_file import FileOptions
from nl_models.continual.stream import token_losses as losses_of_logits
from nl_models.data.corpus import read_topics
from nl_models.data.prepare import data_folder
from nl_models.data.tokenizer import AnyTokenizer, ReadyTokenizer
from nl_models.evaluation.token_losses import token_losses
from nl_models.hope import HopeCache, HopeForCausalLM
from nl_models.module_views import weights_digest
from nl_models.open_model import OpenedModel
from nl_models.replies import Sampling, message_ids, text_ids, written_after
from nl_models.surgery.modules import ContinuumCausalLM

_PIECE = 512  # tokens that are read at once


class Learned(NamedTuple):
    """What came of reading documents, in nats a token.

    Attributes:
        documents, tokens: how many.
        steps: of the levels, all together.
        before: with the memory as it was.
        read: as they were read, each token predicted before anything was learned from it.
        after: read again, with all that was learned.
    """

    documents: int
    tokens: int
    steps: int
    before: float
    read: float
    after: float


class Conversation(Protocol):
    """A model, what it remembers, and the file that keeps it."""

    tokenizer: AnyTokenizer
    keep: FileOptions

    def learn(self, documents: Sequence[str], console: Console) -> Learned:
        """Read documents and remember them."""

    def loss(self, text: str) -> tuple[float, int]:
        """Nats of a new text, summed, and of how many tokens; nothing is remembered of it."""

    def reply(
        self, text: str, sampling: Sampling, write: Callable[[str], None], *, message: bool = False
    ) -> str:
        """What the model says to a text; ``write`` gets each piece as it comes.

        ``message``: the text is what a person says, read as :func:`nl_models.replies.message_ids` has it.
        """

    def num_bytes(self, keep: FileOptions | None = None) -> int:
        """What the file will take, but for names, and for what grows with the text: its context.

        ``keep``: by these options instead of the conversation's own.
        """

    def save(self) -> None:
        """Keep the memory in its file, whole or not at all."""

    def end(self) -> tuple[PreTrainedModel, HopeCache | None]:
        """The model, in whose weights all that was learned then lies for good, and the state it has come to.

        The state is ready for the next text; ``None``: the model keeps none.
        """


def begin_conversation(
    opened: OpenedModel,
    memory: str | os.PathLike | None,
    rates: Sequence[float] = (),
    keep: FileOptions | None = None,
    *,
    allow_other_model: bool = False,
) -> Conversation:
    """A conversation that goes on from the file ``memory``, if there is one already.

    Args:
        rates: one for each level that learns; see ``DEFAULT_RATES`` and ``HOPE_RATE``.
        keep: how the file is written; ``None``: as it was, and whole in a new one.
        allow_other_model: also a file that was made with other weights of such a model.

    Raises:
        ValueError: a file of another model, or a model that has no memory to keep in one.
    """
    memory = None if memory is None else Path(memory)
    if memory is not None and not memory.absolute().parent.is_dir():
        raise ValueError(f"memory: {memory} has no folder to lie in; make it first")
    if memory is not None and memory.exists() and not memory.is_file():
        raise ValueError(f"memory: {memory} is no file; name one, which is made if it is not there")
    if isinstance(opened.model, HopeForCausalLM):
        return HopeConversation(opened, memory, rates, keep, allow_other_model)
    if isinstance(opened.model, ContinuumCausalLM) and opened.model.config.level_units():
        return LearnerConversation(opened, memory, rates, keep, allow_other_model)
    if memory is not None:
        raise ValueError(
            f"memory: {type(opened.model).__name__} has no memory to keep in a file; convert it first: "
            "nl convert FOLDER NEW_FOLDER"
        )
    return PlainConversation(opened)


_OTHER_TOKENS = 4096


def other_text(opened: OpenedModel) -> tuple[str, str]:
    """Text that is not to get worse by what is learned, behind its name.

    Of a training run its held-out text; else what comes with Python, the topics of its language reference.
    """
    folder = data_folder(opened.source.parent if opened.source.name == "model" else opened.source)
    if folder is not None and (folder / "validation.npy").is_file():
        ids = np.load(folder / "validation.npy", mmap_mode="r")[:_OTHER_TOKENS]
        return "held-out text of its training", opened.tokenizer.decode(ids.tolist())
    topics = "\n".join(topic.text for topic in read_topics())
    ids = opened.tokenizer.encode(topics[: 8 * _OTHER_TOKENS])[:_OTHER_TOKENS]
    return "prose of Python's manual", opened.tokenizer.decode(ids)


HOPE_RATE = 1e-3
"""Of the weights that a Hope's levels start from; see docs/conversation.md."""


class HopeConversation:
    """With a Hope, whose memories learn whatever they read, and whose weights learn what it is taught.

    The file is its cache, of one size for ever. Once :meth:`learn` has moved the weights that its continuum
    starts from, these changes come to it.
    """

    def __init__(
        self,
        opened: OpenedModel,
        memory: Path | None,
        rates: Sequence[float],
        keep: FileOptions | None,
        allow_other_model: bool,
    ):
        self.model, self.tokenizer, _ = opened
        if isinstance(self.tokenizer, PreTrainedTokenizerBase):
            self.tokenizer = ReadyTokenizer(self.tokenizer)  # texts begin and end with its end-of-text token
        self.memory, self.keep = memory, keep or FileOptions()
        self.weights = None if memory is None else weights_digest(self.model)
        self.cache = HopeCache(self.model.config)
        count = len(ContinuumLearner(self.model, StepRule(rate=0.0)).chunk_sizes)
        rates = list(rates) or [HOPE_RATE] * count
        _check_rates(rates, count)
        self.learner = ContinuumLearner(
            self.model,
            [StepRule(rule="muon", rate=rate, momentum_decay=0.0) for rate in rates],
            tokenizer=self.tokenizer,
        )
        if memory is not None and memory.exists():
            self._load(memory, keep, allow_other_model)

    def _load(self, memory: Path, keep: FileOptions | None, allow_other_model: bool) -> None:
        if not _is_learned(memory):
            weights = None if allow_other_model else self.weights
            try:
                self.cache = HopeCache.load(memory, self.model.config, self.model.device, weights=weights)
            except ValueError as error:
                told = str(error).removeprefix("path: ")
                raise ValueError(f"memory: {told}; name another file for a new memory") from error
            return
        packed = memory_file.read(memory)
        self.learner.load_state_dict(packed, source=str(memory), allow_other_model=allow_other_model)
        if keep is None:
            self.keep = FileOptions.of_file(packed["header"])
        said = packed["header"].get(memory_file.CONVERSATION)
        if said is not None and packed["header"]["config"] == self.weights:  # not what another model has read
            prefix = f"{memory_file.CONVERSATION}/"
            self.cache.rebuild(said, lambda name: packed["tensors"][prefix + name].to(self.model.device))

    def _reader(self) -> nn.Module:
        """The model with what was learned."""
        return self.learner.parameters.view(self.learner.state.changes)

    def learn(self, documents: Sequence[str], console: Console) -> Learned:
        ids = [[*self.tokenizer.encode(text), self.tokenizer.separator_id] for text in documents]
        total = sum(map(len, ids))
        with Display(console, total=total, label="before") as display:
            before, _ = self._read(ids, copy.deepcopy(self.cache), display.advance)
        parameters, state = self.learner.parameters, self.learner.state
        rows = [torch.tensor([self.tokenizer.separator_id, *document]) for document in ids]
        try:
            report = self.learner.learn(rows, progress=not console.quiet)
        finally:  # stopped by Ctrl-C: what was learned so far holds in the conversation, too
            with torch.no_grad():
                parameters.move_levels(self.cache, parameters.weights(state.changes), -1)
                parameters.move_levels(self.cache, parameters.weights(self.learner.state.changes), 1)
        after = 0.0
        with Display(console, total=total, label="again") as display:
            for document in ids:  # whole or not at all, should Ctrl-C stop it
                cache = self.cache.copy()
                nats, _ = self._read([document], cache, display.advance)
                after, self.cache = after + nats, cache
        steps = sum(report.steps)
        return Learned(len(documents), total, steps, before / total, float(report.loss), after / total)

    def loss(self, text: str) -> tuple[float, int]:
        ids = [*self.tokenizer.encode(text), self.tokenizer.separator_id]
        return self._read([ids], copy.deepcopy(self.cache), lambda n: None)

    @torch.no_grad()
    def _read(
        self, documents: list[list[int]], cache: HopeCache, advance: Callable[[int], None]
    ) -> tuple[float, int]:
        """Nats of all documents, read one after another into the cache, and of how many tokens."""
        model, losses, count = self._reader(), 0.0, 0
        for document in documents:
            rows = torch.tensor([[*self._unread(cache), *document]])
            for start in range(0, rows.shape[1] - 1, _PIECE):
                piece = rows[:, start : start + _PIECE + 1]
                found = token_losses(model, piece, cache)
                losses, count = losses + float(found.double().sum()), count + found.numel()
                advance(found.numel())
            last = rows[:, -1:].to(self.model.device)
            cache.layers[0].unread = (last, torch.ones_like(last))
        return losses, count

    def _unread(self, cache: HopeCache) -> list[int]:
        """What comes before the next token: the last one that was written, or the beginning of a text."""
        layer = cache.layers[0]
        if layer.unread is not None:
            return layer.unread[0][0].tolist()
        return [] if layer.seen else [self.tokenizer.separator_id]

    def reply(
        self, text: str, sampling: Sampling, write: Callable[[str], None], *, message: bool = False
    ) -> str:
        begun, unread = self.cache.get_seq_length() > 0, self._unread(self.cache)
        ids = (message_ids if message else text_ids)(self.tokenizer, text, begun=begun)
        if not begun:
            ids = [*unread, *ids]
        elif ids[:1] == unread and message:  # the end of a reply, which the model has written itself
            ids = ids[1:]
        return written_after(
            self._reader(),
            ids,
            self.tokenizer,
            sampling,
            write,
            cache=self.cache,
            new_tokens_only=begun,
        )

    @torch.no_grad()
    def num_bytes(self, keep: FileOptions | None = None) -> int:
        keep = _without_rest(keep or self.keep)
        return HopeCache.initial(self.model).num_bytes() + self.learner.num_bytes(**keep._asdict())

    def save(self) -> None:
        if self.memory is None:
            return
        if not any(change.any() for change in self.learner.state.changes.values()):
            self.cache.save(self.memory, weights=self.weights)
            return
        packed = self.learner.state_dict(**_without_rest(self.keep)._asdict())
        tensors: dict[str, torch.Tensor] = {}
        packed["header"][memory_file.CONVERSATION] = self.cache.describe(tensors)
        for name, tensor in tensors.items():
            packed["tensors"][f"{memory_file.CONVERSATION}/{name}"] = tensor.detach().cpu().contiguous()
        memory_file.write(self.memory, packed)

    @torch.no_grad()
    def end(self) -> tuple[PreTrainedModel, HopeCache | None]:
        self.learner.merge_into_model()
        cache, unread = self.cache.copy(), self._unread(self.cache)
        if unread:
            self.model(torch.tensor([unread], device=self.model.device), cache=cache)
        return self.model, cache


def _without_rest(keep: FileOptions | None) -> FileOptions:
    """A Hope's next text begins a new context, and of a chunk that is not full it keeps the reading alone."""
    return (keep or FileOptions())._replace(momenta=False, chunks=False)


def _is_learned(path: Path) -> bool:
    """Whether a file was written by a learner; what is no file of safetensors is not."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return "header" in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def _check_rates(rates: Sequence[float], count: int) -> None:
    if len(rates) != count:
        raise ValueError(f"rates: expected one for each of {count} levels, got {len(rates)}")


DEFAULT_RATES = (1e-2, 6e-4)
"""Of the fastest level, by plain steps, and of the slower ones, by Muon; see docs/continual_learning.md."""


class LearnerConversation:
    """With a converted model, whose levels learn what they are told by its own loss."""

    def __init__(
        self,
        opened: OpenedModel,
        memory: Path | None,
        rates: Sequence[float],
        keep: FileOptions | None,
        allow_other_model: bool,
    ):
        self.model, self.tokenizer, _ = opened
        self.memory, self.keep = memory, keep or FileOptions()
        count = len(self.model.config.level_units())
        rates = list(rates) or [DEFAULT_RATES[0], *[DEFAULT_RATES[1]] * (count - 1)]
        _check_rates(rates, count)
        rules = [StepRule(rate=rates[0])]
        rules += [StepRule(rule="muon", rate=rate, momentum_decay=0.0) for rate in rates[1:]]
        nested = count > 1
        if memory is not None and memory.exists():
            header = memory_file.read(memory)["header"]
            nested, kinds = header["options"]["nested"], header["options"]["rules"]
            self.keep = keep or FileOptions.of_file(header)
            if len(kinds) == count:
                rules = [
                    StepRule(rate=rate, **{k: v for k, v in kind.items() if v is not None})
                    for rate, kind in zip(rates, kinds)
                ]
        self.learner = ContinuumLearner(self.model, rules, nested=nested, tokenizer=self.tokenizer)
        if memory is not None and memory.exists():
            self.learner.load(memory, allow_other_model=allow_other_model)
        self.said: list[int] = []

    def learn(self, documents: Sequence[str], console: Console) -> Learned:
        before = _mean(map(self.loss, documents))
        report = self.learner.learn(list(documents), progress=not console.quiet)
        after = _mean(map(self.loss, documents))
        steps = sum(report.steps)
        return Learned(len(documents), sum(report.tokens), steps, before, float(report.loss), after)

    def loss(self, text: str) -> tuple[float, int]:
        count = len(self.tokenizer.encode(text)) - 1
        return (float(self.learner.loss(text)) * count, count) if count > 0 else (0.0, 0)

    def reply(
        self, text: str, sampling: Sampling, write: Callable[[str], None], *, message: bool = False
    ) -> str:
        told = (message_ids if message else text_ids)(self.tokenizer, text, begun=bool(self.said))
        self.said += told
        limit = self.learner.context_length
        if limit is not None:
            self.said = self.said[-max(1, limit - sampling.max_new_tokens) :]
        reply = written_after(self.learner, self.said, self.tokenizer, sampling, write)
        self.said += text_ids(self.tokenizer, reply, begun=True)
        if self.memory is not None:
            self.learner.learn(torch.tensor([told]))
        return reply

    def num_bytes(self, keep: FileOptions | None = None) -> int:
        return self.learner.num_bytes(**(keep or self.keep)._asdict())

    def save(self) -> None:
        if self.memory is not None:
            self.learner.save(self.memory, **self.keep._asdict())

    def end(self) -> tuple[PreTrainedModel, HopeCache | None]:
        self.learner.merge_into_model()
        return self.model, None


def _mean(losses: Iterable[tuple[float, int]]) -> float:
    """Nats a token of several texts."""
    nats, counts = zip(*losses)
    return sum(nats) / max(sum(counts), 1)


class PlainConversation:
    """With any other model: what was said is read again with every turn."""

    def __init__(self, opened: OpenedModel):
        self.model, self.tokenizer, _ = opened
        self.keep = FileOptions()
        self.said: list[int] = []

    def learn(self, documents: Sequence[str], console: Console) -> Learned:
        raise ValueError("memory: this model cannot learn; convert it first: nl convert FOLDER NEW_FOLDER")

    def reply(
        self, text: str, sampling: Sampling, write: Callable[[str], None], *, message: bool = False
    ) -> str:
        self.said += (message_ids if message else text_ids)(self.tokenizer, text, begun=bool(self.said))
        reply = written_after(self.model, self.said, self.tokenizer, sampling, write)
        self.said += text_ids(self.tokenizer, reply, begun=True)
        return reply

    @torch.no_grad()
    def loss(self, text: str) -> tuple[float, int]:
        ids = torch.tensor([self.tokenizer.encode(text)], device=self.model.device)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        window = getattr(self.model.config, "max_position_embeddings", None) or _PIECE
        pieces = zip(inputs.split(window, dim=1), targets.split(window, dim=1))
        return sum(float(losses_of_logits(self.model(x).logits, y).sum()) for x, y in pieces), targets.numel()

    def num_bytes(self, keep: FileOptions | None = None) -> int:
        return 0

    def save(self) -> None:
        pass

    def end(self) -> tuple[PreTrainedModel, HopeCache | None]:
        return self.model, None
