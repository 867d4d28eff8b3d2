"""The self-modifying memory with linear memories, as it is by default, and its derivative written out.

Without momentum and with constant targets. All memories of a row are written along the same keys, so they
are one matrix here: W [N, 3D + 2, D] has the rows of key, value and memory, then those of rate and retention.
A chunk then recalls, takes in errors and writes as a single layer does. An adjoint is called ``at_…`` or
``grad_…``.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from nl_kernels.chunk_alignment import ChunkGrid
from nl_kernels.chunk_recompute import Footprint, Segment, State, chunk_of, run_with_adjoint
from nl_kernels.delta_adjoint import (
    Erase,
    Read,
    Write,
    decay_adjoint,
    decay_products,
    erase_matrices,
    gram_adjoint,
    proximal_adjoint,
    proximal_rate,
    read_adjoint,
    read_forward,
    write_adjoint,
    write_forward,
)
from nl_kernels.delta_chunk import Spread
from nl_kernels.hidden_layer import bound_adjoint, length_factor, row_dot
from nl_kernels.memory_rule import MemoryRule, inverse_norm
from nl_kernels.ops.self_modifying.rows import ABSENT
from nl_kernels.ops.self_modifying.state import MemoryStack
from nl_kernels.snapshot import Met, snapshot_adjoint, take_snapshot

KEPT_BYTES = 12 << 20  # of activations that are not recomputed
WIDE = 3  # memories whose output is as wide as their input; the gates follow


@dataclasses.dataclass(frozen=True)
class ChunkOptions:
    """What a loop over chunks is told; the grid is that of all rows, periods are in tokens."""

    rule: MemoryRule
    read: str
    chunk_size: int
    generator_chunk_size: int
    truncate_period: int | None
    grid: ChunkGrid

    def clocks(self, segment: Segment, i: int) -> tuple[bool | torch.Tensor, bool | torch.Tensor]:
        """Whether M_memory, and the others, meet a boundary after the i-th chunk: [N] bool if rows differ."""
        end = segment.slot + (i + 1) * segment.length
        periods = (self.chunk_size, self.generator_chunk_size)
        own, others = (self.grid.meets_boundary(end, period) for period in periods)
        return own, others

    def truncated(self, segment: Segment, i: int) -> bool | torch.Tensor:
        """Whether the outer gradient is cut after the i-th chunk, likewise."""
        end = segment.slot + (i + 1) * segment.length
        return self.truncate_period is not None and self.grid.meets_boundary(end, self.truncate_period)


def run_linear(
    options: ChunkOptions, segments: list[Segment], state: State, constants: State, sequences: State
) -> tuple[torch.Tensor, State]:
    """As :func:`~nl_kernels.chunk_recompute.run_segments` of the general loop, for linear memories.

    Args:
        state: stacks of running weights, velocities (absent) and snapshot, memory first.
        constants: the anchor's stack, then the gates' largest rate and biases [N, 1].
        sequences: key, value, query and gate inputs [N, S, D], and ``applied`` [N, S] or ``None``.
    """
    rows = tuple(stack_rows(MemoryStack(*state[i : i + 3])) for i in (0, 6))
    anchor = stack_rows(MemoryStack(*constants[:3]))
    o, after = run_with_adjoint(LinearChunks(options), segments, rows, (anchor, *constants[3:]), sequences)
    running, snapshot = map(unstack_rows, after)
    return o, (*running, *ABSENT, *snapshot)


def linear_footprint(state: MemoryStack, size: int) -> Footprint:
    """What the backward pass needs: counts of tensors of each kind in :class:`_Made`."""
    rows, width = state.last.shape[:2].numel(), state.last.shape[-1]
    numbers = sum(x.numel() for x in state if x is not None)
    chunk = numbers + rows * size * (14 * width + 5 * size)
    item = state.last.element_size()
    return Footprint(item * numbers, item * chunk, KEPT_BYTES)


def stack_rows(stack: MemoryStack) -> torch.Tensor | None:
    """W [N, 3D + 2, D] of ``last`` [3N, D, D] and ``gate`` [2N, 1, D]; differentiable."""
    if stack.last is None:
        return None
    last, gate = (
        x.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
        for x, count in ((stack.last, WIDE), (stack.gate, 2))
    )
    return torch.cat([last, gate], 1)


def unstack_rows(rows: torch.Tensor | None) -> MemoryStack:
    """The inverse of :func:`stack_rows`."""
    if rows is None:
        return ABSENT
    last, gate = rows.split([rows.shape[1] - 2, 2], 1)
    last, gate = (
        x.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1) for x, count in ((last, WIDE), (gate, 2))
    )
    return MemoryStack(None, last, gate)


class _Tokens(NamedTuple):
    """What a chunk is given: inputs [N, c, D], and ``applied`` [N, c] or ``None``."""

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor
    gate: torch.Tensor
    applied: torch.Tensor | None


class _Made(NamedTuple):
    """What one chunk computes and its adjoint needs."""

    weights: torch.Tensor
    snapshot: torch.Tensor | None
    gate: torch.Tensor  # before the sigmoids [N, c, 2]
    key_scale: torch.Tensor
    k: torch.Tensor
    difference: torch.Tensor  # k − v
    error: torch.Tensor  # [N, c, 3D + 2]
    factor: torch.Tensor | None  # [N, c, 3, 1]
    rate: torch.Tensor
    write_rate: torch.Tensor
    decay: Spread
    erase: Erase | None
    write: Write
    read: Read | None


@dataclasses.dataclass(frozen=True)
class LinearChunks:
    """For :func:`~nl_kernels.chunk_recompute.run_with_adjoint`.

    State: W and the snapshot (``None`` where it is W). Constants and sequences: as in :func:`run_linear`,
    the anchor one matrix (or ``None``).
    """

    options: ChunkOptions

    def forward(self, segment: Segment, state: State, constants: State, sequences: State, keep: bool):
        weights, snapshot = state
        outputs, made = [], []
        scratch = torch.empty_like(weights)
        for i in range(segment.chunks):
            tokens = _chunk(sequences, segment, i)
            o, after, found = self._forward(tokens, weights, snapshot, *constants, scratch)
            outputs.append(o + tokens.query if self.options.rule.residual else o)
            if keep:
                made.append(found)
            met = self._met(segment, i, weights.shape[1])
            snapshot = take_snapshot(met, after, weights, snapshot)
            weights = after
        return (weights, snapshot), outputs, made

    def backward(
        self,
        segment: Segment,
        made: list[_Made],
        constants: State,
        sequences: State,
        grad_state: State,
        grad_output: torch.Tensor | None,
        grad_constants: State,
        grad_sequences: State,
    ) -> State:
        grad_weights, grad_snapshot = grad_state
        scratch = torch.empty_like(made[0].weights), torch.empty_like(made[0].weights)
        for i in reversed(range(segment.chunks)):
            tokens = _chunk(sequences, segment, i)
            (grad_o,) = chunk_of((grad_output,), segment, i)
            chunk, made[i] = made[i], None
            grad_weights, grad_snapshot = (
                self._remembered(segment, i, g) for g in (grad_weights, grad_snapshot)
            )
            met = self._met(segment, i, chunk.weights.shape[1])
            grad_weights, grad_old = snapshot_adjoint(met, grad_weights, grad_snapshot)
            if grad_weights is None:
                grad_weights = torch.zeros_like(chunk.weights)
            grad_inputs, grad_gates, grad_weights, grad_base = self._backward(
                tokens, chunk, *constants[:2], grad_o, grad_weights, grad_constants[0], scratch
            )
            for place, grad in zip(chunk_of(grad_sequences, segment, i), grad_inputs):
                if place is not None:
                    place.zero_() if grad is None else place.copy_(grad)
            for total, grad in zip(grad_constants[1:], grad_gates):
                if total is not None:
                    total += grad
            if chunk.snapshot is None:
                grad_weights += grad_base if grad_old is None else grad_old.add_(grad_base)
                grad_snapshot = None
            else:
                grad_snapshot = grad_base.clone() if grad_old is None else grad_old.add_(grad_base)
        return grad_weights, grad_snapshot

    def _forward(
        self, tokens: _Tokens, weights, snapshot, anchor, rate_max, rate_bias, retention_bias, scratch
    ):
        """M_memory's reads [N, c, D] without residual, W after the chunk, and :class:`_Made`."""
        rule, width = self.options.rule, tokens.key.shape[-1]
        key_in, value_in, query, gate_in, applied = tokens
        base = _base(weights, snapshot, anchor, scratch)

        # The memories make k, v and the gates.
        k, v = (torch.bmm(x, part.mT) for x, part in zip((key_in, value_in), base.split(width, 1)))
        if rule.projection_residual:
            k, v = k.add_(key_in), v.add_(value_in)
        key_scale = inverse_norm(k)
        k.mul_(key_scale)
        gate = torch.bmm(gate_in, base[:, WIDE * width :].mT)
        gate += torch.stack([rate_bias, retention_bias], -1)
        rate = torch.sigmoid(gate[..., 0]).mul_(rate_max)
        log_decay = torch.nn.functional.logsigmoid(gate[..., 1])
        if applied is not None:
            rate, log_decay = rate.mul_(applied), log_decay.mul_(applied)
        rate = rate[..., None]

        # Every memory's error: f(k) less its own target.
        difference = k - v
        error = torch.bmm(difference, base.mT)
        by_memory = error[..., : WIDE * width].unflatten(-1, (WIDE, width))
        if rule.target_residual:
            by_memory -= v[:, :, None]
        if rule.projection_residual:
            by_memory[:, :, :2] += k[:, :, None]
        if rule.residual:
            by_memory[:, :, 2] += k
        factor = length_factor(by_memory, rule.error_bound)
        if factor is not None:
            by_memory *= factor
            error[..., WIDE * width :].clamp_(-rule.error_bound, rule.error_bound)

        # The write.
        decay, erase, write_rate = decay_products(log_decay), None, rate
        if rule.erases(True):
            write_rate = proximal_rate(rate, k) if rule.proximal else rate
            erase = erase_matrices(torch.bmm(k, k.mT), write_rate, decay.strict)
        after, write = write_forward(weights, k, error, write_rate, decay, erase)

        read = None
        if self.options.read == "running":
            own = slice(2 * width, WIDE * width)
            fixed = None if anchor is None else anchor[:, own]
            o, read = read_forward(query, weights[:, own], fixed, k, write.written[..., own], decay)
        else:
            o = torch.bmm(query, base[:, 2 * width : WIDE * width].mT)
        made = _Made(
            weights,
            snapshot,
            gate,
            key_scale,
            k,
            difference,
            error,
            factor,
            rate,
            write_rate,
            decay,
            erase,
            write,
            read,
        )
        return o, after, made

    def _backward(
        self, tokens: _Tokens, made: _Made, anchor, rate_max, grad_o, grad_after, grad_anchor, scratch
    ):
        """Gradients of inputs, gates, W, and of the snapshot (in scratch); adds to that of the anchor."""
        rule, width = self.options.rule, tokens.key.shape[-1]
        own, gates = slice(2 * width, WIDE * width), slice(WIDE * width, None)
        key_in, value_in, query, gate_in, applied = tokens
        k, difference = made.k, made.difference
        base = _base(made.weights, made.snapshot, anchor, scratch[0])
        decay_parts: dict[str, torch.Tensor] = {}

        at_written = read = None
        if grad_o is not None and self.options.read == "running":
            fixed = None if anchor is None else anchor[:, own]
            read = read_adjoint(
                grad_o,
                query,
                made.weights[:, own],
                fixed,
                k,
                made.write.written[..., own],
                made.decay,
                made.read,
            )
            at_written = torch.zeros_like(made.error)
            at_written[..., own] = read.written
            decay_parts = {"after": read.after, "full": read.full}

        part = write_adjoint(
            grad_after, at_written, made.weights, k, made.write, made.write_rate, made.decay, made.erase
        )
        decay_parts |= {
            name: getattr(part, name)
            for name in ("strict", "before", "to_end", "final")
            if getattr(part, name) is not None
        }
        at_k, grad_rate, at_error = part.x, part.rate, part.signal
        if part.gram is not None:
            at_k += gram_adjoint(part.gram.mul_(made.decay.strict), k)
            if rule.proximal:
                grad_rate, extra = proximal_adjoint(grad_rate, made.rate, k, made.write_rate)
                at_k += extra

        # The errors, back to k and v; ``difference`` is k − v.
        by_memory, bounded = (
            x[..., : WIDE * width].unflatten(-1, (WIDE, width)) for x in (at_error, made.error)
        )
        if made.factor is not None:
            by_memory.copy_(bound_adjoint(by_memory, bounded, made.factor, rule.error_bound))
            at_error[..., gates].masked_fill_(made.error[..., gates].abs() >= rule.error_bound, 0)
        grad_base = torch.bmm(at_error.mT, difference, out=scratch[1])
        at_v = torch.bmm(at_error, base)
        at_k += at_v
        at_v.neg_()
        if rule.target_residual:
            at_v -= by_memory.sum(2)
        if rule.projection_residual:
            at_k += by_memory[:, :, :2].sum(2)
        if rule.residual:
            at_k += by_memory[:, :, 2]
        if read is not None:
            at_k += read.x

        # The gates.
        grad_rate, grad_decay = grad_rate[..., 0], decay_adjoint(k.shape[1], k, **decay_parts)
        if applied is not None:
            grad_rate, grad_decay = grad_rate * applied, grad_decay * applied
        fraction = torch.sigmoid(made.gate[..., 0])
        grad_rate_max = (grad_rate * fraction).sum(1, keepdim=True)
        at_gate = torch.stack(
            [
                grad_rate * rate_max * fraction * (1 - fraction),
                grad_decay * torch.sigmoid(-made.gate[..., 1]),
            ],
            -1,
        )
        grad_gates = (grad_rate_max, *at_gate.sum(1).split(1, 1))

        # The memories that made k, v and the gates, and the snapshot's read.
        at_k -= k * row_dot(k, at_k)
        at_k *= made.key_scale
        served = [(0, at_k, key_in), (width, at_v, value_in), (WIDE * width, at_gate, gate_in)]
        if grad_o is not None and self.options.read == "snapshot":
            served.append((2 * width, grad_o, query))
        back = []
        for start, at_made, x in served:
            rows = slice(start, start + at_made.shape[-1])
            grad_base[:, rows] += torch.bmm(at_made.mT, x)
            back.append(torch.bmm(at_made, base[:, rows]))
        grad_key, grad_value, grad_gate, *grad_query = back
        if rule.projection_residual:
            grad_key += at_k
            grad_value += at_v

        if grad_anchor is not None:
            grad_anchor += grad_base
        grad_weights, grad_query = part.state, grad_query[0] if grad_query else None
        if read is not None:
            grad_query = read.queries
            grad_weights[:, own] += read.state
            if grad_anchor is not None:
                grad_anchor[:, own] += read.anchor
        if rule.residual and grad_o is not None:
            grad_query += grad_o
        return (grad_key, grad_value, grad_query, grad_gate), grad_gates, grad_weights, grad_base

    def _met(self, segment: Segment, i: int, rows: int) -> Met:
        """Where the snapshot is taken anew after the i-th chunk: by row of W."""
        own, others = self.options.clocks(segment, i)
        if isinstance(own, bool) and own is others:
            return own
        row = torch.arange(rows, device=self.options.grid.position.device)[None, :, None]
        width = (rows - 2) // WIDE
        read = (row >= 2 * width) & (row < WIDE * width)
        own, others = (torch.as_tensor(met, device=row.device).reshape(-1, 1, 1) for met in (own, others))
        return torch.where(read, own, others)

    def _remembered(self, segment: Segment, i: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        """``grad`` after the i-th chunk, without what the truncation cuts there."""
        cut = self.options.truncated(segment, i)
        if grad is None or isinstance(cut, bool):
            return None if cut is True else grad
        return grad.masked_fill(cut[:, None, None], 0)


def _base(weights, snapshot, anchor, scratch: torch.Tensor) -> torch.Tensor:
    """The weights at the snapshot; a sum is put into ``scratch``, which stays in the cache."""
    base = weights if snapshot is None else snapshot
    return base if anchor is None else torch.add(base, anchor, out=scratch)


def _chunk(sequences: State, segment: Segment, i: int) -> _Tokens:
    return _Tokens(*chunk_of(sequences, segment, i))
