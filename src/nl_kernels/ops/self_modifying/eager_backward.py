"""The loop over chunks of the self-modifying memory with two-layer memories, its derivative written out.

Without momentum and with constant targets. Layout as in ``eager.py``: the five
memories of N rows memory first. Names are those of the README; an adjoint is called ``at_…`` or ``grad_…``.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from nl_kernels.chunk_recompute import Segment, State, chunk_of
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
from nl_kernels.hidden_layer import (
    Activated,
    Signal,
    activated,
    bound_adjoint,
    error_signal,
    hidden_adjoint,
    length_factor,
    row_dot,
    signal_adjoint,
)
from nl_kernels.memory_rule import MemoryRule, inverse_norm
from nl_kernels.ops.self_modifying.eager_linear import ChunkOptions
from nl_kernels.ops.self_modifying.state import MemoryStack, map_stack
from nl_kernels.snapshot import Met, snapshot_adjoint, take_snapshot

MEMORIES, WIDE = 5, 3  # all memories, and those whose output is as wide as their input


class _Made(NamedTuple):
    """What one chunk computes and its adjoint needs."""

    base: MemoryStack
    served: Activated
    key_scale: torch.Tensor
    gate: torch.Tensor  # before the sigmoids [2N, c]
    pair: torch.Tensor  # k, then v, for every memory [5N, 2c, D]
    hidden: Activated
    errors: tuple[torch.Tensor, torch.Tensor]
    factors: tuple[torch.Tensor | None, torch.Tensor | None]
    difference: torch.Tensor
    signal: Signal
    decay: Spread  # for N rows
    decays: Spread  # for 5N rows: parts of one value per token only
    rate: torch.Tensor
    key_rate: torch.Tensor
    hidden_rate: torch.Tensor
    key_erase: Erase | None
    hidden_erase: Erase | None
    first: Write
    last: Write
    gate_write: Write
    probe: Activated | None
    reads: tuple[Read, Read] | None


@dataclasses.dataclass(frozen=True)
class TwoLayerChunks:
    """For :func:`~nl_kernels.chunk_recompute.run_with_adjoint`.

    State: stacks of running weights and of the snapshot (its entries are ``None`` where it is the running
    weights). Constants: the anchor's stack (or ``None`` in its places), then the gates' largest rate, bias of
    the rate and of the retention [N, 1]. Sequences: inputs [N, S, 5, D] of key, value, memory (the query),
    rate and retention, and ``applied`` [N, S] or ``None``.
    """

    options: ChunkOptions

    def forward(self, segment: Segment, state: State, constants: State, sequences: State, keep: bool):
        rule = self.options.rule
        running, snapshot = MemoryStack(*state[:3]), MemoryStack(*state[3:])
        anchor, gates = MemoryStack(*constants[:3]), constants[3:]
        outputs, kept = [], []
        for i in range(segment.chunks):
            inputs, applied = _memory_first(*chunk_of(sequences, segment, i))
            o, after, made = _forward(
                rule, self.options.read, inputs, gates, applied, running, snapshot, anchor, keep=keep
            )
            outputs.append(o + inputs[2 * len(o) : 3 * len(o)] if rule.residual else o)
            if keep:
                kept.append((running, snapshot.last is None, made))
            mets = self._mets(segment, i, len(o))
            snapshot = MemoryStack(*(take_snapshot(*x) for x in zip(mets, after, running, snapshot)))
            running = after
        return (*running, *snapshot), outputs, kept

    def backward(
        self,
        segment: Segment,
        made: list,
        constants: State,
        sequences: State,
        grad_state: State,
        grad_output: torch.Tensor | None,
        grad_constants: State,
        grad_sequences: State,
    ) -> State:
        anchor, rate_max = MemoryStack(*constants[:3]), constants[3]
        rows = len(rate_max)
        grads, snapshot = grad_state[:3], grad_state[3:]
        for i in reversed(range(segment.chunks)):
            inputs, applied = _memory_first(*chunk_of(sequences, segment, i))
            (grad_o,) = chunk_of((grad_output,), segment, i)
            grads, snapshot = (self._remembered(segment, i, part) for part in (grads, snapshot))
            mets = self._mets(segment, i, rows)
            grads, old = zip(*(snapshot_adjoint(*x) for x in zip(mets, grads, snapshot)))
            running, fresh, chunk = made[i]
            made[i] = None
            grads = MemoryStack(*(torch.zeros_like(x) if g is None else g for g, x in zip(grads, running)))
            grad_inputs, grad_gates, grads, base, grad_anchor = _backward(
                self.options.rule,
                self.options.read,
                inputs,
                rate_max,
                applied,
                running,
                anchor,
                chunk,
                grad_o,
                grads,
            )
            if self.options.rule.residual and grad_o is not None:
                grad_inputs[2 * rows : 3 * rows] += grad_o
            (place,) = chunk_of(grad_sequences[:1], segment, i)
            if place is not None:
                place.copy_(grad_inputs.unflatten(0, (MEMORIES, rows)).permute(1, 2, 0, 3))
            for total, grad in zip(grad_constants, (*grad_anchor, *grad_gates)):
                if total is not None:
                    total += grad
            snapshot = [b if o is None else b + o for b, o in zip(base, old)]
            if fresh:
                grads = [g.add_(s) for g, s in zip(grads, snapshot)]
                snapshot = [None] * 3
        return (*grads, *snapshot)

    def _mets(self, segment: Segment, i: int, rows: int) -> list[Met]:
        """Where each part of the stack takes its snapshot anew after the i-th chunk."""
        own, others = self.options.clocks(segment, i)
        if isinstance(own, bool) and own is others:
            return [own] * 3
        device = self.options.grid.position.device
        own, others = (
            torch.as_tensor(met, device=device).reshape(-1, 1, 1).expand(rows, 1, 1) for met in (own, others)
        )
        met = torch.cat([others, others, own, others, others])
        return [met, met[: WIDE * rows], met[WIDE * rows :]]

    def _remembered(self, segment: Segment, i: int, grads) -> list[torch.Tensor | None]:
        """Gradients after the i-th chunk without what the truncation cuts there."""
        cut = self.options.truncated(segment, i)
        if isinstance(cut, bool):
            return [None] * 3 if cut else list(grads)
        counts = (MEMORIES, WIDE, MEMORIES - WIDE)
        return [
            None if g is None else g.masked_fill(cut.repeat(count)[:, None, None], 0)
            for g, count in zip(grads, counts)
        ]


def _memory_first(inputs: torch.Tensor, applied: torch.Tensor | None):
    """A chunk's inputs [N, c, 5, D] in the order of the stack, [5N, c, D]."""
    return inputs.permute(2, 0, 1, 3).flatten(0, 1), applied


