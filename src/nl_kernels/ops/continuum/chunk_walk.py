"""A level on its way through its chunks: what it reads, the steps between, and how these are taken.

Eager steps make new weights, so that autograd can follow them. Those of any other products are taken in
place, and several levels' at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nl_kernels.memory.state import map_tensors, own_memory
from nl_kernels.ops.continuum import eager
from nl_kernels.ops.continuum.registration import Update
from nl_kernels.ops.continuum.schedule import Owner, Resets, chosen, either
from nl_kernels.ops.continuum.state import (
    NO_MOMENTA,
    RULES_WITH_MOMENTUM,
    ContinuumLevel,
    Weights,
    initial_weights,
    state_dtype,
)
from nl_kernels.ops.continuum.update import evened_out


class Chunk(NamedTuple):
    """What is learned from the tokens of one chunk, [B, C, ..], each tensor contiguous."""

    keys: torch.Tensor | None  # None: what is read
    targets: torch.Tensor | None  # for steps in place the inputs that they are made of; None: what is read
    rates: torch.Tensor | None  # None: nothing is learned
    number: int  # since the first position
    stop: int  # the position after its last


class LevelCall(NamedTuple):
    """A level in one call, or in some of its chunks."""

    level: ContinuumLevel
    resets: Resets | None
    lengths: torch.Tensor | None  # [B]: how many positions are taken; None: all of every sequence
    first: int  # the position in its chunk of the first token that is read
    dtype: torch.dtype  # of what is read
    products: Any  # of a chunk: the module eager, compiled or triton_chunk, or what has their functions
    chunks: Sequence[Chunk] = ()

    def cut(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What is read [B, L, ..], chunk by chunk."""
        return in_chunks(x, self.first, self.level.chunk_size)

    def walk(self, weights: Weights, momenta: Weights, records: bool) -> LevelWalk:
        """The level at the start of its chunks."""
        kind = InPlaceWalk if self.products.IN_PLACE else LevelWalk
        return kind(self, weights, momenta, records)


class Step(NamedTuple):
    """A step on a chunk, yet to be taken."""

    update: Update
    evened: bool  # muon: what the step's direction is made of is the momentum, not what it subtracts
    reset: torch.Tensor | None  # [B]: sequences that go back to their start afterwards
    start: list[torch.Tensor]


def take(steps: Sequence[Step], products: Any) -> None:
    """Take all steps: those with the same options in one launch."""
    updates = [_evened_out(step.update, products.IMPL) if step.evened else step.update for step in steps]
    if any(update.sources is not None for update in updates):
        updates = [u if u.sources is not None else u._replace(sources=u.weights) for u in updates]
    groups: dict[tuple, list[Update]] = {}
    for update in updates:
        options = (update.decay, *(part is None for part in update))
        groups.setdefault(options, []).append(update)
    for group in groups.values():
        joined = {
            name: [tensor for update in group for tensor in getattr(update, name)]
            for name, part in group[0]._asdict().items()
            if name != "decay" and part is not None
        }
        products.update_in_place(group[0]._replace(**joined))
    for step in steps:
        if step.reset is not None:
            _go_back(step)


def _evened_out(update: Update, impl: str) -> Update:
    """Momenta after the step, and a step that subtracts what muon makes of them."""
    directions = []
    for i, (momentum, gradient) in enumerate(zip(update.momenta, update.gradients)):
        after = torch.add(gradient, momentum, alpha=update.decay)
        if update.where is not None:
            after = torch.where(update.where[i][:, None, None], after, momentum)
        directions.append(evened_out(momentum.copy_(after), impl))
    return update._replace(gradients=directions, momenta=None, decay=0.0)


def _go_back(step: Step) -> None:
    again = step.reset[:, None, None]
    for written in (step.update.weights, step.update.copies):
        for weight, start in zip(written or (), step.start):
            torch.where(again, start.to(weight.dtype), weight, out=weight)
    for momentum in step.update.momenta or ():
        momentum.masked_fill_(again, 0.0)


class Recorded(NamedTuple):
    """What the backward pass needs of the read of one chunk."""

    weights: Weights | None  # that were read with; None: those of the owner
    owner: Owner
    activations: Sequence[torch.Tensor]


class LevelWalk:
    """A level on its way through chunks, with steps by :func:`.eager.learn`.

    Args:
        weights: at the start, of all sequences or of each; they stay as they are.
        momenta: at the start, None for zero; they stay as they are.
        records: keep for a backward pass what each chunk was read with.
    """

    def __init__(self, call: LevelCall, weights: Weights, momenta: Weights, records: bool) -> None:
        self.call, self.records = call, records
        self.start = initial_weights(call.level)
        self.weights, self.momenta = weights, momenta
        self.stepped = False  # whether weights and momenta are this walk's own
        self.norms = eager.row_norms(call.level)
        self.owner: Owner = False
        self.outputs: list[torch.Tensor] = []
        self.recorded: list[Recorded] = []

    def advance(self, chunk: Chunk, reads: torch.Tensor | None) -> Step | None:
        """Read a chunk (None: nothing), and step on it; or return the step, due before the next chunk."""
        call = self.call
        weights, owner, stepped = self._read_with(), self.owner, self.stepped
        reset = False if call.resets is None or chunk.rates is None else call.resets.after(chunk.number)
        begins_anew = reset is True and call.lengths is None  # then no step is needed
        y, activations, step = None, (), None
        if chunk.rates is not None and not begins_anew:
            full = None if call.lengths is None else call.lengths >= chunk.stop
            reset = full & reset if full is not None and reset is not False else reset
            y, activations, step = self._learn(reads, chunk, full, reset)
            self.stepped, self.owner = True, either(owner, reset)
        if reads is not None:
            if y is None:
                y, activations = call.products.read(reads, weights, self.records)
            self.outputs.append(y)
            if self.records:
                self.recorded.append(Recorded(weights if stepped else None, owner, activations))
        if begins_anew:
            self._begin_anew()
        return step

    def _read_with(self) -> Weights:
        return eager.cast(self.weights, self.call.dtype)

    def _begin_anew(self) -> None:
        self.weights, self.momenta = self.start, NO_MOMENTA
        self.stepped, self.owner = False, True

    def _learn(
        self, reads: torch.Tensor | None, chunk: Chunk, full: torch.Tensor | None, reset: Owner
    ) -> tuple[torch.Tensor | None, Sequence[torch.Tensor], Step | None]:
        """The outputs (None: yet to be read), what is recorded of them, and a step that is yet to be taken.

        Args:
            full: [B], the sequences that step; None: all.
            reset: the sequences that go back to their start afterwards.
        """
        keys, targets, apart = chunk.keys, chunk.targets, reads
        if keys is None:
            keys, apart = reads, None
        old, before = eager.cast(self.weights, keys.dtype), self.momenta
        y, activations, new, after = self.call.products.learn(
            self.call.level, apart, keys, targets, old, before, self.norms, chunk.rates, self.records
        )
        if full is not None:
            new, after = chosen(full, new, old), chosen(full, after, before)
        if reset is not False:
            new, after = chosen(reset, self.start, new), chosen(reset, NO_MOMENTA, after)
        self.weights, self.momenta = new, after
        return y, activations, None


