"""What momentum adds to the chunks, and the gradient of it; names are those of :mod:`.eager`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from nl_kernels.ops.delta_memory.eager_chunk import LOWEST_LOG, Local, decay_between
from nl_kernels.ops.delta_memory.rows import Segment


class Momentum(NamedTuple):
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


def momentum_quantities(segment: Segment, local: Local, momentum, state) -> Momentum | None:
    """None without momentum; carries U, ``state``, on in place."""
    if momentum is None:
        return None
    c, dtype = segment.chunk, local.k.dtype
    key_width = local.k.shape[-1]
    logs = segment.to_chunks(momentum, torch.float64, fill=1.0).log().clamp_min(LOWEST_LOG).cumsum(-1)
    pair = decay_between(logs, logs, local.k.new_ones(c, c).tril())
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
    return Momentum(
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


def momentum_gradients(
    segment: Segment,
    local: Local,
    extra: Momentum,
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
