"""A bank: the memories of one head, and how the memories of N banks lie in tensors.

``deep_memory`` has a bank of one memory, which is given its targets. ``self_modifying_memory`` has a bank of
five: the memory that is read, those that make keys and values (the projections are these three), and those
that make rates and retentions (the gates). All memories of a bank learn the same keys at the same rates and
retentions.

With M memories, of which m are projections, and N = sequences × heads, the memory axis comes first: a layer
of all memories is [M · N, out, in]. The memory that is read is the first one. Linear memories take in the
same keys, so that a bank of them is a single layer whose outputs are those of all memories, one below the
other.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch


class Bank(NamedTuple):
    """Weights of all memories of N = B · H heads, as kernels have them, and states but for their axes.

    First layers are [N, M · h, D], last layers [N, rows, in].
    The rows of last layers lie one memory below the other, those of gates last. Linear memories have last
    layers alone.
    """

    first: torch.Tensor | None
    last: torch.Tensor | None


class Sequences(NamedTuple):
    """Tokens [B, T, H, ..] of a call, as :class:`nl_kernels.memory.kernels.arguments.Tokens` says; of the
    momentum, which the kernels have not, the decay [B, T, H]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor | None
    rate: torch.Tensor | None
    log_decay: torch.Tensor | None
    momentum: torch.Tensor | None


class Call(NamedTuple):
    """A call of an op: its tokens and the banks of N = B · H heads.

    Attributes:
        gates: largest rate and both biases [H], ``None`` where rates are given.
        running, snapshot, anchor, velocity: banks; absent without an anchor, or without momentum.
        position: [B], tokens since each sequence's last boundary.
    """

    tokens: Sequences
    gates: tuple[torch.Tensor | None, ...]
    running: Bank
    snapshot: Bank
    anchor: Bank
    velocity: Bank
    position: torch.Tensor


class ReadMet(NamedTuple):
    """A boundary that the memory which is read meets, or all the others: the first ``size`` along ``dim``."""

    read: bool
    dim: int
    size: int

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of a layer where the boundary is met and where it is not."""
        parts = x.split_with_sizes((self.size, x.shape[self.dim] - self.size), self.dim)
        return parts if self.read else parts[::-1]


Met = bool | ReadMet | torch.Tensor
"""Where a boundary is met: everywhere, nowhere, by some memories, or a bool tensor that broadcasts."""

Layers = tuple[torch.Tensor, ...]
"""The layers of N banks: weights, changes, velocities, or adjoints of them. Empty where there is none.