class InPlaceWalk(LevelWalk):
    """The same with steps in place, which are prepared here and taken together with those of other levels.

    Weights are one buffer, which every step writes; where products round to 16 bits, also the copy that they
    read. What the backward pass needs is not overwritten.
    """

    def __init__(self, call: LevelCall, weights: Weights, momenta: Weights, records: bool) -> None:
        super().__init__(call, contiguous(weights), momenta, records)
        self.start = contiguous(self.start)
        self.copies: Weights | None = None  # in 16 bits
        self.retention = None
        if not call.level.retains_all:
            self.retention = torch.as_tensor(
                call.level.retention, dtype=state_dtype(call.dtype), device=weights.up.device
            ).detach()

    def _read_with(self) -> Weights:
        return self.copies or self.weights

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self.copies = None

    def _learn(
        self, reads: torch.Tensor | None, chunk: Chunk, full: torch.Tensor | None, reset: Owner
    ) -> tuple[torch.Tensor | None, Sequence[torch.Tensor], Step | None]:
        call, level, old = self.call, self.call.level, self.weights
        keys, targets = (reads if given is None else given for given in chunk[:2])
        y, sums = call.products.chunk_sums(
            level, keys, targets, self._read_with(), chunk.rates, chunk.keys is None
        )
        copied = call.dtype != state_dtype(call.dtype)
        new = not self.stepped or (self.records and not copied)
        if new:
            self.weights = sums  # which the step reads before it writes
        if copied and (self.copies is None or self.records):
            self.copies = map_tensors(lambda w: torch.empty_like(w, dtype=call.dtype), sums)
        if not self.stepped and level.rule in RULES_WITH_MOMENTUM:
            self.momenta = map_tensors(
                lambda w, m: torch.zeros_like(w) if m is None else own_memory(m), sums, self.momenta
            )
        matrices = len(_present(sums))
        update = Update(
            _present(self.weights),
            _present(sums),
            _present(self.momenta) or None,
            level.momentum_decay if level.rule in RULES_WITH_MOMENTUM else 0.0,
            None if self.norms is None else _present(self.norms),
            _present(self.copies) if copied else None,
            _present(old) if new else None,
            None if full is None else [full] * matrices,
            None if self.retention is None else _present(self.start),
            None if self.retention is None else [self.retention] * matrices,
        )
        step = Step(update, level.rule == "muon", None if reset is False else reset, _present(self.start))
        return y, (), step


def walk(walks: Sequence[LevelWalk], reads: Sequence[torch.Tensor]) -> list[Step]:
    """Take all levels through their chunks side by side, those that are due together by one step.

    Returns:
        The steps after the last chunks, not yet taken.
    """
    due: dict[int, list[tuple[LevelWalk, Chunk, torch.Tensor]]] = {}
    for each, part in zip(walks, reads):
        for chunk, inputs in zip(each.call.chunks, each.call.cut(part)):
            due.setdefault(chunk.stop - each.call.first, []).append((each, chunk, inputs))
    steps: list[Step] = []
    for position in sorted(due):
        take(steps, walks[0].call.products)
        steps = []  # their sums make room for the next ones
        prepared = (each.advance(chunk, inputs) for each, chunk, inputs in due.pop(position))
        steps = [step for step in prepared if step is not None]
    return steps


def in_chunks(x: torch.Tensor, first: int, size: int) -> list[torch.Tensor]:
    """x [B, L, ..] from position ``first`` of a chunk on, chunk by chunk, contiguous: one copy at most."""
    length = x.shape[1]
    head = min(-first % size, length)
    whole = (length - head) // size
    sizes = [head, whole * size, length - head - whole * size]
    # split, not slices: the gradient of a slice is as long as the sequence
    begin, middle, end = x.split(sizes, dim=1) if whole * size < length else (None, x, None)
    parts = [begin.contiguous()] if head else []
    if whole:
        parts += middle.unflatten(1, (whole, size)).transpose(0, 1).contiguous().unbind()
    if sizes[2]:
        parts.append(end.contiguous())
    return parts


def contiguous(weights: Sequence[torch.Tensor | None]) -> Weights:
    """The weights as kernels read them."""
    return map_tensors(torch.Tensor.contiguous, Weights(*weights))


def _present(parts: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [part for part in parts if part is not None]
