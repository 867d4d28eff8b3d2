"""The delta memory in chunks, in plain PyTorch: the CPU path, and the baseline that kernels have to beat.

Names. A tensor "in chunks" is ``[R, C, …]``: R runs over chunk steps, sequences and heads. A *read* is a row
that is taken from the memory: the keys, whose recall is erased, and the queries; both are stacked
(``[R, 2C, …]``), since they go through the same products. A *pseudo-value* is what a token finally adds to
the state along its key: its write less what it erases. See the README beside this file for the derivation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.ops.delta_memory.eager_chunk import Local, local_quantities
from nl_kernels.ops.delta_memory.eager_momentum import Momentum, momentum_gradients, momentum_quantities
from nl_kernels.ops.delta_memory.rows import Grid, Segment


def delta_memory_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    erase: torch.Tensor,
    momentum: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    initial_momentum: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    scale: float,
    read: str,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Outputs ``o`` and the states after the last token; shapes as in :func:`nl_kernels.delta_memory`."""
    grid = Grid.of(k, v, cu_seqlens, chunk_size)
    state = grid.to_state_order(initial_state)
    momentum_state = None if momentum is None else grid.to_state_order(initial_momentum)
    o = v.new_empty(v.shape)
    for segment in grid.segments:
        c = segment.chunk
        local = local_quantities(segment, q, k, v, log_decay, erase, scale=scale, read=read)
        extra = momentum_quantities(segment, local, momentum, momentum_state)
        states = _run_states(segment, local, extra, state)
        outputs = torch.bmm(local.scores[:, c:], states.pseudo_values)
        outputs.baddbmm_(local.decayed_reads[:, c:], states.starts.mT)
        if extra is not None:
            outputs += extra.reads[:, c:]
        segment.write(o, outputs)
    final_momentum = None if momentum is None else grid.from_state_order(momentum_state)
    return o, grid.from_state_order(state), final_momentum


