"""The delta memory in chunks, in plain PyTorch: the CPU path, and the baseline that kernels have to beat.

Names. A tensor "in chunks" is ``[R, C, …]``: R runs over chunk steps, sequences and heads. A *read* is a row
that is taken from the memory: the keys, whose recall is erased, and the queries; both are stacked
(``[R, 2C, …]``), since they go through the same products. A *pseudo-value* is what a token finally adds to
the state along its key: its write less what it erases. See the README beside this file for the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

# exp(−1000) is 0 in fp32 and in fp64, so a clamped log decay still forgets everything, −inf included.
_LOWEST_LOG = -1000.0


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
    grid = _Grid.of(k, v, cu_seqlens, chunk_size)
    state = grid.to_state_order(initial_state)
    momentum_state = None if momentum is None else grid.to_state_order(initial_momentum)
    o = v.new_empty(v.shape)
    for segment in grid.segments:
        c = segment.chunk
        local = _local_quantities(segment, q, k, v, log_decay, erase, scale=scale, read=read)
        extra = _momentum_quantities(segment, local, momentum, momentum_state)
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
    grid = _Grid.of(k, v, cu_seqlens, chunk_size)
    state = grid.to_state_order(initial_state)
    momentum_state = None if momentum is None else grid.to_state_order(initial_momentum)
    passed = []
    for segment in grid.segments[:-1]:
        momentum_start = None if momentum is None else momentum_state.clone()
        local = _local_quantities(segment, None, k, v, log_decay, erase, scale=scale, read=read)
        extra = _momentum_quantities(segment, local, momentum, momentum_state)
        passed.append((local.inverse, _run_states(segment, local, extra, state), momentum_start))
    passed.append((None, None, momentum_state))

    d_state = grid.to_state_order(d_final_state)
    d_momentum_state = None if momentum is None else grid.to_state_order(d_final_momentum)
    gradients = [None if x is None else x.new_empty(x.shape) for x in (q, k, v, log_decay, erase, momentum)]
    for segment, (inverse, states, momentum_start) in zip(reversed(grid.segments), reversed(passed)):
        local = _local_quantities(segment, q, k, v, log_decay, erase, scale=scale, read=read, inverse=inverse)
        extra = _momentum_quantities(segment, local, momentum, momentum_start)
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
    segment: _Segment,
    local: _Local,
    extra: _Momentum | None,
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
        d_momentum = _momentum_gradients(
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


def delta_memory_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    erase: torch.Tensor,
    momentum: torch.Tensor | None,
    state: torch.Tensor,
    momentum_state: torch.Tensor | None,
    *,
    scale: float,
    read: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One token: q, k ``[B, H, Dk]``, v ``[B, H, Dv]``, rates ``[B, H]``, states ``[B, H, Dv, Dk]``.

    Returns ``(o, state, momentum_state)``; the states are new tensors.
    """
    dtype = _compute_dtype(q)
    # Batch and heads as one axis of matrices and columns.
    before = state.to(dtype).flatten(0, 1)
    q, k, writes = (x.to(dtype).flatten(0, 1).unsqueeze(-1) for x in (q, k, v))
    decay, erase = (x.to(dtype).flatten()[:, None, None] for x in (log_decay, erase))
    recalled = torch.bmm(before, k)
    if momentum is None:
        added = torch.addcmul(writes, erase, recalled, value=-1)
        after = torch.baddbmm(before * decay.exp(), added, k.mT)
    else:
        momentum_state = momentum_state.to(dtype).flatten(0, 1) * momentum.to(dtype).flatten()[:, None, None]
        momentum_state = momentum_state.baddbmm_(writes, k.mT)
        after = torch.baddbmm(before * decay.exp(), erase * recalled, k.mT, alpha=-1).add_(momentum_state)
        momentum_state = momentum_state.view(state.shape)
    o = torch.bmm(after if read == "after" else before, q).mul_(scale)
    return o.view(v.shape).to(v.dtype), after.view(state.shape), momentum_state


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Temporaries of a segment have about this many elements: few enough to stay in a CPU's cache, many enough to
# fill a GPU.
_SEGMENT_ELEMENTS = {"cpu": 2**17}
_SEGMENT_ELEMENTS_ELSEWHERE = 2**26