def _forward(rule, read, inputs, gates, applied, running, snapshot, anchor, *, keep: bool):
    rate_max, rate_bias, retention_bias = gates
    rows, size = len(rate_max), inputs.shape[1]
    wide = WIDE * rows
    base = running if snapshot.last is None else snapshot
    if anchor.last is not None:
        base = map_stack(torch.add, base, anchor)

    # The memories make k, v and the gates, and M_memory is read.
    served = activated(torch.bmm(inputs, base.first.transpose(1, 2)), rule, sloped=keep, curved=False)
    made = torch.bmm(served.value[:wide], base.last.transpose(1, 2))
    gate = torch.bmm(served.value[wide:], base.gate.transpose(1, 2))[..., 0]
    pair = inputs.new_empty(MEMORIES, rows, 2 * size, inputs.shape[2])
    k, v = pair[0, :, :size], pair[0, :, size:]
    o = made[2 * rows :]
    if rule.projection_residual:
        made[: 2 * rows] += inputs[: 2 * rows]
    key_scale = inverse_norm(made[:rows])
    torch.mul(made[:rows], key_scale, out=k)
    v.copy_(made[rows : 2 * rows])
    pair[1:] = pair[:1]
    pair = pair.view(MEMORIES * rows, 2 * size, -1)
    gate[:rows] += rate_bias
    gate[rows:] += retention_bias
    rate = torch.sigmoid(gate[:rows]).mul_(rate_max)
    log_decay = torch.nn.functional.logsigmoid(gate[rows:])
    if applied is not None:
        rate, log_decay = rate.mul_(applied), log_decay.mul_(applied)
    rate = rate[..., None]

    # Every memory's targets, errors, and what reaches its hidden layer.
    hidden = activated(torch.bmm(pair, base.first.transpose(1, 2)), rule, curved=keep)
    keys = hidden.rows(slice(None, size))
    difference = keys.value - hidden.value[:, size:]
    error = torch.bmm(difference[:wide], base.last.transpose(1, 2))
    _add_residuals(error.view(WIDE, rows, size, -1), k, v, rule)
    gate_error = torch.bmm(difference[wide:], base.gate.transpose(1, 2))
    factors = length_factor(error, rule.error_bound), length_factor(gate_error, rule.error_bound)
    if rule.error_bound is not None:
        error.mul_(factors[0])
        gate_error.mul_(factors[1])
    back = torch.empty_like(difference)
    torch.bmm(error, base.last, out=back[:wide])
    torch.mul(gate_error, base.gate, out=back[wide:])
    signal = error_signal(back, keys, rule)

    # The writes.
    decay = decay_products(log_decay)
    decays = Spread(
        *(
            _each(part) if name in ("before", "to_end", "final") else None
            for name, part in zip(Spread._fields, decay)
        )
    )
    x = pair[:, :size]
    rates = _each(rate)
    key_rate = hidden_rate = rate
    if rule.proximal and rule.erases(True):
        key_rate = proximal_rate(rate, k)
    hidden_rate = rates
    if rule.proximal and rule.erases(False):
        hidden_rate = proximal_rate(rates, keys.value)
    key_erase, hidden_erase = _erases(rule, k, keys.value, key_rate, hidden_rate, decay.strict)
    first_rate = rates if key_rate is rate else _each(key_rate)
    first, first_write = write_forward(running.first, x, signal.value, first_rate, decays, key_erase)
    last, last_write = write_forward(
        running.last, *_part(slice(None, wide), keys.value, error, hidden_rate, decays, hidden_erase)
    )
    gate_after, gate_write = write_forward(
        running.gate, *_part(slice(wide, None), keys.value, gate_error, hidden_rate, decays, hidden_erase)
    )

    probe = reads = None
    if read == "running":
        memory = slice(2 * rows, wide)
        fixed = [None if part is None else part[memory] for part in anchor[:2]]
        z, first_read = read_forward(
            inputs[memory], running.first[memory], fixed[0], x[memory], first_write.written[memory], decay
        )
        probe = activated(z, rule, sloped=keep, curved=False)
        o, last_read = read_forward(
            probe.value,
            running.last[memory],
            fixed[1],
            keys.value[memory],
            last_write.written[memory],
            decay,
        )
        reads = (first_read, last_read)
    after = MemoryStack(first, last, gate_after)
    if not keep:
        return o, after, None
    saved = _Made(
        base,
        served,
        key_scale,
        gate,
        pair,
        hidden,
        (error, gate_error),
        factors,
        difference,
        signal,
        decay,
        decays,
        rate,
        first_rate,
        hidden_rate,
        key_erase,
        hidden_erase,
        first_write,
        last_write,
        gate_write,
        probe,
        reads,
    )
    return o, after, saved


