"""Level by level, chunk by chunk, batched over sequences; backward by autograd through the steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nl_kernels.chunk_alignment import ChunkAlignment, align_batch
from nl_kernels.ops.continuum.state import ContinuumLevel, ContinuumLevelState, ContinuumState, state_dtype


class _Weights(NamedTuple):
    """Shared by all sequences ([H, D], …) until the first step, of each one ([B, H, D], …) from then on."""

    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None


class _Grid(NamedTuple):
    """The tokens of a call, behind those that came with the state, by their place since a chunk's start.

    Slot s of every sequence belongs to chunk s // C, so that all sequences step together.
    """

    inputs: torch.Tensor  # [B, L, D], fp32: n(x) of all tokens
    rates: torch.Tensor  # [B, L], 0 in empty slots
    reads: torch.Tensor  # [B, L - first, D]: n(x) as it is read
    first: int  # the first slot that is read
    lengths: torch.Tensor | None  # [B]: how many slots are taken; None: all of every sequence


class _Chunk(NamedTuple):
    """The slots of one chunk; what is learned from them is None where no step follows."""

    reads: torch.Tensor  # [B, ≤ C, D]
    keys: torch.Tensor | None  # [B, C, D]
    targets: torch.Tensor | None  # [B, C, D]
    rates: torch.Tensor | None  # [B, C]
    stop: int  # the slot after its last


def continuum_memory_eager(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    *,
    mask: torch.Tensor | None,
    initial_state: ContinuumState | None,
    output_final_state: bool,
    norm_eps: float,
    checkpoint_every: int | None,
) -> tuple[torch.Tensor, ContinuumState | None]:
    """See :func:`nl_kernels.continuum_memory`."""
    if mask is not None and bool(mask.all()):
        mask = None
    state = []
    for index, level in enumerate(levels):
        inner = F.rms_norm(x, x.shape[-1:], level.norm.to(x.dtype), norm_eps)
        initial = _Weights(level.up, level.down, level.gate)
        if not level.steps:
            x, after = x + _mlp(inner, initial), None
        else:
            run = _SteppingLevel(level, norm_eps, checkpoint_every, output_final_state)
            y, after = run(inner, initial, None if initial_state is None else initial_state[index], mask)
            x = x + y
        state.append(after)
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0.0)
    return x, tuple(state) if output_final_state else None


def _mlp(inner: torch.Tensor, weights: _Weights) -> torch.Tensor:
    up = _product(inner, weights.up)
    hidden = F.gelu(up) if weights.gate is None else F.silu(_product(inner, weights.gate)) * up
    return _product(hidden, weights.down)


def _product(inner: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    weight = weight.to(inner.dtype)
    return F.linear(inner, weight) if weight.ndim == 2 else inner @ weight.mT


@dataclass(frozen=True)
class _SteppingLevel:
    level: ContinuumLevel
    norm_eps: float
    checkpoint_every: int | None
    keep_state: bool

    def __call__(
        self,
        inner: torch.Tensor,
        weights: _Weights,
        before: ContinuumLevelState | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ContinuumLevelState | None]:
        """The MLP's outputs [B, T, D] (at padding: anything) and the state after them."""
        rates = torch.as_tensor(self.level.rate, dtype=state_dtype(inner.dtype), device=inner.device)
        rates = rates.expand(inner.shape[:2])
        if before is not None:
            weights = _Weights(before.up, before.down, before.gate)
        alignment = _ragged_alignment(before, mask, inner)
        grid = (
            _aligned_grid(inner, rates, before)
            if alignment is None
            else _ragged_grid(inner, rates, before, alignment)
        )
        length, size = grid.inputs.shape[1], self.level.chunk_size
        # the step after the last token changes only the state
        steps = (length if self.keep_state else length - 1) // size
        chunks = self.split(grid, steps)
        if length <= size:
            # no step between the tokens: they are read where they lie
            y = _mlp(inner, weights)
            if steps:
                weights = self.stepped(weights, chunks[0], grid.lengths)
        else:
            y, weights = self.walk(weights, chunks, grid.lengths)
            if alignment is not None:
                y = alignment.scatter(F.pad(y, (0, 0, grid.first, 0)), *inner.shape[:2])
        return y, self.state_after(weights, grid) if self.keep_state else None

    def split(self, grid: _Grid, steps: int) -> list[_Chunk]:
        """The chunks of the grid, with keys and targets for the first ``steps``."""
        length, size = grid.inputs.shape[1], self.level.chunk_size
        stops = [*range(size, length, size), length]
        reads = grid.reads.split(
            [stops[0] - grid.first, *(b - a for a, b in itertools.pairwise(stops))], dim=1
        )
        if not steps:
            return [_Chunk(r, None, None, None, stop) for r, stop in zip(reads, stops)]
        dtype = grid.inputs.dtype
        inputs = grid.inputs[:, : steps * size]
        with torch.autocast(inputs.device.type, enabled=False):
            keys = F.linear(inputs, self.level.key.to(dtype))
            keys = F.rms_norm(keys, keys.shape[-1:], None, self.norm_eps)
            targets = F.linear(inputs, self.level.value.to(dtype))
        # split, not slices: the gradient of a slice is as long as the sequence
        learned = (part.split(size, dim=1) for part in (keys, targets, grid.rates[:, : steps * size]))
        return [_Chunk(*parts, stop) for *parts, stop in itertools.zip_longest(reads, *learned, stops)]

    def walk(
        self, weights: _Weights, chunks: Sequence[_Chunk], lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, _Weights]:
        """Outputs for all slots that are read, and the last weights."""
        if self.checkpoint_every is None or not torch.is_grad_enabled():
            outputs, weights = self.serve(chunks, lengths, *weights)
            return torch.cat(outputs, dim=1), weights
        outputs = []
        for begin in range(0, len(chunks), self.checkpoint_every):
            group = chunks[begin : begin + self.checkpoint_every]
            served, weights = checkpoint(
                self.serve, group, lengths, *weights, use_reentrant=False, preserve_rng_state=False
            )
            outputs += served
        return torch.cat(outputs, dim=1), weights

    def serve(
        self, chunks: Sequence[_Chunk], lengths: torch.Tensor | None, *weights: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], _Weights]:
        """Reads each chunk, then steps."""
        weights, outputs = _Weights(*weights), []
        for chunk in chunks:
            if chunk.reads.shape[1]:
                outputs.append(_mlp(chunk.reads, weights))
            if chunk.keys is not None:
                weights = self.stepped(weights, chunk, lengths)
        return outputs, weights

    def stepped(self, weights: _Weights, chunk: _Chunk, lengths: torch.Tensor | None) -> _Weights:
        """The weights after a chunk: of those sequences that fill it; the others keep theirs."""
        weights = _Weights(*(None if w is None else w.to(chunk.keys.dtype) for w in weights))
        # reduced precision is for the reads: steps accumulate
        with torch.autocast(chunk.keys.device.type, enabled=False):
            new = self.step(weights, chunk.keys, chunk.targets, chunk.rates)
        if lengths is None:
            return new
        full = (lengths >= chunk.stop)[:, None, None]
        return _Weights(*(None if n is None else torch.where(full, n, w) for n, w in zip(new, weights)))

    def step(
        self, weights: _Weights, keys: torch.Tensor, targets: torch.Tensor, rates: torch.Tensor
    ) -> _Weights:
        """One step on a chunk: ``keys`` and ``targets`` [B, C, D], ``rates`` [B, C]."""
        up = _product(keys, weights.up)
        if weights.gate is None:
            hidden = F.gelu(up)
        else:
            gate = _product(keys, weights.gate)
            opening = torch.sigmoid(gate)
            opened = gate * opening
            hidden = opened * up
        output = _product(hidden, weights.down)
        error = self.bounded(output - targets)
        back = error @ weights.down

        writes = self.writes(keys, rates)
        if weights.gate is None:
            new_gate, signal = None, torch.ops.aten.gelu_backward(back, up)
        else:
            signal = back * opened
            gate_signal = self.bounded(back * up * (opening + opened * (1 - opening)))
            new_gate = self.written(weights.gate, gate, gate_signal, writes)
        return _Weights(
            up=self.written(weights.up, up, self.bounded(signal), writes),
            down=self.written(weights.down, output, error, self.writes(hidden, rates)),
            gate=new_gate,
        )

    def bounded(self, signal: torch.Tensor) -> torch.Tensor:
        """``signal`` with rows scaled down to a root mean square of at most the bound."""
        bound = self.level.error_bound
        if bound is None:
            return signal
        mean_square = signal.square().mean(-1, keepdim=True)
        return signal * (bound * mean_square.clamp_min(bound**2).rsqrt())

    def writes(self, inputs: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        """The rows R [B, C, in] along which a layer with these inputs is written.

        With D = diag(rates): D X for sgd, and D X (I + Xᵀ D X)^{-1} = (I + D X Xᵀ)^{-1} D X for dgd, by the
        smaller of the two systems. No square root of the rates: its derivative at 0 is infinite.
        """
        rated = inputs * rates[..., None]
        if self.level.rule == "sgd":
            return rated
        tokens, width = inputs.shape[-2:]
        eye = torch.eye(min(tokens, width), dtype=inputs.dtype, device=inputs.device)
        if tokens < width:
            return torch.linalg.inv(eye + rated @ inputs.mT) @ rated
        return rated @ torch.linalg.inv(eye + inputs.mT @ rated)

    def written(
        self, weight: torch.Tensor, output: torch.Tensor, signal: torch.Tensor, writes: torch.Tensor
    ) -> torch.Tensor:
        """W − Gᵀ R for sgd, W − (X Wᵀ + G)ᵀ R for dgd, whose erased part X Wᵀ is the layer's own output."""
        pulled = signal if self.level.rule == "sgd" else output + signal
        return torch.baddbmm(weight, pulled.mT, writes, alpha=-1)

    def state_after(self, weights: _Weights, grid: _Grid) -> ContinuumLevelState:
        batch, length, width = grid.inputs.shape
        size = self.level.chunk_size
        if grid.lengths is None:
            pending = length % size
            position = torch.full((batch,), pending, device=grid.inputs.device)
            # state outlives the call: no views of parameters or of the whole sequence
            pending_inputs = grid.inputs
            if pending < length:
                pending_inputs = pending_inputs[:, length - pending :].clone()
            pending_rates = grid.rates[:, length - pending :].clone()
        else:
            position = grid.lengths % size
            place = torch.arange(int(position.max()), device=position.device)
            taken = place < position[:, None]
            slots = ((grid.lengths - position)[:, None] + place).clamp_max(length - 1)
            pending_inputs = grid.inputs.gather(1, slots[..., None].expand(-1, -1, width)) * taken[..., None]
            pending_rates = grid.rates.gather(1, slots) * taken
        fast = (
            w if w is None or w.ndim == 3 else w.to(grid.inputs.dtype).expand(batch, -1, -1).clone()
            for w in weights
        )
        return ContinuumLevelState(*fast, pending_inputs, pending_rates, position)


def _aligned_grid(inner: torch.Tensor, rates: torch.Tensor, before: ContinuumLevelState | None) -> _Grid:
    inputs = inner.to(rates.dtype)
    first = 0 if before is None else int(before.position[0])
    if first:
        inputs = torch.cat((before.pending_inputs, inputs), dim=1)
        rates = torch.cat((before.pending_rates, rates), dim=1)
    return _Grid(inputs, rates, inner, first, None)


def _ragged_alignment(
    before: ContinuumLevelState | None, mask: torch.Tensor | None, inner: torch.Tensor
) -> ChunkAlignment | None:
    """Where the tokens go on the grid; None where all rows are full and go on from the same position."""
    if mask is None:
        if before is None or len(set(before.position.tolist())) == 1:
            return None
        mask = torch.ones(inner.shape[:2], dtype=torch.bool, device=inner.device)
    position = mask.new_zeros(mask.shape[0], dtype=torch.int64) if before is None else before.position
    return align_batch(mask, position)


def _ragged_grid(
    inner: torch.Tensor,
    rates: torch.Tensor,
    before: ContinuumLevelState | None,
    alignment: ChunkAlignment,
) -> _Grid:
    inputs, rates = alignment.gather(inner.to(rates.dtype)), alignment.gather(rates)
    first = 0
    if before is not None:
        first = int(before.position.min())
        pending = before.pending_rates.shape[1]
        taken = torch.arange(pending, device=inner.device) < before.position[:, None]
        empty = inputs.shape[1] - pending
        # tokens of the state and of this call have different slots
        inputs = inputs + F.pad(before.pending_inputs * taken[..., None], (0, 0, 0, empty))
        rates = rates + F.pad(before.pending_rates * taken, (0, empty))
    return _Grid(inputs, rates, inputs[:, first:].to(inner.dtype), first, alignment.stop)