@dataclass(frozen=True)
class _Grid:
    """How tokens lie in chunks: chunk step by chunk step, within a step the sequences that reach it.

    Packed sequences are ordered by falling length, so that those still running are a prefix and every step is
    one batched product, however ragged the lengths.
    """

    sequences: int
    state_shape: tuple[int, int, int]  # H, Dv, Dk
    like: torch.Tensor  # any tensor of the state's dtype and device
    order: torch.Tensor | None  # [N]: sequences by falling length; None: as given
    segments: list[_Segment]

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, chunk_size: int) -> _Grid:
        batch, length, heads, width = k.shape
        elements = _SEGMENT_ELEMENTS.get(k.device.type, _SEGMENT_ELEMENTS_ELSEWHERE)
        like = k.new_empty(0, dtype=_compute_dtype(k))
        state_shape = (heads, v.shape[-1], width)
        if cu_seqlens is None:
            chunk = min(chunk_size, length)
            together = max(1, elements // (batch * heads * chunk * max(chunk, width))) * chunk
            segments = [
                _Segment(chunk, heads, batch, slice(start, min(start + together, length)))
                for start in range(0, length, together)
            ]
            return cls(batch, state_shape, like, None, segments)
        bounds = cu_seqlens.to("cpu", torch.int64)
        lengths = bounds.diff()
        chunk = min(chunk_size, int(lengths.max()))
        chunks = -(-lengths // chunk)
        order = torch.argsort(chunks, descending=True, stable=True)
        alive = (chunks[order] > torch.arange(int(chunks.max()))[:, None]).sum(1)
        segments, first = [], 0
        while first < len(alive):
            together = max(1, elements // (int(alive[first]) * heads * chunk * max(chunk, width)))
            last = min(first + together, len(alive))
            step = torch.repeat_interleave(torch.arange(first, last), alive[first:last])
            sequence = torch.cat([order[:n] for n in alive[first:last].tolist()])
            token = bounds[sequence, None] + step[:, None] * chunk + torch.arange(chunk)
            token = torch.where(token < bounds[sequence + 1, None], token, length).flatten().to(k.device)
            segments.append(_Segment(chunk, heads, 1, token, (alive[first:last] * heads).tolist(), length))
            first = last
        return cls(len(lengths), state_shape, like, order.to(k.device), segments)

    def to_state_order(self, state: torch.Tensor | None) -> torch.Tensor:
        """A new ``[N · H, Dv, Dk]`` in the grid's order of sequences; zeros for None."""
        if state is None:
            return self.like.new_zeros(self.sequences * self.state_shape[0], *self.state_shape[1:])
        state = state if self.order is None else state[self.order]
        return state.to(self.like.dtype, copy=True, memory_format=torch.contiguous_format).flatten(0, 1)

    def from_state_order(self, state: torch.Tensor) -> torch.Tensor:
        """``[N · H, Dv, Dk]`` back to ``[N, H, Dv, Dk]`` in the caller's order."""
        state = state.unflatten(0, (-1, self.state_shape[0]))
        return state if self.order is None else torch.empty_like(state).index_copy_(0, self.order, state)


class _Segment:
    """Consecutive chunk steps that are computed together, between two states that are kept.

    Args:
        tokens: the stretch of tokens of every sequence; or, packed, the token of each place ``[chunks · C]``,
            with ``length`` for padding.
        rows: of each step, (sequences that reach it) × heads; None: all of the batch.
    """

    def __init__(self, chunk, heads, batch, tokens, rows=None, length=None):
        self.chunk, self.heads, self.batch, self.tokens = chunk, heads, batch, tokens
        self.packed = isinstance(tokens, torch.Tensor)
        if self.packed:
            self.rows = rows
            self.is_token = tokens < length
            self.padded = not bool(self.is_token.all())
        else:
            self.missing = (tokens.start - tokens.stop) % chunk
            self.rows = [batch * heads] * (-((tokens.start - tokens.stop) // chunk))
            self.padded = self.missing > 0

    def to_chunks(self, x: torch.Tensor, dtype: torch.dtype, fill: float = 0.0) -> torch.Tensor:
        """``[B, T, H, …]`` to contiguous ``[R, C, …]``, with ``fill`` where a chunk has no token."""
        if self.packed:
            x = F.pad(x[0], (0, 0) * (x.ndim - 2) + (0, 1), value=fill).index_select(0, self.tokens)
            x = x.unflatten(0, (-1, self.chunk))
        else:
            x = x[:, self.tokens]
            if self.missing:
                x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.missing), value=fill)
            x = x.unflatten(1, (-1, self.chunk)).transpose(0, 1).flatten(0, 1)
        return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)

    def write(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Put ``[R, C, …]`` into its place in ``[B, T, H, …]``; padding is dropped."""
        x = x.unflatten(0, (-1, self.heads)).transpose(1, 2)
        if self.packed:
            x = x.flatten(0, 1)
            out[0, self.tokens[self.is_token]] = (x[self.is_token] if self.padded else x).to(out.dtype)
            return
        x = x.unflatten(0, (-1, self.batch)).transpose(0, 1)
        out = out[:, self.tokens]
        if self.missing:
            out.copy_(x.flatten(1, 2)[:, : out.shape[1]])
        else:
            out.unflatten(1, (-1, self.chunk)).copy_(x)


class _Local(NamedTuple):
    """What a chunk's tokens determine without its incoming state; reads are rows of keys, then queries."""

    k: torch.Tensor  # [R, C, Dk]
    v: torch.Tensor  # [R, C, Dv]
    erase: torch.Tensor  # [R, C]
    clamped: torch.Tensor  # [R, C] where log decay lies at or below the lowest one that matters
    reads: torch.Tensor  # [R, 2C, Dk] β k, then scale · q
    pair_decay: torch.Tensor  # [R, 2C, C] from a token's write to a read; 0 for writes the read does not see
    read_decay: torch.Tensor  # [R, 2C] from the chunk's start to the read
    decayed_reads: torch.Tensor  # [R, 2C, Dk] of the incoming state
    scores: torch.Tensor  # [R, 2C, C] reads · keys, decayed: A above, the output scores below
    inverse: torch.Tensor  # [R, C, C] (I + A)^{-1}
    end_pair_decay: torch.Tensor  # [R, C] from a token's write to the chunk's end
    end_decay: torch.Tensor  # [R] over the whole chunk
    end_keys: torch.Tensor  # [R, C, Dk] keys times end_pair_decay


def _local_quantities(
    segment: _Segment, q, k, v, log_decay, erase, *, scale: float, read: str, inverse=None
) -> _Local:
    """Without ``q``, for running the states alone, reads are those of the keys only."""
    c, dtype = segment.chunk, _compute_dtype(k)
    # Cumulated in fp64: the difference of two long sums then still has fp32 accuracy.
    steps = segment.to_chunks(log_decay, torch.float64)
    clamped = steps <= _LOWEST_LOG
    at_token = steps.clamp_min(_LOWEST_LOG).cumsum(-1)
    at_read = F.pad(at_token[:, :-1], (1, 0))
    k, v, erase = (segment.to_chunks(x, dtype) for x in (k, v, erase))
    reads = k * erase[..., None]
    if q is not None:
        at_read = torch.cat([at_read, at_token if read == "after" else at_read], dim=1)
        reads = torch.cat([reads, segment.to_chunks(q, dtype) * scale], dim=1)
    pair_decay = _decay_between(at_read, at_token, _seen_by_read(c, read, k)[: reads.shape[1]])
    read_decay = at_read.exp().to(dtype)
    end_pair_decay = (at_token[:, -1:] - at_token).exp().to(dtype)
    scores = torch.bmm(reads, k.mT).mul_(pair_decay)
    return _Local(
        k=k,
        v=v,
        erase=erase,
        clamped=clamped,
        reads=reads,
        pair_decay=pair_decay,
        read_decay=read_decay,
        decayed_reads=reads * read_decay[..., None],
        scores=scores,
        inverse=_inverse_of_unit_lower(scores[:, :c]) if inverse is None else inverse,
        end_pair_decay=end_pair_decay,
        end_decay=at_token[:, -1].exp().to(dtype),
        end_keys=k * end_pair_decay[..., None],
    )


def _decay_between(at_read: torch.Tensor, at_token: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """``exp(at_read − at_token)`` of cumulated logs for every pair, 0 where not ``seen``, in its dtype.

    The fp64 logs are split in two numbers of that dtype: their difference keeps its accuracy where it is
    small, without a matrix in fp64.
    """
    read, token = at_read.to(seen.dtype), at_token.to(seen.dtype)
    decay = read[:, :, None] - token[:, None, :]
    decay += (at_read - read).to(seen.dtype)[:, :, None]
    decay -= (at_token - token).to(seen.dtype)[:, None, :]
    # Clamping before the exponential and masking after it is faster than the exponential of −inf.
    return decay.clamp_max_(0).exp_().mul_(seen)


def _seen_by_read(chunk: int, read: str, like: torch.Tensor) -> torch.Tensor:
    """1 where a read (row) sees a token's write (column), else 0.

    Keys see the tokens before their own; queries also their own if ``read`` is "after".
    """
    ones = like.new_ones(chunk, chunk)
    return torch.cat([ones.tril(-1), ones.tril(0 if read == "after" else -1)])


def _inverse_of_unit_lower(strictly_lower: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(strictly_lower.shape[-1], dtype=strictly_lower.dtype, device=strictly_lower.device)
    return torch.linalg.solve_triangular(strictly_lower, identity, upper=False, unitriangular=True)


class _States(NamedTuple):
    starts: torch.Tensor  # [R, Dv, Dk] state at each chunk's start
    pseudo_values: torch.Tensor  # [R, C, Dv]


def _run_states(segment: _Segment, local: _Local, extra: _Momentum | None, state: torch.Tensor) -> _States:
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


def _run_state_gradients(segment: _Segment, local: _Local, d_state, d_pseudo, d_reads) -> torch.Tensor:
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


def _log_decay_gradient(local: _Local, d_rows, d_columns, d_end, read: str) -> torch.Tensor:
    """From gradients of the cumulated logs (at reads, writes and the end) to those of the steps."""
    c = d_columns.shape[-1]
    before, query = d_rows[:, :c].double(), d_rows[:, c:].double()
    at = d_columns.double()
    at[:, -1] += d_end
    if read == "after":
        at += query
    else:
        before = before + query
    at[:, :-1] += before[:, 1:]
    gradient = at.flip(-1).cumsum(-1).flip(-1)
    return gradient.masked_fill_(local.clamped, 0.0).to(d_rows.dtype)


class _Momentum(NamedTuple):
    """What momentum adds to a chunk: everything but the token's own write, which the pseudo-value carries."""

    pair: torch.Tensor  # [R, C, C] M: momentum from a token's write to a later or the same token
    start: torch.Tensor  # [R, C] s: momentum from the chunk's start
    real: (
        torch.Tensor | None
    )  # [R, C] 1 for tokens, 0 for padding, which must not add U to S; None: no padding
    surplus: torch.Tensor  # [R, 2C, C] D: from a write to a read by way of later tokens' momentum
    from_start: torch.Tensor  # [R, 2C] c: from U at the chunk's start to a read
    scores: torch.Tensor  # [R, 2C, C] reads · keys times surplus
    end_surplus: torch.Tensor  # [R, C] D at the chunk's end
    end_from_start: torch.Tensor  # [R] c at the chunk's end
    starts: torch.Tensor  # [R, Dv, Dk] U at each chunk's start
    reads: torch.Tensor  # [R, 2C, Dv] what momentum adds to each read
    injected: torch.Tensor  # [R, Dv, Dk] what momentum adds to the chunk's last state


def _momentum_quantities(segment: _Segment, local: _Local, momentum, state) -> _Momentum | None:
    """None without momentum; carries U, ``state``, on in place."""
    if momentum is None:
        return None
    c, dtype = segment.chunk, local.k.dtype
    key_width = local.k.shape[-1]
    logs = segment.to_chunks(momentum, torch.float64, fill=1.0).log().clamp_min(_LOWEST_LOG).cumsum(-1)
    pair = _decay_between(logs, logs, local.k.new_ones(c, c).tril())
    start = logs.exp().to(dtype)
    real = segment.to_chunks(torch.ones_like(momentum), dtype) if segment.padded else None
    later, from_start = _reaching_state(pair, start, real)
    surplus = torch.bmm(local.pair_decay, later)
    from_start_at_read = torch.bmm(local.pair_decay, from_start[..., None]).squeeze(-1)
    end_surplus = torch.bmm(local.end_pair_decay[:, None], later).squeeze(1)
    end_from_start = (local.end_pair_decay * from_start).sum(-1)
    # One product injects into the chunk's last S (left) and last U (right).
    end_keys = torch.cat([local.k * end_surplus[..., None], local.k * pair[:, -1, :, None]], dim=-1)
    injected = torch.bmm(local.v.mT, end_keys)
    starts = local.k.new_empty(local.k.shape[0], *state.shape[1:])
    per_step = zip(
        *(x.split(segment.rows) for x in (start[:, -1, None, None], injected[..., key_width:], starts))
    )
    for decay, added, saved in per_step:
        current = state[: saved.shape[0]]
        saved.copy_(current)
        current.mul_(decay).add_(added)
    scores = torch.bmm(local.reads, local.k.mT).mul_(surplus)
    reads = torch.bmm(scores, local.v)
    reads.baddbmm_(local.reads * from_start_at_read[..., None], starts.mT)
    return _Momentum(
        pair=pair,
        start=start,
        real=real,
        surplus=surplus,
        from_start=from_start_at_read,
        scores=scores,
        end_surplus=end_surplus,
        end_from_start=end_from_start,
        starts=starts,
        reads=reads,
        injected=torch.addcmul(injected[..., :key_width], starts, end_from_start[:, None, None]),
    )


def _reaching_state(pair, start, real):
    """What U_t adds to S_t besides the token's own write: M strictly below the diagonal, and s.

    Rows of padding are zero: there U is kept, but adds nothing to S.
    """
    later = pair.tril(-1)
    return (later, start) if real is None else (later * real[..., None], start * real)


def _momentum_gradients(
    segment: _Segment,
    local: _Local,
    extra: _Momentum,
    d_reads: torch.Tensor,
    d_ends: torch.Tensor,
    d_momentum_state: torch.Tensor,
    d_v: torch.Tensor,
    d_k: torch.Tensor,
    d_x: torch.Tensor,
    d_scores: torch.Tensor,
    d_log_columns: torch.Tensor,
    d_end_log: torch.Tensor,
) -> torch.Tensor:
    """Add momentum's part to every ``d_…`` argument in place.

    Returns:
        the gradient of the momentum rates, ``[R, C]``.
    """
    key_width = local.k.shape[-1]
    momentum_reads = local.reads * extra.from_start[..., None]
    per_start = torch.baddbmm(d_ends * extra.end_from_start[:, None, None], d_reads.mT, momentum_reads)
    d_momentum_ends = torch.empty_like(d_ends)
    per_step = zip(
        *(x.split(segment.rows) for x in (extra.start[:, -1, None, None], per_start, d_momentum_ends))
    )
    for decay, added, saved in reversed(list(per_step)):
        current = d_momentum_state[: saved.shape[0]]
        saved.copy_(current)
        current.mul_(decay).add_(added)

    # Through the products with the writes and with U.
    d_pair_scores = torch.bmm(d_reads, local.v.mT)
    d_surplus = torch.bmm(local.reads, local.k.mT).mul_(d_pair_scores)
    d_scores.addcmul_(d_pair_scores, extra.surplus)
    d_momentum_reads = torch.bmm(d_reads, extra.starts)
    d_from_start = (d_momentum_reads * local.reads).sum(-1)
    d_x.addcmul_(d_momentum_reads, extra.from_start[..., None])
    end_pair = extra.pair[:, -1]
    end_keys = torch.cat([local.k * extra.end_surplus[..., None], local.k * end_pair[..., None]], dim=-1)
    d_both_ends = torch.cat([d_ends, d_momentum_ends], dim=-1)
    d_v.baddbmm_(extra.scores.mT, d_reads).baddbmm_(end_keys, d_both_ends.mT)
    d_end_keys = torch.bmm(local.v, d_both_ends)
    d_end_keys, d_end_momentum_keys = d_end_keys[..., :key_width], d_end_keys[..., key_width:]
    d_k.addcmul_(d_end_keys, extra.end_surplus[..., None]).addcmul_(d_end_momentum_keys, end_pair[..., None])
    d_end_surplus = (d_end_keys * local.k).sum(-1)
    d_end_from_start = (d_ends * extra.starts).sum((1, 2))

    # Through the decays: D = B · later and c = B · start, at the reads and at the chunk's end.
    later, from_start = _reaching_state(extra.pair, extra.start, extra.real)
    d_end_log += (d_end_surplus * extra.end_surplus).sum(-1) + d_end_from_start * extra.end_from_start
    d_later = torch.bmm(local.pair_decay.mT, d_surplus)
    d_later.addcmul_(local.end_pair_decay[..., None], d_end_surplus[:, None, :])
    d_start = torch.bmm(local.pair_decay.mT, d_from_start[..., None]).squeeze(-1)
    d_start.addcmul_(local.end_pair_decay, d_end_from_start[:, None])
    d_log_columns -= (d_later * later).sum(-1) + d_start * from_start

    # Through M and s to the rates, without dividing by a rate, which may be zero.
    if extra.real is not None:
        d_later *= extra.real[..., None]
        d_start *= extra.real
    d_pair = d_later.tril_(-1)
    d_pair[:, -1] += (d_end_momentum_keys * local.k).sum(-1)
    d_start[:, -1] += (d_momentum_ends * extra.starts).sum((1, 2))
    pair_before = F.pad(extra.pair[:, :-1], (0, 0, 1, 0))
    start_before = F.pad(extra.start[:, :-1], (1, 0), value=1.0)
    through_pairs = (torch.bmm(extra.pair.mT, d_pair) * pair_before).sum(-1)
    through_start = torch.bmm(extra.pair.mT, d_start[..., None]).squeeze(-1) * start_before
    return through_pairs + through_start
