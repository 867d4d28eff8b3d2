"""Chunked ``deep_memory`` in PyTorch: batched over sequences and heads, a Python loop over chunks only."""

from __future__ import annotations

import dataclasses

import torch

from nl_kernels.chunk_alignment import ChunkGrid
from nl_kernels.chunk_recompute import (
    Footprint,
    Segment,
    State,
    plan_segments,
    run_segments,
    run_with_adjoint,
)
from nl_kernels.delta_chunk import (
    ChunkCoefficients,
    LayerChunk,
    chunk_coefficients,
    erase_inverse,
    read_layer,
    write_layer,
)
from nl_kernels.hidden_layer import hidden_gradient, hidden_layer
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule, bound_length
from nl_kernels.ops.deep_memory.eager_backward import WrittenChunks, supports
from nl_kernels.ops.deep_memory.rows import run_on_rows
from nl_kernels.ops.deep_memory.state import DeepMemoryState

KEPT_BYTES = 12 << 20  # of activations that are not recomputed


@torch.compiler.disable(
    reason="deep_memory's eager path is a loop over chunks, which a trace would unroll; "
    "without fullgraph=True it runs as it is"
)
def deep_memory_eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    momentum: torch.Tensor | None,
    anchor: DeepMemoryWeights,
    state: DeepMemoryState,
    *,
    rule: MemoryRule,
    read: str,
    chunk_size: int,
    mask: torch.Tensor | None,
    at_boundary: bool,
    checkpoint_every: int | None,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """As :func:`deep_memory_reference`, by chunks.

    Args:
        at_boundary: the state is known to be at a boundary for every sequence (spares reading its positions).
        checkpoint_every: chunks between the states kept for the backward pass.
    """

    written_out = supports(rule, read, momentum is not None)

    def compute(carried: State, constants: State, sequences: State, grid: ChunkGrid):
        rows, tokens = sequences[0].shape[:2]
        footprint = _footprint(carried[:4], chunk_size, rows, written_out)
        segments = plan_segments(tokens, chunk_size, grid.offset, checkpoint_every, footprint)
        run, chunks = (run_with_adjoint, WrittenChunks) if written_out else (run_segments, _Chunks)
        return run(chunks(rule, read, chunk_size, grid), segments, carried, constants, sequences)

    return run_on_rows(
        compute,
        q,
        k,
        v,
        rate,
        log_decay,
        momentum,
        anchor,
        state,
        anchored=rule.anchored,
        chunk_size=chunk_size,
        mask=mask,
        at_boundary=at_boundary,
    )