def delta_memory_backward(
    do: torch.Tensor,
    d_final_state: torch.Tensor | None,
    d_final_momentum: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    erase: torch.Tensor,
    momentum: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    initial_momentum: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    scale: float,
    read: str,
    chunk_size: int,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients ``(dq, dk, dv, dlog_decay, derase, dmomentum, dinitial_state, dinitial_momentum)``.

    Every quantity of the forward pass is computed again from the inputs. ``dmomentum`` and
    ``dinitial_momentum`` are None without momentum; ``dinitial_state`` is always given.
    """
    grid = Grid.of(k, v, cu_seqlens, chunk_size)
    state = grid.to_state_order(initial_state)
    momentum_state = None if momentum is None else grid.to_state_order(initial_momentum)
    passed = []
    for segment in grid.segments[:-1]:
        momentum_start = None if momentum is None else momentum_state.clone()
        local = local_quantities(segment, None, k, v, log_decay, erase, scale=scale, read=read)
        extra = momentum_quantities(segment, local, momentum, momentum_state)
        passed.append((local.inverse, _run_states(segment, local, extra, state), momentum_start))
    passed.append((None, None, momentum_state))

    d_state = grid.to_state_order(d_final_state)
    d_momentum_state = None if momentum is None else grid.to_state_order(d_final_momentum)
    gradients = [None if x is None else x.new_empty(x.shape) for x in (q, k, v, log_decay, erase, momentum)]
    for segment, (inverse, states, momentum_start) in zip(reversed(grid.segments), reversed(passed)):
        local = local_quantities(segment, q, k, v, log_decay, erase, scale=scale, read=read, inverse=inverse)
        extra = momentum_quantities(segment, local, momentum, momentum_start)
        if states is None:  # the last segment: not passed yet
            states = _run_states(segment, local, extra, state)
        d_outputs = segment.to_chunks(do, local.k.dtype)
        parts = _segment_gradients(
            segment, local, extra, states, d_outputs, d_state, d_momentum_state, scale=scale, read=read
        )
        for gradient, part in zip(gradients, parts):
            if gradient is not None:
                segment.write(gradient, part)
    d_initial = [None if x is None else grid.from_state_order(x) for x in (d_state, d_momentum_state)]
    for i, initial in enumerate((initial_state, initial_momentum)):
        if initial is not None:
            d_initial[i] = d_initial[i].to(initial.dtype)
    return (*gradients, *d_initial)


def _segment_gradients(
    segment: Segment,
    local: Local,
    extra: Momentum | None,
    states: _States,
    d_outputs: torch.Tensor,
    d_state: torch.Tensor,
    d_momentum_state: torch.Tensor | None,
    *,
    scale: float,
    read: str,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, log decay, erase and momentum, in chunks.

    ``d_state`` and ``d_momentum_state`` are turned from the gradients of the segment's last states into those
    of its first.
    """
    c = segment.chunk
    k, n, reads = local.k, states.pseudo_values, local.reads
    # Of both kinds of reads: the gradient of N's right-hand side, negated, and that of the outputs.
    d_reads = k.new_empty(*reads.shape[:2], n.shape[-1])
    d_reads[:, c:] = d_outputs
    d_pseudo = torch.bmm(local.scores[:, c:].mT, d_outputs)
    d_ends = _run_state_gradients(segment, local, d_state, d_pseudo, d_reads)

    d_scores = torch.bmm(d_reads, n.mT).mul_(local.pair_decay)
    d_end_keys = torch.bmm(n, d_ends)
    d_end_log = (d_end_keys * local.end_keys).sum((1, 2))
    d_end_log += local.end_decay * (d_ends * states.starts).sum((1, 2))
    d_x = torch.bmm(d_reads, states.starts).mul_(local.read_decay[..., None])
    d_k = d_end_keys.mul_(local.end_pair_decay[..., None])
    d_log_columns = (n * d_reads[:, :c]).sum(-1)
    d_v, d_momentum = d_reads[:, :c].neg(), None
    if extra is not None:
        d_momentum = momentum_gradients(
            segment,
            local,
            extra,
            d_reads,
            d_ends,
            d_momentum_state,
            d_v,
            d_k,
            d_x,
            d_scores,
            d_log_columns,
            d_end_log,
        )
    d_x.baddbmm_(d_scores, k)
    d_k.baddbmm_(d_scores.mT, reads)
    d_erase = (d_x[:, :c] * k).sum(-1)
    d_log_reads = torch.cat([d_erase * local.erase, (d_x[:, c:] * reads[:, c:]).sum(-1)], dim=1)
    d_k.addcmul_(d_x[:, :c], local.erase[..., None])
    d_log = _log_decay_gradient(local, d_log_reads, d_log_columns, d_end_log, read)
    return d_x[:, c:].mul_(scale), d_k, d_v, d_log, d_erase, d_momentum


class _States(NamedTuple):
    starts: torch.Tensor  # [R, Dv, Dk] state at each chunk's start
    pseudo_values: torch.Tensor  # [R, C, Dv]


def _run_states(segment: Segment, local: Local, extra: Momentum | None, state: torch.Tensor) -> _States:
    """The recurrence over chunks, the only sequential part of the forward; carries ``state`` on in place."""
    c = segment.chunk
    starts = local.k.new_empty(local.k.shape[0], *state.shape[1:])
    pseudo_values = torch.empty_like(local.v)
    v = local.v if extra is None else local.v - extra.reads[:, :c]
    per_step = zip(
        *(
            x.split(segment.rows)
            for x in (
                v,
                local.decayed_reads[:, :c],
                local.inverse,
                local.end_keys,
                local.end_decay[:, None, None],
                starts,
                pseudo_values,
                v if extra is None else extra.injected,
            )
        )
    )
    for v_step, keys, inverse, end_keys, end_decay, start, pseudo, injected in per_step:
        current = state[: start.shape[0]]
        start.copy_(current)
        rhs = torch.baddbmm(v_step, keys, start.mT, alpha=-1)
        torch.bmm(inverse, rhs, out=pseudo)
        current.mul_(end_decay).baddbmm_(pseudo.mT, end_keys)
        if extra is not None:
            current += injected
    return _States(starts, pseudo_values)


def _run_state_gradients(segment: Segment, local: Local, d_state, d_pseudo, d_reads) -> torch.Tensor:
    """The recurrence backwards, in place.

    Fills the key half of ``d_reads`` and turns ``d_state`` from the final into the initial state's gradient.

    Returns:
        the gradient of each chunk's last state, ``[R, Dv, Dk]``.
    """
    c = segment.chunk
    d_ends = local.k.new_empty(local.k.shape[0], *d_state.shape[1:])
    per_step = zip(
        *(
            x.split(segment.rows)
            for x in (
                d_pseudo,
                local.inverse,
                local.end_keys,
                local.end_decay[:, None, None],
                local.decayed_reads,
                d_reads,
                d_ends,
            )
        )
    )
    for d_pseudo_step, inverse, end_keys, end_decay, decayed_reads, d_reads_step, d_end in reversed(
        list(per_step)
    ):
        current = d_state[: d_end.shape[0]]
        d_end.copy_(current)
        d_pseudo_step.baddbmm_(end_keys, d_end.mT)
        torch.bmm(inverse.mT, d_pseudo_step, out=d_reads_step[:, :c]).neg_()
        current.mul_(end_decay).baddbmm_(d_reads_step.mT, decayed_reads)
    return d_ends


def _log_decay_gradient(local: Local, d_rows, d_columns, d_end, read: str) -> torch.Tensor:
    """From gradients of the cumulated logs (at reads, writes and the end) to those of the steps."""
    c = d_columns.shape[-1]
    before, query = d_rows[:, :c].double(), d_rows[:, c:].double()
    at = d_columns.double()
    at[:, -1] += d_end
    if read == "running":
        at += query
    else:
        before = before + query
    at[:, :-1] += before[:, 1:]
    gradient = at.flip(-1).cumsum(-1).flip(-1)
    return gradient.masked_fill_(local.clamped, 0.0).to(d_rows.dtype)
