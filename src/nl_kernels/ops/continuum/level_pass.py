"""A level's chunks with steps in place: one buffer of fast weights, written by every step.

Where products round to 16 bits, each step also writes the copy that they read. What the chunks are made of
is called by the name of its implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nl_kernels.ops.continuum import registration
from nl_kernels.ops.continuum.chunk_step import NO_MOMENTA, Weights, keys_of, row_norms
from nl_kernels.ops.continuum.schedule import Owner, Resets, either, reset_rows
from nl_kernels.ops.continuum.state import RULES_WITH_MOMENTUM, ContinuumLevel, state_dtype
from nl_kernels.ops.continuum.update import evened_out


class LevelCall(NamedTuple):
    """A level in one call: what stays the same from chunk to chunk."""

    level: ContinuumLevel
    resets: Resets | None
    rates: list[torch.Tensor]  # of each chunk that is learned from, [B, C]
    lengths: torch.Tensor | None  # [B]: how many slots are taken; None: all of every sequence
    length: int  # slots
    first: int  # the first slot that is read
    pending: torch.Tensor | None  # [B, C, D]: all of the first chunk, where it is read in part
    dtype: torch.dtype  # of what is read
    norm_eps: float
    impl: str


class Chunk(NamedTuple):
    """The slots of one chunk, [B, .., D], each tensor contiguous."""

    reads: torch.Tensor | None  # None: nothing is read
    keys: torch.Tensor | None  # None: nothing is learned; where the keys are what is read, that very tensor
    inputs: torch.Tensor | None
    number: int  # since the first slot
    stop: int  # the slot after its last


class Span(NamedTuple):
    """Consecutive chunks of a level in one call."""

    call: LevelCall
    begin: int
    end: int

    def chunks(self, reads: torch.Tensor) -> list[Chunk]:
        """The chunks of ``reads`` [B, L, D]; keys of all whole ones in one product."""
        call = self.call
        size, first = call.level.chunk_size, 0 if self.begin else call.first
        parts = in_chunks(reads, first, size)
        learned = max(0, min(len(call.rates), self.end) - self.begin)
        keys = inputs = parts[:learned]
        if call.level.key is not None and learned:
            keys = keys_of(call.level, reads[:, : learned * size - first], call.norm_eps)
            keys = in_chunks(keys, first, size)
        if first and learned:
            inputs = [call.pending, *inputs[1:]]
            keys = [keys_of(call.level, call.pending, call.norm_eps), *keys[1:]]
        nothing = [None] * (len(parts) - learned)
        numbers = range(self.begin, self.end)
        stops = [min((number + 1) * size, call.length) for number in numbers]
        return [Chunk(*each) for each in zip(parts, [*keys, *nothing], [*inputs, *nothing], numbers, stops)]

    def unread(self) -> Chunk:
        """The first chunk, to learn from alone."""
        call = self.call
        return Chunk(None, keys_of(call.level, call.pending, call.norm_eps), call.pending, 0, 1)


class Step(NamedTuple):
    """Steps of some matrices, as :func:`nl_kernels.continuum_update_` takes them."""

    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    momenta: list[torch.Tensor] | None
    norms: list[torch.Tensor] | None
    copies: list[torch.Tensor] | None
    sources: list[torch.Tensor] | None
    where: list[torch.Tensor] | None
    initial: list[torch.Tensor] | None
    retention: list[torch.Tensor] | None
    decay: float
    evened: bool  # muon: what the step's direction is made of is the momentum, not what it subtracts
    reset: torch.Tensor | None  # [B]: sequences that go back to their start afterwards
    start: list[torch.Tensor]


_PARTS = Step._fields.index("decay")  # a list each, of tensors for each matrix


def take(steps: Sequence[Step], impl: str) -> None:
    """Take all steps: those with the same options in one launch."""
    resets = [step for step in steps if step.reset is not None]
    steps = [_evened_out(step, impl) if step.evened else step for step in steps]
    groups: dict[tuple, list[Step]] = {}
    if any(step.sources is not None for step in steps):
        steps = [s if s.sources is not None else s._replace(sources=s.weights) for s in steps]
    for step in steps:
        options = (step.decay, *(part is None for part in step[:_PARTS]))
        groups.setdefault(options, []).append(step)
    update = registration.implementation("update_in_place", impl)
    for (decay, *_), group in groups.items():
        parts = [
            None if p[0] is None else [t for each in p for t in each] for p in list(zip(*group))[:_PARTS]
        ]
        weights, gradients, momenta, *rest = parts
        update(weights, gradients, momenta, decay, *rest)
    for step in resets:
        _go_back(step)


def _evened_out(step: Step, impl: str) -> Step:
    """Momenta after the step, and a step that subtracts what muon makes of them."""
    directions = []
    for i, (momentum, gradient) in enumerate(zip(step.momenta, step.gradients)):
        after = torch.add(gradient, momentum, alpha=step.decay)
        if step.where is not None:
            after = torch.where(step.where[i][:, None, None], after, momentum)
        directions.append(evened_out(momentum.copy_(after), impl))
    return step._replace(gradients=directions, momenta=None, decay=0.0)


def _go_back(step: Step) -> None:
    rows = step.reset[:, None, None]
    for i, start in enumerate(step.start):
        torch.where(rows, start.to(step.weights[i].dtype), step.weights[i], out=step.weights[i])
        if step.copies is not None:
            torch.where(rows, start.to(step.copies[i].dtype), step.copies[i], out=step.copies[i])
        if step.momenta is not None:
            step.momenta[i].masked_fill_(rows, 0.0)


class Made(NamedTuple):
    """What the backward pass needs of the read of one chunk."""

    weights: Weights | None  # that served it; None: those of the owner
    owner: Owner


class LevelPass:
    """A level on its way through chunks: what serves it, and the buffers that its steps write.

    Args:
        weights: at the start, of all sequences or of each; they stay as they are.
        momenta: at the start, None for zero; they stay as they are.
        records: keep for a backward pass what served each chunk.
    """

    def __init__(self, call: LevelCall, weights: Weights, momenta: Weights, records: bool) -> None:
        level = call.level
        self.call, self.records = call, records
        self.start = contiguous((level.up, level.down, level.gate))
        self.value = level.value.contiguous()
        self.serving = self.source = contiguous(weights)
        self.given_momenta = momenta
        self.weights: Weights | None = None  # the buffers
        self.momenta: Weights | None = None
        self.copies: Weights | None = None
        self.norms = row_norms(level)
        self.retention = None
        if not level.retains_all:
            self.retention = torch.as_tensor(
                level.retention, dtype=state_dtype(call.dtype), device=self.value.device
            ).detach()
        self.owner: Owner = False
        self.outputs: list[torch.Tensor] = []
        self.made: list[Made] = []

    def last(self) -> tuple[Weights, Weights]:
        """Weights and momenta after all chunks so far."""
        return self.weights or self.source, self.momenta or self.given_momenta

    def advance(self, chunk: Chunk) -> Step | None:
        """Read a chunk, and make the step on it, which is to be taken before the next chunk."""
        reads, call, sums = chunk.reads, self.call, None
        if self.records and reads is not None:
            self.made.append(Made(None if self.serving is self.source else self.serving, self.owner))
        starts_again = chunk.keys is not None and self._all_reset(chunk)
        if chunk.keys is not None and not starts_again:
            y, *sums = registration.implementation("chunk_sums", call.impl)(
                chunk.keys,
                chunk.inputs,
                self.value,
                *self.serving,
                call.rates[chunk.number],
                call.level.error_bound,
                chunk.keys is reads,
            )
            if y is not None:
                self.outputs.append(y)
        if reads is not None and (sums is None or chunk.keys is not reads):
            self.outputs.append(read(reads, self.serving, call.impl))
        if starts_again:
            self.serving = self.source = self.start
            self.given_momenta, self.owner = NO_MOMENTA, True
            self.weights = self.momenta = self.copies = None
        return None if sums is None else self._step(chunk, sums)

    def _all_reset(self, chunk: Chunk) -> bool:
        """Whether every sequence goes back to its start after this chunk, so that no step is needed."""
        resets = self.call.resets
        return resets is not None and self.call.lengths is None and resets.after(chunk.number) is True

    def _step(self, chunk: Chunk, sums: Sequence[torch.Tensor | None]) -> Step:
        call, level, old = self.call, self.call.level, self.weights
        batch, dtype = chunk.keys.shape[0], state_dtype(call.dtype)
        copied = call.dtype != dtype
        fresh = old is None or (self.records and not copied)
        if fresh:
            self.weights = _buffers(self.start, batch, dtype)
        if copied and (self.copies is None or self.records):
            self.copies = _buffers(self.start, batch, call.dtype)
        if self.momenta is None and level.rule in RULES_WITH_MOMENTUM:
            self.momenta = Weights(
                *(
                    None
                    if w is None
                    else torch.zeros_like(w)
                    if m is None
                    else m.clone(memory_format=torch.contiguous_format)
                    for w, m in zip(self.weights, self.given_momenta)
                )
            )
        self.serving = self.copies if copied else self.weights
        full = None if call.lengths is None else call.lengths >= chunk.stop
        reset = reset_rows(call.resets, chunk.number, full)
        self.owner = either(self.owner, reset)
        given = [w is not None for w in self.start]
        return Step(
            _present(self.weights),
            _present(sums),
            None if self.momenta is None else _present(self.momenta),
            None if self.norms is None else _present(self.norms),
            _present(self.copies) if copied else None,
            _present(old or self.source) if fresh else None,
            None if full is None else [full] * sum(given),
            None if self.retention is None else _present(self.start),
            None if self.retention is None else [self.retention] * sum(given),
            level.momentum_decay if self.momenta is not None else 0.0,
            level.rule == "muon",
            None if reset is False else reset,
            _present(self.start),
        )


def walk(passes: Sequence[tuple[LevelPass, list[Chunk]]], *, hold: bool) -> list[Step]:
    """Take all passes through their chunks side by side, those that are due together by one step.

    Returns:
        With ``hold`` the steps after the last chunks, not taken; otherwise nothing is left.
    """
    due: dict[int, list[tuple[LevelPass, Chunk]]] = {}
    for level_pass, chunks in passes:
        for chunk in chunks:
            due.setdefault(chunk.stop - level_pass.call.first, []).append((level_pass, chunk))
    steps: list[Step] = []
    for slot in sorted(due):
        take(steps, passes[0][0].call.impl)
        steps = []  # their sums make room for the next ones
        found = (level_pass.advance(chunk) for level_pass, chunk in due[slot])
        steps = [step for step in found if step is not None]
    if hold:
        return steps
    take(steps, passes[0][0].call.impl)
    return []


def read(x: torch.Tensor, weights: Weights, impl: str) -> torch.Tensor:
    """The MLP's outputs for contiguous x [B, C, D], with weights of all sequences or of each."""
    mlp = registration.implementation("mlp", impl)
    if weights.up.ndim == 3:
        return mlp(x, *weights)
    shared = (None if w is None else w[None] for w in weights)
    return mlp(x.view(1, -1, x.shape[2]), *shared).view_as(x)


def in_chunks(x: torch.Tensor, first: int, size: int) -> list[torch.Tensor]:
    """x [B, L, ..] from slot ``first`` of a chunk on, chunk by chunk, each contiguous: one copy at most."""
    length = x.shape[1]
    head = min(-first % size, length)
    whole = (length - head) // size
    tail = head + whole * size
    parts = [x[:, :head].contiguous()] if head else []
    if whole:
        stack = x[:, head:tail].unflatten(1, (whole, size)).transpose(0, 1).contiguous()
        parts += stack.unbind()
    if tail < length:
        parts.append(x[:, tail:].contiguous())
    return parts


def contiguous(weights: Sequence[torch.Tensor | None]) -> Weights:
    """The weights as the kernels read them."""
    return Weights(*(None if w is None else w.contiguous() for w in weights))


def _buffers(like: Weights, batch: int, dtype: torch.dtype) -> Weights:
    return Weights(*(None if w is None else w.new_empty(batch, *w.shape, dtype=dtype) for w in like))


def _present(parts: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [part for part in parts if part is not None]