def _each(part: torch.Tensor) -> torch.Tensor:
    """The same [N, ..] for every memory, [5N, ..]."""
    return torch.cat([part] * MEMORIES)  # takes a fifth of the time of ``repeat``


def _part(which: slice, x, signal, rate, decays: Spread, erase: Erase | None):
    """The arguments of a write for some rows; the signal has them alone."""
    return (
        x[which],
        signal,
        rate[which],
        Spread(*(None if part is None else part[which] for part in decays)),
        None if erase is None else Erase(erase.gram[which], erase.inverse[which]),
    )


def _add_residuals(error: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: MemoryRule) -> None:
    """Add to f(k) − f(v) [3, N, c, D] of key, value and memory what their residuals contribute."""
    if rule.target_residual:
        error -= v
    if rule.projection_residual:
        error[:2] += k
    if rule.residual:
        error[2] += k


def _erases(rule, k, hidden, key_rate, hidden_rate, strict) -> tuple[Erase | None, Erase | None]:
    """:class:`Erase` for the first layers [5N], whose keys are the same, and for the last ones [5N]."""
    if not rule.erases(True):
        return None, None
    rows, size = k.shape[:2]
    if not rule.erases(False):
        shared = erase_matrices(torch.bmm(k, k.transpose(1, 2)), key_rate, strict)
        return Erase(*(_each(part) for part in shared)), None
    gram = k.new_empty((1 + MEMORIES) * rows, size, size)
    torch.bmm(k, k.transpose(1, 2), out=gram[:rows])
    torch.bmm(hidden, hidden.transpose(1, 2), out=gram[rows:])
    rates = torch.cat([key_rate, hidden_rate])
    both = erase_matrices(gram, rates, torch.cat([strict] * (1 + MEMORIES)))
    return (
        Erase(*(_each(part[:rows]) for part in both)),
        Erase(*(part[rows:] for part in both)),
    )


