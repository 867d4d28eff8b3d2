"""A bank: the memories of one head, and how the memories of N banks lie in tensors.

``deep_memory`` has a bank of one memory, which is given its targets. ``self_modifying_memory`` has a bank of
five: those that make keys and values, the memory that is read (the projections are these three), and those
that make rates and retentions (the gates). All memories of a bank learn the same keys at the same rates and
retentions.

With M memories, of which m are projections, and N = sequences × heads, the memory axis comes first: a layer
of all memories is [M · N, out, in]. Linear memories take in the same keys, so that a bank of them is a single
layer whose outputs are those of all memories, one below the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from nl_kernels.memory_rule import MemoryRule

Layers = tuple[torch.Tensor, ...]
"""The layers of N banks: weights, changes, velocities, or adjoints of them. Empty where there is none.

Two-layer memories have their first layers [M · N, h, D], the last layers of the projections [m · N, Dv, h],
and those of the gates [2 · N, 1, h], if there are gates. Linear ones have one layer, [N, outputs, D].
"""


class ReadMet(NamedTuple):
    """A boundary that the memory which is read meets, or all the others; ``size`` along ``dim``."""

    read: bool
    dim: int
    size: int

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of a layer where the boundary is met; two of five memories come before the one read."""
        rest = x.shape[self.dim] - 3 * self.size
        before, own, after = x.split_with_sizes((2 * self.size, self.size, rest), self.dim)
        return (own,) if self.read else (before, after)


Met = bool | ReadMet | torch.Tensor
"""Where a boundary is met: everywhere, nowhere, by some memories, or a bool tensor that broadcasts."""


