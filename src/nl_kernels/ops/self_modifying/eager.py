"""Chunked ``self_modifying_memory`` in PyTorch: batched over memories and heads; a loop over chunks only.

Inside, the five memories of all N = sequences × heads rows lie memory first: first layers [5N, h, D], last
layers [3N, D, h] (key, value, memory) and [2N, 1, h] (rate, retention), tokens of all memories [5N, c,
width].
"""

from __future__ import annotations

import dataclasses

import torch

from nl_kernels.chunk_recompute import (
    Footprint,
    Segment,
    State,
    plan_segments,
    run_segments,
    run_with_adjoint,
)
from nl_kernels.delta_chunk import (
    LayerChunk,
    LayerWrites,
    chunk_coefficients,
    erase_inverse,
    read_layer,
    split_coefficients,
    write_layer,
)
from nl_kernels.hidden_layer import Hidden, hidden_gradient, hidden_layer
from nl_kernels.memory_rule import MemoryRule, bound_length, l2_normalize
from nl_kernels.ops.self_modifying.eager_backward import TwoLayerChunks
from nl_kernels.ops.self_modifying.eager_linear import ChunkOptions, linear_footprint, run_linear
from nl_kernels.ops.self_modifying.rows import (
    ABSENT,
    collect_output,
    collect_state,
    memory_first,
    place_tokens,
    sequence_first,
)
from nl_kernels.ops.self_modifying.state import MemoryStack, SelfModifyingState, map_stack

KEPT_BYTES = 40 << 20  # of activations that are not recomputed: about a dozen chunks of 16 at 4 heads of 64


@torch.compiler.disable(
    reason="self_modifying_memory's eager path is a loop over chunks, which a trace would unroll; "
    "without fullgraph=True it runs as it is"
)
def self_modifying_memory_eager(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    momentum: torch.Tensor | None,
    anchor: MemoryStack,
    state: SelfModifyingState,
    *,
    rule: MemoryRule,
    rate_max: torch.Tensor,
    rate_bias: torch.Tensor,
    retention_bias: torch.Tensor,
    read: str,
    chunk_size: int,
    generator_chunk_size: int,
    detach_targets: bool,
    truncate_every: int | None,
    mask: torch.Tensor | None,
    at_boundary: bool,
    checkpoint_every: int | None,
) -> tuple[torch.Tensor, SelfModifyingState]:
    """As :func:`self_modifying_memory_reference`, by chunks of the faster clock.

    Args:
        at_boundary: the state is known to be at a boundary for every sequence (spares reading its positions).
        checkpoint_every: chunks between the states kept for the backward pass.
    """
    batch, _, heads, _ = query.shape
    period, chunk = max(chunk_size, generator_chunk_size), min(chunk_size, generator_chunk_size)
    placed = place_tokens(
        query,
        key_input,
        value_input,
        gate_input,
        momentum,
        mask,
        state.position,
        period=period,
        at_boundary=at_boundary,
    )
    applied = (
        None if placed.applied is None else placed.applied[:, :, None].expand(*placed.applied.shape, heads)
    )
    inputs = (placed.key_input, placed.value_input, l2_normalize(placed.query), placed.gate_input)

    snapshot = ABSENT if at_boundary else memory_first(state.snapshot)
    velocity = ABSENT if state.momentum is None else memory_first(state.momentum)
    carried = (*memory_first(state.running), *velocity, *snapshot)
    gates = [x.repeat(batch)[:, None] for x in (rate_max, rate_bias, retention_bias)]
    constants = (*(memory_first(anchor) if rule.anchored else ABSENT), *gates)
    options = ChunkOptions(
        rule,
        read,
        chunk_size,
        generator_chunk_size,
        None if truncate_every is None else chunk * truncate_every,
        placed.grid.for_heads(heads),
    )

    def plan(footprint: Footprint) -> list[Segment]:
        return plan_segments(placed.query.shape[1], chunk, placed.grid.offset, checkpoint_every, footprint)

    written_out = is_written_out(state, detach_targets)
    if written_out and state.running.first is None:
        sequences = _rows(*inputs, applied)
        segments = plan(linear_footprint(state.running, chunk))
        o, carried = run_linear(options, segments, carried, constants, sequences)
    else:
        inputs = torch.stack([*inputs, inputs[-1]], 3)
        segments = plan(_footprint(state.running, chunk, anchor.last.shape[-1]))
        if written_out:
            sequences = _rows(inputs, applied)
            weights = (*carried[:3], *carried[6:])
            o, after = run_with_adjoint(TwoLayerChunks(options), segments, weights, constants, sequences)
            carried = (*after[:3], *ABSENT, *after[3:])
        else:
            chunks = _Chunks(options, detach_targets)
            sequences = _rows(inputs, placed.momentum, applied)
            o, carried = run_segments(chunks, segments, carried, constants, sequences)

    o = collect_output(o.unflatten(0, (batch, heads)).transpose(1, 2), placed)
    stacks = (sequence_first(MemoryStack(*carried[i : i + 3]), batch, heads) for i in (0, 3, 6))
    return o, collect_state(*stacks, placed)


