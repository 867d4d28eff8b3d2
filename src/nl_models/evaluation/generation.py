"""Is what a model writes as good at the end as at the start? Long texts and conversations, judged by itself.

The judge is the same model with a fresh state: it has never read more than it was trained for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console

from nl_kernels.checks import check_positive_int
from nl_models.console import Display
from nl_models.evaluation.position import bucket_edges, standard_error
from nl_models.evaluation.token_losses import check_model, check_tokens, token_losses
from nl_models.hope import HopeCache, HopeForCausalLM
from nl_models.module_views import in_evaluation, input_device

_N = 4  # of the n-grams


@dataclass(frozen=True)
class GenerationBucket:
    """Means over the tokens written from ``start`` to ``stop``.

    Attributes:
        start, stop: tokens written before the first and before the last of them.
        judge: nats per token of the judge.
        standard_error: of it, over samples; ``None`` for a single sample.
        distinct: share of distinct 4-grams among those of a window, mean over the full windows in between;
            ``None`` where there is none. A text that repeats itself has few, and a judge who likes it.
    """

    start: int
    stop: int
    judge: float
    standard_error: float | None
    distinct: float | None


@dataclass(frozen=True)
class GenerationLosses:
    """What :func:`generation_by_position` found.

    Attributes:
        window: tokens after which the judge begins anew.
        tokens: ``[N, M]``, the samples without the prompt.
        judge: ``[N, M]``, nats of each of their tokens.
    """

    window: int
    tokens: torch.Tensor
    judge: torch.Tensor

    def buckets(self) -> list[GenerationBucket]:
        """0–T, T–2T, 2T–4T, … for windows of T, up to the number of tokens."""
        edges = bucket_edges(self.window, self.tokens.shape[1])
        return [self.between(start, stop) for start, stop in itertools.pairwise(edges)]

    def between(self, start: int, stop: int) -> GenerationBucket:
        judge = self.judge[:, start:stop].double().mean(1)
        distinct = None
        if stop - start >= self.window:
            windows = self.tokens[:, start:stop].unfold(1, self.window, self.window)
            distinct = distinct_share(windows.flatten(0, 1)).mean().item()
        return GenerationBucket(start, stop, judge.mean().item(), standard_error(judge), distinct)

    def to_dict(self) -> dict[str, object]:
        """All but the single losses, as JSON takes it."""
        return {
            "window": self.window,
            "samples": self.tokens.tolist(),
            "buckets": [vars(bucket) for bucket in self.buckets()],
        }


@dataclass(frozen=True)
class TurnBucket:
    """Means over turns ``first`` to ``last`` (counted from 1) of a conversation.

    Attributes:
        first, last: turns.
        read_carried: nats per token of what the other side says, with the conversation's state.
        read_fresh: the same of the judge.
        judge: nats per token of the replies, of the judge.
        distinct: share of distinct 4-grams in a reply.
    """

    first: int
    last: int
    read_carried: float
    read_fresh: float
    judge: float
    distinct: float


@dataclass(frozen=True)
class ConversationLosses:
    """What :func:`conversation_by_turn` found; ``[N, K]`` each, for N conversations of K turns."""

    read_carried: torch.Tensor
    read_fresh: torch.Tensor
    judge: torch.Tensor
    distinct: torch.Tensor

    def buckets(self) -> list[TurnBucket]:
        """Turns 1, 2, 3–4, 5–8, …"""
        edges = bucket_edges(1, self.judge.shape[1])
        return [
            TurnBucket(
                start + 1,
                stop,
                **{name: rows[:, start:stop].mean().item() for name, rows in vars(self).items()},
            )
            for start, stop in itertools.pairwise(edges)
        ]

    def to_dict(self) -> dict[str, object]:
        """As JSON takes it."""
        return {"turns": self.judge.shape[1], "buckets": [vars(bucket) for bucket in self.buckets()]}


def generation_by_position(
    model: HopeForCausalLM,
    prompt: torch.Tensor | np.ndarray,
    tokens: int = 4000,
    *,
    window: int,
    samples: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    console: Console | None = None,
    label: str = "generation",
) -> GenerationLosses:
    """Continuations of a prompt, sampled token by token with the state carried, and what the judge says.

    The judge reads the text in windows of ``window`` tokens, each after the one token before it, so that
    every window is judged alike.

    Args:
        model: Hope or a baseline of its family, on any device; its own mode stays.
        prompt: ``[P]`` ids; it is read, and neither judged nor returned.
        tokens: M, to write.
        window: T, as the model was trained.
        samples: N, written side by side; they differ by chance only.
        temperature: of the sampling, more than 0; no token is ruled out.
        seed: of the sampling.
        console: where to show the progress; ``None``: nowhere.
        label: in front of the progress.

    Raises:
        TypeError, ValueError: an argument of another kind or size than said; nothing has run.
    """
    check_model(model)
    prompt = check_tokens("prompt", prompt, model.config.vocab_size)
    for name, value in (("tokens", tokens), ("window", window)):
        check_positive_int(name, value)
    check_sampling(samples, temperature)
    model = in_evaluation(model)
    with torch.no_grad(), Display(console, total=2 * samples * tokens, label=label) as display:
        writer = _Writer(model, prompt[:1].expand(samples, 1), temperature, seed)
        for piece in prompt[1:].split(window):
            writer.read(piece)
        written = writer.write(tokens, display)
        text = torch.cat([prompt[-1:].expand(samples, 1), written], dim=1)
        judge = []
        for start in range(0, tokens, window):
            judge.append(token_losses(model, text[:, start : start + window + 1]))
            display.advance(judge[-1].numel())
    return GenerationLosses(window, written, torch.cat(judge, dim=1))


def conversation_by_turn(
    model: HopeForCausalLM,
    turns: Sequence[torch.Tensor | np.ndarray],
    *,
    reply_tokens: int,
    window: int,
    samples: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    console: Console | None = None,
    label: str = "conversation",
) -> ConversationLosses:
    """A conversation with one state: the model reads a turn, replies, reads the next, and so on.

    The judge reads turn and reply with a fresh state and as much of the conversation before as fits into
    ``window`` tokens.

    Args:
        model: Hope or a baseline of its family, on any device; its own mode stays.
        turns: K rows of ids, what the other side says; at least 2 ids in the first, at most ``window`` each.
        reply_tokens: that the model writes after each turn; from 4 to ``window``.
        window: T, as the model was trained.
        samples: N conversations side by side; they differ by chance only.
        temperature, seed, console, label: as of :func:`generation_by_position`.

    Raises:
        TypeError, ValueError: an argument of another kind or size than said; nothing has run.
    """
    check_model(model)
    for name, value in (("window", window), ("reply_tokens", reply_tokens)):
        check_positive_int(name, value)
    if not turns:
        raise ValueError("turns: expected at least one row of token ids, got none")
    turns = [check_tokens(f"turns[{i}]", turn, model.config.vocab_size) for i, turn in enumerate(turns)]
    for i, turn in enumerate(turns):
        low = 2 if i == 0 else 1
        if not low <= len(turn) <= window:
            raise ValueError(f"turns[{i}]: expected {low} to {window} (window) token ids, got {len(turn)}")
    if not _N <= reply_tokens <= window:
        raise ValueError(f"reply_tokens: expected {_N} to {window} (window), got {reply_tokens}")
    check_sampling(samples, temperature)
    figures: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("read_carried", "read_fresh", "judge", "distinct")
    }
    total = samples * (sum(map(len, turns)) + reply_tokens * len(turns))
    model = in_evaluation(model)
    with torch.no_grad(), Display(console, total=total, label=label) as display:
        first, turns[0] = turns[0][:1], turns[0][1:]
        text = first.expand(samples, 1)
        writer = _Writer(model, text, temperature, seed)
        for turn in turns:
            figures["read_carried"].append(writer.read(turn).mean(1))
            text = torch.cat([text, turn.expand(samples, -1)], dim=1)[:, -window - 1 :]
            figures["read_fresh"].append(token_losses(model, text)[:, -len(turn) :].mean(1))
            display.advance(samples * len(turn))
            reply = writer.write(reply_tokens, display)
            text = torch.cat([text, reply], dim=1)[:, -window - 1 :]
            figures["judge"].append(token_losses(model, text)[:, -reply_tokens:].mean(1))
            figures["distinct"].append(distinct_share(reply))
    return ConversationLosses(**{name: torch.stack(rows, dim=1) for name, rows in figures.items()})


class _Writer:
    """N texts under way, with one state: reads what it is given and writes what it draws."""

    def __init__(self, model: HopeForCausalLM, first: torch.Tensor, temperature: float, seed: int) -> None:
        self._model, self._temperature = model, temperature
        self._device = input_device(model)
        self._cache = HopeCache(model.config)
        self._last = first.to(self._device)  # [N, 1], not read yet
        self._generator = torch.Generator(self._device).manual_seed(seed)

    def read(self, piece: torch.Tensor) -> torch.Tensor:
        """The losses ``[N, K]`` of ``piece [K]``, which all texts go on with."""
        rows = torch.cat([self._last, piece.to(self._device).expand(len(self._last), -1)], dim=1)
        self._last = rows[:, -1:]
        return token_losses(self._model, rows, self._cache)

    def write(self, tokens: int, display: Display) -> torch.Tensor:
        """``[N, tokens]`` on the CPU, drawn one after another."""
        drawn = []
        for _ in range(tokens):
            logits = self._model(
                input_ids=self._last, cache=self._cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            shares = (logits.float() / self._temperature).softmax(-1)
            self._last = torch.multinomial(shares, 1, generator=self._generator)
            drawn.append(self._last)
            display.advance(len(self._last))
        return torch.cat(drawn, dim=1).cpu()


def distinct_share(rows: torch.Tensor) -> torch.Tensor:
    """``[N]``: how many of the 4-grams of each of ``rows [N, M]`` are distinct, as a share."""
    grams = rows.unfold(1, _N, 1)
    return torch.tensor([len(row.unique(dim=0)) / len(row) for row in grams])


def check_sampling(samples: int, temperature: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless texts can be sampled so."""
    check_positive_int("samples", samples)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