class Sequences(NamedTuple):
    """Tokens [B, T, H, ..] of a call, as :class:`nl_kernels.memory.kernels.arguments.Tokens` says; of the
    momentum, which the kernels have not, the decay [B, T, H]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor | None = None
    rate: torch.Tensor | None = None
    log_decay: torch.Tensor | None = None
    momentum: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the memories of N banks are.

    Attributes:
        banks: N.
        width: outputs of a projection.
        self_made: a bank of five that makes its targets itself; otherwise of one that is given them.
        linear: memories of one layer.
    """

    banks: int
    width: int
    self_made: bool
    linear: bool

    @property
    def projections(self) -> int:
        return 3 if self.self_made else 1

    @property
    def memories(self) -> int:
        return 5 if self.self_made else 1

    @property
    def layers(self) -> int:
        """Layers of a bank."""
        return 1 if self.linear else 3 if self.self_made else 2

    @property
    def read_layers(self) -> int:
        """Layers of the memory that is read; they come first."""
        return 1 if self.linear else 2

    @property
    def batched(self) -> bool:
        """Whether several memories lie along the batch."""
        return self.self_made and not self.linear

    def blocks_of(self, weights: tuple) -> Layers:
        """A state's weights [B, H, ..] as blocks [N, m, out, in] of m memories, by layer: views."""
        parts = [x.flatten(0, 1) for x in weights if x is not None]
        if not self.self_made:
            return tuple(x.unsqueeze(1) for x in parts)
        return (*parts[:-1], parts[-1].unsqueeze(2))

    def weights_of(self, kind: type, blocks: Layers, batch: int) -> tuple:
        """The inverse of :meth:`blocks_of`; contiguous if they are of several memories."""
        if self.self_made:
            *others, gate = (x.contiguous() for x in blocks)
            parts = (*[None] * self.linear, *others, gate.squeeze(2))
        else:
            parts = (*(x.squeeze(1) for x in blocks), *[None] * self.linear)
        return kind(*(None if x is None else x.unflatten(0, (batch, -1)) for x in parts))

    def layers_of(self, blocks: Layers | None) -> tuple[torch.Tensor | None, ...]:
        """Blocks as :data:`Layers`; as many ``None`` where there are none."""
        if blocks is None:
            return (None,) * self.layers
        if self.linear:
            rows = [x.flatten(1, 2) for x in blocks]
            return (torch.cat(rows, 1) if self.self_made else rows[0],)
        return tuple(x.transpose(0, 1).flatten(0, 1) for x in blocks)

    def as_blocks(self, layers: tuple[torch.Tensor | None, ...]) -> Layers | None:
        """The inverse of :meth:`layers_of`, views."""
        if layers[0] is None:
            return None
        if not self.linear:
            return tuple(x.view(-1, self.banks, *x.shape[1:]).transpose(0, 1) for x in layers)
        return self.rows_by_memory(layers[0])

    def rows_by_memory(self, rows: torch.Tensor) -> Layers:
        """Rows [N, outputs, ..] of all last layers of a bank as blocks, views."""
        if not self.self_made:
            return (rows.unsqueeze(1),)
        last, gate = rows.split_with_sizes((3 * self.width, 2), 1)
        return last.unflatten(1, (3, self.width)), gate.unsqueeze(2)

    def lasts(self, bank: Layers) -> Layers:
        """The last layers."""
        return bank if self.linear else bank[1:]

    def each(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ..] for every memory that lies along the batch."""
        return torch.cat([x] * self.memories) if self.batched else x  # a fifth of the time of ``repeat``

    def total(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """[m · N, ..] summed over memories, [N, ..]."""
        return x if x is None or len(x) == self.banks else x.view(-1, self.banks, *x.shape[1:]).sum(0)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[M · N, ..] as the parts that belong to each of :meth:`lasts`."""
        return x.split_with_sizes((3 * self.banks, 2 * self.banks)) if self.batched else (x,)

    def read_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Of a layer [.., out, in] the part of the memory that is read."""
        return self._read_part(weights, 1, self.linear)

    def read_outputs(self, y: torch.Tensor | None) -> torch.Tensor | None:
        """Of a layer's outputs [.., c, out] the part of the memory that is read."""
        return None if y is None else self._read_part(y, -1, self.linear)

    def read_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Of a layer's inputs [.., c, in] the part of the memory that is read."""
        return x if self.linear else self._read_part(x, 0, False)

    def _read_part(self, x: torch.Tensor, rows: int, linear: bool) -> torch.Tensor:
        if not self.self_made:
            return x
        dim, size = (rows, self.width) if linear else (0, self.banks)
        return x.narrow(dim, 2 * size, size)

    def by_projection(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Outputs of the last layers, those of the projections, a view [m, N, c, Dv]."""
        wide = outputs[0]
        if self.linear and self.self_made:
            return wide[..., : 3 * self.width].unflatten(-1, (3, self.width)).movedim(-2, 0)
        return wide.view(self.projections, self.banks, *wide.shape[1:])

    def gates(self, outputs: list[torch.Tensor]) -> torch.Tensor | None:
        """Outputs of the last layers, those of the gates, a view; ``None`` if there are none."""
        if not self.self_made:
            return None
        return outputs[0][..., 3 * self.width :] if self.linear else outputs[1]

    def met(self, read: Met, others: Met, device: torch.device) -> list[Met]:
        """By layer, where a boundary is met that two clocks meet as given ([N] or a bool)."""
        if isinstance(read, bool) and isinstance(others, bool):
            some = ReadMet(read, 1, self.width) if self.linear else ReadMet(read, 0, self.banks)
            return [read] * self.layers if read is others else [some, some, others][: self.layers]
        if not self.self_made:
            return [read[:, None, None]] * self.layers
        read, others = (
            torch.as_tensor(met, device=device).reshape(-1, 1, 1).expand(self.banks, 1, 1)
            for met in (read, others)
        )
        if not self.linear:
            met = torch.cat([others, others, read, others, others])
            return [met, *self.split(met)]
        memory = torch.arange(3 * self.width + 2, device=device).div(self.width, rounding_mode="floor")
        return [torch.where((memory == 2)[:, None], read, others)]


class Op(NamedTuple):
    """What the two ops of chunked memories do in their own way.

    Attributes:
        state: the named tuple of its states.
        weights: what a state has of initial weights [B, H, ..].
        takes: which of :class:`Sequences` its tensors are, in order.
    """

    state: type
    weights: Callable
    takes: tuple[str, ...]


class Request(NamedTuple):
    """A checked call of an op.

    Attributes:
        implementation: that serves it.
        tensors: the op's, of the tokens, the last one its momentum.
        gates: parameters [H], or numbers, of memories that make their own gates.
        weights: the op's initial ones, shared or by sequence.
        state: to begin with; ``None``: of the weights.
        reference: the op's definition, of tensors, anchor and state; gates, rule, read and mask by name.
        rule, read, mask: as the caller gave them.
        clocks: tokens between the boundaries of the memory that is read, and of the others.
        truncate_every: chunks of the faster clock between cuts of the gradient, or ``None``.
    """

    op: Op
    implementation: str
    tensors: tuple[torch.Tensor | None, ...]
    gates: dict[str, torch.Tensor | float]
    weights: tuple
    state: tuple | None
    reference: Callable
    rule: MemoryRule
    read: str
    mask: torch.Tensor | None
    clocks: tuple[int, int]
    truncate_every: int | None = None


class Call(NamedTuple):
    """A :class:`Request` as the engine and the kernels take it.

    Attributes:
        gates: largest rate and both biases [H]; empty where rates are given.
        running, snapshot, anchor, velocity: blocks of :meth:`Layout.blocks_of`; ``None`` without an anchor,
            or without momentum.
        position: [B], tokens since each sequence's last boundary.
        checkpoint_every: chunks between the states kept for the backward pass.
        dtype: of the caller's tokens: it sets the precision of products.
    """

    layout: Layout
    tokens: Sequences
    gates: tuple[torch.Tensor, ...]
    running: Layers
    snapshot: Layers
    anchor: Layers | None
    velocity: Layers | None
    position: torch.Tensor
    request: Request
    checkpoint_every: int | None
    dtype: torch.dtype


def take_snapshot(
    met: Met, after: torch.Tensor, before: torch.Tensor, snapshot: torch.Tensor | None
) -> torch.Tensor:
    """The snapshot after a chunk, from the weights after and before it and the snapshot that it had.

    A snapshot of ``None`` equals the running weights.
    """
    old = before if snapshot is None else snapshot
    if isinstance(met, bool):
        return after if met else old
    if isinstance(met, ReadMet):
        old = old.clone()
        for part, taken in zip(met.parts(old), met.parts(after)):
            part.copy_(taken)
        return old
    return torch.where(met, after, old)


def snapshot_adjoint(
    met: Met, d_after: torch.Tensor | None, d_snapshot: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Adjoints of the weights after a chunk and of the snapshot it had, from those of both after it.

    ``None`` is zero. Overwrites what it is given.
    """
    if d_snapshot is None or met is False:
        return d_after, d_snapshot
    if met is True:
        return d_snapshot if d_after is None else d_after.add_(d_snapshot), None
    if isinstance(met, ReadMet):
        d_after = torch.zeros_like(d_snapshot) if d_after is None else d_after
        for part, taken in zip(met.parts(d_after), met.parts(d_snapshot)):
            part.add_(taken)
            taken.zero_()
        return d_after, d_snapshot
    taken = d_snapshot.where(met, 0)
    return taken if d_after is None else d_after.add_(taken), d_snapshot.masked_fill_(met, 0)