Two-layer memories have their first layers [M · N, h, D], the last layers of the projections [m · N, Dv, h],
and those of the gates [2 · N, 1, h], if there are gates. Linear ones have one layer, [N, outputs, D].
"""


_READ_FIRST = [2, 0, 1, 3, 4]  # of a state's key, value, memory, rate, retention
_READ_THIRD = [1, 2, 0, 3, 4]


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

    def layers_of(self, bank: Bank) -> tuple[torch.Tensor | None, ...]:
        """The layers of weights as states have them; as many ``None`` where there are none."""
        if bank.last is None:
            return (None,) * self.layers
        if not self.self_made:
            return tuple(x for x in bank if x is not None)
        last, gate = bank.last.split_with_sizes((3 * self.width, 2), 1)
        last = last.unflatten(1, (3, self.width))[:, _READ_FIRST[:3]]
        if self.linear:
            return (torch.cat([last.flatten(1, 2), gate], 1),)
        first = bank.first.unflatten(1, (5, -1))[:, _READ_FIRST]
        return tuple(x.transpose(0, 1).flatten(0, 1) for x in (first, last, gate.unsqueeze(2)))

    def bank_of(self, layers: tuple[torch.Tensor | None, ...]) -> Bank | None:
        """The inverse of :meth:`layers_of`; ``None`` where there are none."""
        if layers[0] is None:
            return None
        if not self.self_made:
            return Bank(None, *layers) if self.linear else Bank(*layers)
        if self.linear:
            first = None
            last, gate = layers[0].split_with_sizes((3 * self.width, 2), 1)
            last = last.unflatten(1, (3, self.width))
        else:
            first, last, gate = (x.unflatten(0, (-1, self.banks)).transpose(0, 1) for x in layers)
            first, gate = first[:, _READ_THIRD].flatten(1, 2), gate.squeeze(2)
        return Bank(first, torch.cat([last[:, _READ_THIRD[:3]].flatten(1, 2), gate], 1))

    def lasts(self, bank: Layers) -> Layers:
        """The last layers."""
        return bank if self.linear else bank[1:]

    def each(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ..] for every memory that lies along the batch."""
        return torch.cat([x] * self.memories) if self.batched else x  # a fifth of the time of ``repeat``

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """[m · N, ..] summed over memories, [N, ..]."""
        return x if len(x) == self.banks else x.view(-1, self.banks, *x.shape[1:]).sum(0)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[M · N, ..] as the parts that belong to each of :meth:`lasts`."""
        return x.split((3 * self.banks, 2 * self.banks)) if self.batched else (x,)

    def read_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Of a layer [.., out, in] the part of the memory that is read."""
        if not self.self_made:
            return weights
        return weights[:, : self.width] if self.linear else weights[: self.banks]

    def read_outputs(self, y: torch.Tensor | None) -> torch.Tensor | None:
        """Of a layer's outputs [.., c, out] the part of the memory that is read."""
        if not self.self_made or y is None:
            return y
        return y[..., : self.width] if self.linear else y[: self.banks]

    def read_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Of a layer's inputs [.., c, in] the part of the memory that is read."""
        return x[: self.banks] if self.batched else x

    @property
    def axis(self) -> int:
        """The axis of the projections in :meth:`by_projection`."""
        return 2 if self.linear and self.self_made else 0

    def by_projection(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Outputs of the last layers, those of the projections, a view [m, N, c, Dv] or [N, c, m, Dv]."""
        wide = outputs[0]
        if self.axis:
            return wide[..., : 3 * self.width].unflatten(-1, (3, self.width))
        return wide.view(self.projections, self.banks, *wide.shape[1:])

    def gates(self, outputs: list[torch.Tensor]) -> torch.Tensor | None:
        """Outputs of the last layers, those of the gates, a view; ``None`` if there are none."""
        if not self.self_made:
            return None
        return outputs[0][..., 3 * self.width :] if self.linear else outputs[1]

    def met(self, read: bool | torch.Tensor, others: bool | torch.Tensor, device: torch.device) -> list[Met]:
        """By layer, where a boundary is met that two clocks meet as given ([N] or a bool)."""
        if isinstance(read, bool) and isinstance(others, bool):
            if read is others:
                return [read] * self.layers
            met = ReadMet(read, 1, self.width) if self.linear else ReadMet(read, 0, self.banks)
            return [met] if self.linear else [met, met, others]
        if not self.self_made:
            return [read[:, None, None]] * self.layers
        read, others = (
            torch.as_tensor(met, device=device).reshape(-1, 1, 1).expand(self.banks, 1, 1)
            for met in (read, others)
        )
        if self.linear:
            outputs = torch.arange(3 * self.width + 2, device=device)[None, :, None]
            return [torch.where(outputs < self.width, read, others)]
        met = torch.cat([read, *[others] * 4])
        return [met, *self.split(met)]


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
        parts = (met.split(after)[0], met.split(old)[1])
        return torch.cat(parts if met.read else parts[::-1], met.dim)
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
        taken = met.split(d_snapshot)[0]
        met.split(d_after)[0].add_(taken)
        taken.zero_()
        return d_after, d_snapshot
    taken = d_snapshot.where(met, 0)
    return taken if d_after is None else d_after.add_(taken), d_snapshot.masked_fill_(met, 0)