def _footprint(layers: State, size: int, rows: int, written_out: bool) -> Footprint:
    """What the backward pass needs: counts of tensors of each kind in ``eager_backward.py``."""
    layers = [x for x in layers if x is not None]
    numbers = sum(x.numel() for x in layers)
    hidden, width = layers[0].shape[-2:]
    chunk = numbers + rows * size * (13 * hidden + 6 * width + 11 * size)
    item = layers[0].element_size()
    return Footprint(item * numbers, item * chunk * (1 if written_out else 2), KEPT_BYTES)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """One segment of chunks, for :func:`run_segments`; all tensors have N = sequences × heads rows."""

    rule: MemoryRule
    read: str
    chunk_size: int
    grid: ChunkGrid

    def __call__(
        self, segment: Segment, state: State, constants: State, sequences: State
    ) -> tuple[State, torch.Tensor]:
        running, velocity, snapshot = list(state[0:2]), list(state[2:4]), list(state[4:6])
        deep = running[1] is not None
        chunks = segment.chunks
        q, k, v, rate, log_decay, momentum, applied = (
            None if x is None else x.unflatten(1, (chunks, segment.length)) for x in sequences
        )
        if applied is not None:
            rate, log_decay = rate * applied, log_decay.masked_fill(applied == 0, 0)
            momentum = None if momentum is None else momentum.where(applied != 0, 1)
        # What depends on no state is computed for all chunks of the segment at once.
        coefficients = chunk_coefficients(
            log_decay[..., 0],
            None if momentum is None else momentum[..., 0],
            None if applied is None else applied[..., 0],
        )
        share = self.rule.share(momentum)
        first = self._prepare(k, rate, share, coefficients, first_layer=True)
        firsts = [_unbind(x, chunks) for x in first]
        by_chunk = [_unbind(x, chunks) for x in (q, k, v, rate, share)]
        coefficients = _unbind_coefficients(coefficients, chunks)
        outputs = []
        for i in range(chunks):
            q_i, k_i, v_i, rate_i, share_i = (x[i] for x in by_chunk)
            erase, scaled_rate, gram, inverse = (x[i] for x in firsts)
            parts = coefficients[i]
            base = [
                None if x is None else x if a is None else x + a
                for x, a in zip(running if snapshot[0] is None else snapshot, constants)
            ]
            error, layers, o = self._serve(q_i, k_i, v_i, base)
            before = list(zip(running, velocity))
            written = [None, None]
            running[0], velocity[0], written[0] = write_layer(
                *before[0], LayerChunk(k_i, -scaled_rate * layers[0], erase, gram, inverse, parts)
            )
            hidden = layers[1]
            if deep:
                erase, scaled_rate, gram, inverse = self._prepare(
                    hidden, rate_i, share_i, parts, first_layer=False
                )
                running[1], velocity[1], written[1] = write_layer(
                    *before[1], LayerChunk(hidden, -scaled_rate * error, erase, gram, inverse, parts)
                )
            if self.read == "running":
                o = self._read_running(q_i, k_i, hidden, before, constants, written, parts)
            outputs.append(o + q_i if self.rule.residual else o)
            snapshot = self._refresh(segment.slot + (i + 1) * segment.length, running, snapshot, before)
        output = outputs[0] if chunks == 1 else torch.cat(outputs, 1)
        return (*running, *velocity, *snapshot), output

    def _prepare(self, x, rate, share, coefficients: ChunkCoefficients, *, first_layer: bool):
        """β, η of the writes, the gram matrix and the inverse of a layer with inputs x.

        Momentum leaves ``share`` of a write (``None``: all).
        """
        erases = self.rule.erases(first_layer)
        if erases and self.rule.proximal:
            rate = rate / (1 + rate * x.square().sum(-1, keepdim=True))
        written = rate if share is None else rate * share
        if not erases:
            return None, written, None, None
        gram = x @ x.transpose(-1, -2)
        return rate, written, gram, erase_inverse(gram, rate, coefficients.decay)

    def _serve(self, q, k, v, base):
        """At the snapshot: the error, (δ of the first layer, input of the second), and the snapshot read."""
        size = k.shape[1]
        x = k if self.read == "running" else torch.cat([k, q], 1)
        y = torch.bmm(x, base[0].transpose(1, 2))
        hidden = None
        if base[1] is not None:
            both = hidden_layer(y, self.rule)
            y = torch.bmm(both.value, base[1].transpose(1, 2))
            hidden = type(both)(*(None if part is None else part[:, :size] for part in both))
        error = y[:, :size] - v
        error = bound_length(error + k if self.rule.residual else error, self.rule.error_bound)
        o = y[:, size:]
        if hidden is None:
            return error, (error, None), o
        delta = hidden_gradient(torch.bmm(error, base[1]), hidden, self.rule)
        return error, (delta, hidden.value), o

    def _read_running(self, q, k, hidden, before, constants, written, parts):
        """The read after each token, in both layers."""
        y = q
        for layer, x in enumerate((k, hidden)):
            if x is None:
                break
            if layer == 1:
                y = hidden_layer(y, self.rule).value
            anchored = 0 if constants[layer] is None else torch.bmm(y, constants[layer].transpose(1, 2))
            y = anchored + read_layer(y, *before[layer], x, written[layer], parts)
        return y

    def _refresh(self, end: int, running, snapshot, before):
        """The snapshot after the chunk that ends at slot ``end``; ``None`` if it is the running state."""
        met = self.grid.meets_boundary(end, self.chunk_size)
        if met is True:
            return [None, None]
        old = [state for state, _ in before] if snapshot[0] is None else snapshot
        if met is False:
            return old
        return [None if x is None else torch.where(met[:, None, None], x, y) for x, y in zip(running, old)]


def _unbind(x: torch.Tensor | None, chunks: int):
    return [None] * chunks if x is None else x.unbind(1)


def _unbind_coefficients(coefficients: ChunkCoefficients, chunks: int) -> list[ChunkCoefficients]:
    spreads = [
        [None] * chunks if s is None else [type(s)(*p) for p in zip(*(x.unbind(1) for x in s))]
        for s in coefficients
    ]
    return [ChunkCoefficients(*parts) for parts in zip(*spreads)]
