"""Loss by distance from the start of a text: does reading on help, or harm?"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console

from nl_kernels.checks import check_positive_int
from nl_models.console import Display
from nl_models.evaluation.token_losses import check_model, check_tokens, token_losses
from nl_models.evaluation.writes_off import without_writes
from nl_models.hope import HopeCache, HopeForCausalLM
from nl_models.module_views import in_evaluation


@dataclass(frozen=True)
class PositionBucket:
    """Means over the tokens from ``start`` to ``stop`` of every stream; ``None`` where not measured.

    Attributes:
        start, stop: tokens read before the first and before the last of them.
        carried, fresh, writes_off: nats per token.
        difference: carried − fresh, of the same tokens.
        standard_error: of the difference, over streams; ``None`` for a single stream.
    """

    start: int
    stop: int
    carried: float | None
    fresh: float
    writes_off: float | None
    difference: float | None
    standard_error: float | None


@dataclass(frozen=True)
class PositionLosses:
    """Losses in nats of every token of N streams, by position (:func:`loss_by_position`).

    Column ``p`` is the prediction that was made after ``p + 1`` tokens of the stream.

    Attributes:
        window: tokens after which the fresh state begins anew.
        starts: ``N`` places in the text where the streams begin.
        carried: ``[N, C]``, the state carried from the first token on; C < S for models with attention.
        fresh: ``[N, S]``, a fresh state every ``window`` tokens.
        writes_off: ``[N, S]``, the same with rates of 0; ``None`` where the model writes nothing.
        notes: what was not measured, and why.
    """

    window: int
    starts: tuple[int, ...]
    carried: torch.Tensor
    fresh: torch.Tensor
    writes_off: torch.Tensor | None
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of a stream."""
        return self.fresh.shape[1]

    def buckets(self) -> list[PositionBucket]:
        """0–T, T–2T, 2T–4T, … for windows of T, up to the length."""
        edges = bucket_edges(self.window, self.length)
        return [self.between(start, stop) for start, stop in itertools.pairwise(edges)]

    def between(self, start: int, stop: int) -> PositionBucket:
        """The means over any range of positions."""
        fresh = self.fresh[:, start:stop].double().mean(1)
        carried = difference = error = off = None
        if stop <= self.carried.shape[1]:
            means = self.carried[:, start:stop].double().mean(1)
            carried, differences = means.mean().item(), means - fresh
            difference, error = differences.mean().item(), standard_error(differences)
        if self.writes_off is not None:
            off = self.writes_off[:, start:stop].double().mean().item()
        return PositionBucket(start, stop, carried, fresh.mean().item(), off, difference, error)

    def to_dict(self) -> dict[str, object]:
        """All but the single tokens, as JSON takes it."""
        return {
            "window": self.window,
            "length": self.length,
            "starts": list(self.starts),
            "buckets": [vars(bucket) for bucket in self.buckets()],
            "notes": list(self.notes),
        }