def is_written_out(state: SelfModifyingState, detach_targets: bool) -> bool:
    """Whether the derivative is written out for this case; autograd does the others."""
    return state.momentum is None and detach_targets


def _rows(*sequences: torch.Tensor | None) -> State:
    """[B, S, H, ..] as [B · H, S, ..]."""
    return tuple(None if x is None else x.transpose(1, 2).flatten(0, 1) for x in sequences)


def _footprint(state: MemoryStack, size: int, hidden: int) -> Footprint:
    """What the backward pass needs: counts of tensors of each kind in ``eager_backward.py``."""
    rows, width = state.last.shape[:2].numel(), state.last.shape[-2]
    numbers = sum(x.numel() for x in state if x is not None)
    chunk = 2 * numbers + rows * size * (75 * hidden + 22 * width + 20 * size)
    item = state.last.element_size()
    return Footprint(item * numbers, item * chunk, KEPT_BYTES)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """One segment of chunks, for :func:`run_segments`."""

    options: ChunkOptions
    detach_targets: bool

    def __call__(
        self, segment: Segment, state: State, constants: State, sequences: State
    ) -> tuple[State, torch.Tensor]:
        running, velocity, snapshot = (MemoryStack(*state[i : i + 3]) for i in (0, 3, 6))
        anchor, gates = MemoryStack(*constants[:3]), constants[3:]
        inputs, momenta, applied = self._by_chunk(sequences, segment)
        outputs = []
        for i in range(segment.chunks):
            o, after, velocity_after = self._advance(
                inputs[i], momenta[i], applied[i], running, velocity, snapshot, anchor, gates
            )
            outputs.append(o + inputs[i][2 * len(o) : 3 * len(o)] if self.options.rule.residual else o)
            end = segment.slot + (i + 1) * segment.length
            snapshot = self._refresh(end, after, running if snapshot.last is None else snapshot)
            running, velocity = after, velocity_after
            if self.options.truncate_period is not None:
                met = self.options.grid.meets_boundary(end, self.options.truncate_period)
                running, velocity, snapshot = (_forget(met, x) for x in (running, velocity, snapshot))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return (*running, *velocity, *snapshot), output

    def _advance(self, inputs, momentum, applied, running, velocity, snapshot, anchor, gates):
        """M_memory's reads [N, c, D] without residual, and the stacks after the chunk."""
        base = running if snapshot.last is None else snapshot
        if anchor.last is not None:
            base = map_stack(torch.add, base, anchor)
        *generated, o = self._generate(inputs, base, gates)
        layers = self._layers(*generated, momentum, applied, base)
        after = [
            (None, None, None) if layer is None else write_layer(state, momentum, layer)
            for state, momentum, layer in zip(running, velocity, layers)
        ]
        after, velocity_after, written = (MemoryStack(*parts) for parts in zip(*after))
        if self.options.read == "running":
            q = inputs[2 * len(o) : 3 * len(o)]
            o = self._read_running(q, layers, written, running, velocity, anchor)
        return o, after, velocity_after

    def _by_chunk(self, sequences: State, segment: Segment):
        """By chunk: inputs in the order of the stack [5N, c, D], momenta [N, c] and masks [N, c]."""
        inputs, momentum, applied = (
            None if x is None else x.unflatten(1, (segment.chunks, segment.length)) for x in sequences
        )
        stacked = inputs.permute(1, 3, 0, 2, 4).flatten(1, 2)
        none = [None] * segment.chunks
        return (
            stacked.unbind(0),
            none if momentum is None else momentum.unbind(1),
            none if applied is None else applied.unbind(1),
        )

    def _apply(self, base: MemoryStack, x: torch.Tensor) -> tuple[Hidden | None, torch.Tensor, torch.Tensor]:
        """f(x) of every memory for x [5N, c, D]: the hidden layer, [3N, c, D] and [2N, c, 1]."""
        hidden = None
        if base.first is not None:
            hidden = hidden_layer(torch.bmm(x, base.first.transpose(1, 2)), self.options.rule)
            x = hidden.value
        wide, narrow = x.split([len(base.last), len(base.gate)])
        return (
            hidden,
            torch.bmm(wide, base.last.transpose(1, 2)),
            torch.bmm(narrow, base.gate.transpose(1, 2)),
        )

    def _generate(self, inputs, base: MemoryStack, gates):
        """k, v [N, c, D], rate, log decay [N, c] and M_memory(q) [N, c, D], all at the snapshot."""
        _, wide, narrow = self._apply(base, inputs)
        rows = len(gates[0])
        k, v, o = wide.split(rows)
        if self.options.rule.projection_residual:
            k, v = k + inputs[:rows], v + inputs[rows : 2 * rows]
        rate_max, rate_bias, retention_bias = gates
        rate, retention = narrow[..., 0].split(rows)
        rate = rate_max * torch.sigmoid(rate + rate_bias)
        log_decay = torch.nn.functional.logsigmoid(retention + retention_bias)
        return l2_normalize(k), v, rate, log_decay, o

    def _layers(self, k, v, rate, log_decay, momentum, applied, base: MemoryStack) -> MemoryStack:
        """What each layer of the stack takes in over the chunk, as :class:`LayerChunk`."""
        rows, size = k.shape[:2]
        if applied is not None:
            rate, log_decay = rate * applied, log_decay * applied
            momentum = None if momentum is None else momentum.where(applied, 1)
        share = self.options.rule.share(momentum)
        share = None if share is None else share[..., None].repeat(5, 1, 1)
        x = torch.cat([k, v], 1).repeat(5, 1, 1)
        hidden, wide, narrow = self._apply(base, x)
        wide_error, narrow_error = self._errors(k, v, wide, narrow)
        inputs = x if hidden is None else hidden.value
        signals = None
        if hidden is not None:
            back = torch.cat([torch.bmm(wide_error, base.last), narrow_error * base.gate])
            signals = [hidden_gradient(back, _tokens(hidden, slice(None, size)), self.options.rule)]
        if not self.detach_targets:
            # Each token's target writes too: a second pseudo-token, that neither decays nor erases.
            wide_error, narrow_error = (_interleave(e, -e) for e in (wide_error, narrow_error))
            if hidden is not None:
                signals.append(hidden_gradient(-back, _tokens(hidden, slice(size, None)), self.options.rule))
            log_decay = _interleave(log_decay, torch.zeros_like(log_decay))
            if momentum is not None:
                momentum = _interleave(momentum, torch.ones_like(momentum))
                counted = torch.ones_like(momentum[:, :size]) if applied is None else applied.to(momentum)
                applied = _interleave(torch.zeros_like(counted), counted)
        if applied is not None:
            applied = applied.to(k.dtype).repeat(5, 1)
        momentum = None if momentum is None else momentum.repeat(5, 1)
        coefficients = chunk_coefficients(log_decay.repeat(5, 1), momentum, applied)
        rate = rate[..., None].repeat(5, 1, 1)

        keys, key_rate, key_erase = self._prepare(x, rate, share, size, first_layer=True)
        # The keys are the same for all memories: one gram matrix and one inverse.
        shared = coefficients.map(lambda part: part[:rows])
        gram = inverse = None
        if key_erase is not None:
            gram = torch.bmm(keys[:rows], keys[:rows].transpose(1, 2))
            inverse = erase_inverse(gram, key_erase[:rows], shared.decay).repeat(5, 1, 1)
            gram = gram.repeat(5, 1, 1)
        if hidden is None:
            first, inputs, rate, erase = None, keys, key_rate, key_erase
        else:
            signal = signals[0] if self.detach_targets else _interleave(*signals)
            first = LayerChunk(keys, -key_rate * signal, key_erase, gram, inverse, coefficients)
            inputs, rate, erase = self._prepare(inputs, rate, share, size, first_layer=False)
            gram = inverse = None
            if erase is not None:
                gram = torch.bmm(inputs, inputs.transpose(1, 2))
                inverse = erase_inverse(gram, erase, coefficients.decay)
        groups = [3 * rows, 2 * rows]
        parts = [x if x is None else x.split(groups) for x in (inputs, rate, erase, gram, inverse)]
        inputs, rate, erase, gram, inverse = ((None, None) if x is None else x for x in parts)
        last, gate = (
            LayerChunk(inputs[i], -rate[i] * error, erase[i], gram[i], inverse[i], coefficients_i)
            for i, (error, coefficients_i) in enumerate(
                zip((wide_error, narrow_error), split_coefficients(coefficients, groups))
            )
        )
        return MemoryStack(first, last, gate)

    def _errors(self, k, v, wide, narrow):
        """The bounded errors of key, value and memory [3N, c, D] and of the gates [2N, c, 1]."""
        rule, size = self.options.rule, k.shape[1]
        target = -v if rule.target_residual else torch.zeros_like(v)
        projected = target + k if rule.projection_residual else target
        read = target + k if rule.residual else target
        error = wide[:, :size] - wide[:, size:] + torch.cat([projected, projected, read])
        gate_error = narrow[:, :size] - narrow[:, size:]
        return bound_length(error, rule.error_bound), bound_length(gate_error, rule.error_bound)

    def _prepare(self, x, rate, share, size: int, *, first_layer: bool):
        """A layer's inputs, the rates of its writes and β, from x [5N, 2c, in], keys first.

        β is ``None`` if the layer does not erase. Momentum leaves ``share`` of a write (``None``: all).
        """
        key, value = x[:, :size], x[:, size:]
        erases = self.options.rule.erases(first_layer)
        if erases and self.options.rule.proximal:
            rate = rate / (1 + rate * key.square().sum(-1, keepdim=True))
        written = rate if share is None else rate * share
        if self.detach_targets:
            return key, written, rate if erases else None
        erase = _interleave(rate, torch.zeros_like(rate)) if erases else None
        return _interleave(key, value), _interleave(written, written), erase

    def _read_running(self, q, layers: MemoryStack, written: MemoryStack, before, velocity, anchor):
        """M_memory of the query after each token, in every layer; [N, c, D]."""
        rows = len(q)
        memory = slice(2 * rows, 3 * rows)
        y = q
        for name in ("first", "last"):
            layer, writes = getattr(layers, name), getattr(written, name)
            if layer is None:
                continue
            if name == "last" and layers.first is not None:
                y = hidden_layer(y, self.options.rule).value
            coefficients = layer.coefficients.map(lambda part: part[memory])
            if not self.detach_targets:
                coefficients = coefficients.map(lambda part: part[:, 1::2])
            state, momentum, fixed = (
                None if part is None else part[memory]
                for part in (getattr(before, name), getattr(velocity, name), getattr(anchor, name))
            )
            writes = LayerWrites(*(None if part is None else part[memory] for part in writes))
            read = read_layer(y, state, momentum, layer.x[memory], writes, coefficients)
            y = read if fixed is None else read + torch.bmm(y, fixed.transpose(1, 2))
        return y

    def _refresh(self, end: int, running: MemoryStack, old: MemoryStack) -> MemoryStack:
        """The snapshot after the chunk that ends at slot ``end``; empty where it equals the running state."""
        own = self.options.grid.meets_boundary(end, self.options.chunk_size)
        others = self.options.grid.meets_boundary(end, self.options.generator_chunk_size)
        if own is True and others is True:
            return MemoryStack(None, None, None)
        if own is False and others is False:
            return old
        pick = [others, others, own, others, others]
        return MemoryStack(
            None if running.first is None else _pick(pick, running.first, old.first),
            _pick(pick[:3], running.last, old.last),
            _pick(pick[3:], running.gate, old.gate),
        )


def _forget(met: bool | torch.Tensor, stack: MemoryStack) -> MemoryStack:
    """The same values without their history where a truncation boundary is met."""
    if met is False:
        return stack
    if met is True:
        return map_stack(torch.Tensor.detach, stack)
    return map_stack(lambda x: _pick([met] * (len(x) // len(met)), x.detach(), x), stack)


def _pick(met: list, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """By memory, ``new`` where its entry of ``met`` is true, else ``old``."""
    if all(m is True for m in met):
        return new
    if all(m is False for m in met):
        return old
    parts = [
        torch.where(m[:, None, None], a, b) if isinstance(m, torch.Tensor) else a if m else b
        for m, a, b in zip(met, new.chunk(len(met)), old.chunk(len(met)))
    ]
    return torch.cat(parts)


def _tokens(hidden: Hidden, tokens: slice) -> Hidden:
    return Hidden(*(None if part is None else part[:, tokens] for part in hidden))


def _interleave(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a_1, b_1, a_2, b_2, … along the second dimension."""
    return torch.stack([a, b], 2).flatten(1, 2)