def _backward(rule, read, inputs, rate_max, applied, running, anchor, made, grad_o, grad_after):
    rows, size = len(rate_max), inputs.shape[1]
    wide = WIDE * rows
    memory = slice(2 * rows, wide)
    base, hidden, decay, decays = made.base, made.hidden, made.decay, made.decays
    keys = hidden.rows(slice(None, size))
    x = made.pair[:, :size]
    error, gate_error = made.errors
    grad_anchor = [None] * 3
    decay_parts: dict[str, torch.Tensor] = {}

    def sum_memories(part: torch.Tensor) -> torch.Tensor:
        return part.view(MEMORIES, rows, *part.shape[1:]).sum(0)

    # The running read.
    at_written = [None, None]
    if read == "running" and grad_o is not None:
        fixed = [None if part is None else part[memory] for part in anchor[:2]]
        last = read_adjoint(
            grad_o,
            made.probe.value,
            running.last[memory],
            fixed[1],
            keys.value[memory],
            made.last.written[memory],
            decay,
            made.reads[1],
        )
        first = read_adjoint(
            hidden_adjoint(last.queries, made.probe),
            inputs[memory],
            running.first[memory],
            fixed[0],
            x[memory],
            made.first.written[memory],
            decay,
            made.reads[0],
        )
        at_written = [torch.zeros_like(made.first.written), torch.zeros_like(made.last.written)]
        at_written[0][memory], at_written[1][memory] = first.written, last.written
        decay_parts = {"after": last.after + first.after, "full": last.full + first.full}

    # The writes of the last layers and the gates.
    grad_hidden = torch.empty_like(hidden.value)
    at_keys, at_values = grad_hidden[:, :size], grad_hidden[:, size:]
    parts = []
    for which, state, grad, outer, write, signal in (
        (slice(None, wide), running.last, grad_after.last, at_written[1], made.last, error),
        (slice(wide, None), running.gate, grad_after.gate, None, made.gate_write, gate_error),
    ):
        x_, _, rate_, decays_, erase_ = _part(
            which, keys.value, signal, made.hidden_rate, decays, made.hidden_erase
        )
        found = write_adjoint(grad, outer, state, x_, write, rate_, decays_, erase_)
        at_keys[which] = found.x
        parts.append(found)
    at_last, at_gate = parts
    first_part = write_adjoint(
        grad_after.first, at_written[0], running.first, x, made.first, made.key_rate, decays, made.key_erase
    )
    hidden_parts = {
        name: torch.cat([getattr(at_last, name), getattr(at_gate, name)])
        for name in ("rate", "strict", "gram", "before", "to_end", "final")
        if getattr(at_last, name) is not None
    }
    if "gram" in hidden_parts:
        weighted = hidden_parts["gram"].view(MEMORIES, rows, size, size).mul_(decay.strict).flatten(0, 1)
        at_keys += gram_adjoint(weighted, keys.value)
    for name in ("strict", "before", "to_end", "final"):
        if getattr(first_part, name) is not None:
            both = getattr(first_part, name)
            if name in hidden_parts:
                both = both + hidden_parts[name]
            decay_parts[name] = sum_memories(both)
    grad_hidden_rate = hidden_parts["rate"]
    if made.hidden_erase is not None and rule.proximal:
        rates = _each(made.rate)
        grad_hidden_rate, extra = proximal_adjoint(grad_hidden_rate, rates, keys.value, made.hidden_rate)
        at_keys += extra
    grad_rate = sum_memories(grad_hidden_rate)
    grad_key_rate = sum_memories(first_part.rate)
    k = x[:rows]
    at_k = torch.zeros_like(k)
    if made.key_erase is not None:
        at_k = gram_adjoint(sum_memories(first_part.gram).mul_(decay.strict), k)
        if rule.proximal:
            grad_key_rate, extra = proximal_adjoint(grad_key_rate, made.rate, k, made.key_rate[:rows])
            at_k += extra
    grad_rate += grad_key_rate
    if at_written[0] is not None:
        at_k += first.x
        at_keys[memory] += last.x

    # The error signals.
    at_back, at_value, at_slope, radial = signal_adjoint(first_part.signal, made.signal, keys, rule)
    if at_value is not None:
        at_keys += at_value
    at_error = at_last.signal.baddbmm_(at_back[:wide], base.last.transpose(1, 2))
    at_gate_error = at_gate.signal.baddbmm_(at_back[wide:], base.gate.transpose(1, 2))
    grad_last = torch.bmm(error.transpose(1, 2), at_back[:wide])
    grad_gate = torch.bmm(gate_error.transpose(1, 2), at_back[wide:])
    at_error = bound_adjoint(at_error, error, made.factors[0], rule.error_bound)
    at_gate_error = bound_adjoint(at_gate_error, gate_error, made.factors[1], rule.error_bound)
    grad_last.baddbmm_(at_error.transpose(1, 2), made.difference[:wide])
    grad_gate.baddbmm_(at_gate_error.transpose(1, 2), made.difference[wide:])
    torch.bmm(at_error, base.last, out=at_values[:wide])
    torch.mul(at_gate_error, base.gate, out=at_values[wide:])
    at_keys += at_values
    at_values.neg_()

    # The hidden layers at k and v, and back to k and v.
    at_z = hidden_adjoint(grad_hidden, hidden, radial)
    at_z[:, :size] += at_slope
    at_pair = torch.bmm(at_z, base.first)
    at_pair[:, :size] += first_part.x
    at_pair = sum_memories(at_pair)
    grad_first = torch.bmm(at_z.transpose(1, 2), made.pair)
    at_made = inputs.new_empty(wide, *inputs.shape[1:])
    at_k += at_pair[:, :size]
    at_v = at_made[rows : 2 * rows]
    at_v.copy_(at_pair[:, size:])
    by_memory = at_error.view(WIDE, rows, size, -1)
    if rule.target_residual:
        at_v -= by_memory.sum(0)
    if rule.projection_residual:
        at_k += by_memory[:2].sum(0)
    if rule.residual:
        at_k += by_memory[2]

    # The gates.
    grad_decay = decay_adjoint(size, inputs, **decay_parts)
    grad_rate = grad_rate[..., 0]
    if applied is not None:
        grad_rate, grad_decay = grad_rate * applied, grad_decay * applied
    fraction = torch.sigmoid(made.gate[:rows])
    grad_rate_max = (grad_rate * fraction).sum(1, keepdim=True)
    at_made_gate = torch.cat(
        [
            grad_rate * rate_max * fraction * (1 - fraction),
            grad_decay * torch.sigmoid(-made.gate[rows:]),
        ]
    )
    biases = at_made_gate.sum(1, keepdim=True).split(rows)
    at_made_gate = at_made_gate[..., None]

    # The memories that made k, v and the gates.
    at_k -= k * row_dot(k, at_k)
    torch.mul(at_k, made.key_scale, out=at_made[:rows])
    snapshot_read = read == "snapshot" and grad_o is not None
    if snapshot_read:
        at_made[memory] = grad_o
    else:
        at_made[memory] = 0
    served = made.served
    at_served = torch.empty_like(served.value)
    torch.bmm(at_made, base.last, out=at_served[:wide])
    torch.mul(at_made_gate, base.gate, out=at_served[wide:])
    grad_last.baddbmm_(at_made.transpose(1, 2), served.value[:wide])
    grad_gate.baddbmm_(at_made_gate.transpose(1, 2), served.value[wide:])
    at_z = hidden_adjoint(at_served, served)
    grad_inputs = torch.bmm(at_z, base.first)
    grad_first.baddbmm_(at_z.transpose(1, 2), inputs)
    if rule.projection_residual:
        grad_inputs[: 2 * rows] += at_made[: 2 * rows]

    grad_running = MemoryStack(first_part.state, at_last.state, at_gate.state)
    grad_base = MemoryStack(grad_first, grad_last, grad_gate)
    if anchor.last is not None:
        grad_anchor = [part.clone() for part in grad_base] if at_written[0] is not None else list(grad_base)
    if at_written[0] is not None:
        grad_inputs[memory] += first.queries
        grad_running.first[memory] += first.state
        grad_running.last[memory] += last.state
        if anchor.last is not None:
            grad_anchor[0][memory] += first.anchor
            grad_anchor[1][memory] += last.anchor
    return grad_inputs, (grad_rate_max, *biases), grad_running, grad_base, tuple(grad_anchor)