def loss_by_position(
    model: HopeForCausalLM,
    tokens: torch.Tensor | np.ndarray,
    *,
    window: int,
    streams: int = 8,
    piece: int | None = None,
    console: Console | None = None,
    label: str = "position",
) -> PositionLosses:
    """Next-token losses: state carried, a fresh state every ``window`` tokens, and writes switched off.

    The streams are rotations of one text: they start at evenly spaced places of it and go on at its beginning
    where it ends. So hard and easy parts are read at all distances from the start, and a trend over positions
    is the model's. (Exactly so with as many streams as windows; with fewer, near the start only some parts
    are read, but carried and fresh losses are always of the same tokens.) The jump at the end of the text is
    one more boundary between documents.

    Within the first window carried and fresh are the same computation. Writes are switched off in a second
    model that shares the parameters (:func:`without_writes`); it has a fresh state every ``window`` tokens,
    so that its distance from ``fresh`` is what writing within a window is worth.

    Softmax attention keeps every token and was never trained on positions beyond its window: models that have
    it are carried through the first window only.

    Args:
        model: Hope or a baseline of its family, on any device; its own mode stays. Runs under
            the caller's ``torch.autocast``.
        tokens: ``[L]`` ids of a text that it was not trained on; what is over after the last full window is
            left out. The streams are as long.
        window: T, as it was trained.
        streams: N, at most as many as windows.
        piece: tokens of each stream that are read at once while the state is carried; default ``window``.
            Memory is that of ``N · piece`` tokens.
        console: where to show the progress; ``None``: nowhere.
        label: in front of the progress.

    Raises:
        TypeError, ValueError: an argument of another kind or size than said; nothing has run.
    """
    check_model(model)
    tokens = check_tokens("tokens", tokens, model.config.vocab_size)
    check_positive_int("window", window)
    check_positive_int("streams", streams)
    piece = window if piece is None else piece
    check_positive_int("piece", piece)
    windows = len(tokens) // window
    if windows < max(streams, 1):
        raise ValueError(
            f"tokens: expected at least {streams} windows of {window} (one for each stream), got "
            f"{len(tokens):,} tokens; use a longer text or fewer streams"
        )
    length = windows * window
    ring = tokens[:length]
    # On the grid of windows, so that a window's fresh loss is the same whatever stream it belongs to.
    starts = torch.arange(streams) * windows // streams * window
    attends = "full_attention" in model.config.layer_types
    far = window if attends else length
    silent = without_writes(model)
    notes = []
    if attends:
        notes.append(
            "carried: through the first window only; softmax attention keeps every token and knows no "
            "positions beyond those it was trained on"
        )
    if silent is None:
        notes.append("writes off: this model has no memory or level that could be switched off")

    rows = max(1, streams * piece // window)
    total = streams * far + (1 if silent is None else 2) * length
    model = in_evaluation(model)
    with torch.no_grad(), Display(console, total=total, label=label) as display:
        fresh = _fresh_losses(model, ring, window, rows, display)
        off = None if silent is None else _fresh_losses(silent, ring, window, rows, display)
        carried = _carried_losses(model, ring, starts, far, piece, display)
    rotation = (starts[:, None] + torch.arange(length)) % length
    return PositionLosses(
        window=window,
        starts=tuple(starts.tolist()),
        carried=carried,
        fresh=fresh[rotation],
        writes_off=None if off is None else off[rotation],
        notes=tuple(notes),
    )


def _fresh_losses(
    model: HopeForCausalLM, ring: torch.Tensor, window: int, rows: int, display: Display
) -> torch.Tensor:
    """``[L]``: every window of the ring by itself, ``rows`` of them at once."""
    places = torch.arange(window + 1)
    losses = []
    for first in torch.arange(0, len(ring), window).split(rows):
        losses.append(token_losses(model, ring[(first[:, None] + places) % len(ring)]).flatten())
        display.advance(losses[-1].numel())
    return torch.cat(losses)


def _carried_losses(
    model: HopeForCausalLM,
    ring: torch.Tensor,
    starts: torch.Tensor,
    length: int,
    piece: int,
    display: Display,
) -> torch.Tensor:
    """``[N, length]``: all streams side by side, a piece at a time."""
    cache = HopeCache(model.config)
    losses = []
    for begin in range(0, length, piece):
        places = torch.arange(begin, min(begin + piece, length) + 1)
        losses.append(token_losses(model, ring[(starts[:, None] + places) % len(ring)], cache))
        display.advance(losses[-1].numel(), status=f"loss {losses[-1].mean():.3f} at {places[-1]:,} tokens")
    return torch.cat(losses, dim=1)


def bucket_edges(window: int, length: int) -> list[int]:
    """0, T, 2T, 4T, …, and the length."""
    edges = [0]
    while (edge := window << (len(edges) - 1)) < length:
        edges.append(edge)
    return [*edges, length]


def standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of ``values [N]``; ``None`` for one value."""
    return None if len(values) < 2 else values.std().item() / math.sqrt(len(values))
