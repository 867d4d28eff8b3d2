"""What a chunk's tokens determine without its incoming state; names are those of :mod:`.eager`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from nl_kernels.checks import state_dtype
from nl_kernels.ops.delta_memory.rows import Segment

# exp(−1000) is 0 in fp32 and in fp64, so a clamped log decay still forgets everything, −inf included.
LOWEST_LOG = -1000.0


class Local(NamedTuple):
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


def local_quantities(
    segment: Segment, q, k, v, log_decay, erase, *, scale: float, read: str, inverse=None
) -> Local:
    """Without ``q``, for running the states alone, reads are those of the keys only."""
    c, dtype = segment.chunk, state_dtype(k)
    # Cumulated in fp64: the difference of two long sums then still has fp32 accuracy.
    steps = segment.to_chunks(log_decay, torch.float64)
    clamped = steps <= LOWEST_LOG
    at_token = steps.clamp_min(LOWEST_LOG).cumsum(-1)
    at_read = F.pad(at_token[:, :-1], (1, 0))
    k, v, erase = (segment.to_chunks(x, dtype) for x in (k, v, erase))
    reads = k * erase[..., None]
    if q is not None:
        at_read = torch.cat([at_read, at_token if read == "running" else at_read], dim=1)
        reads = torch.cat([reads, segment.to_chunks(q, dtype) * scale], dim=1)
    pair_decay = decay_between(at_read, at_token, _seen_by_read(c, read, k)[: reads.shape[1]])
    read_decay = at_read.exp().to(dtype)
    end_pair_decay = (at_token[:, -1:] - at_token).exp().to(dtype)
    scores = torch.bmm(reads, k.mT).mul_(pair_decay)
    return Local(
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


def decay_between(at_read: torch.Tensor, at_token: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
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

    Keys see the tokens before their own; queries also their own if ``read`` is "running".
    """
    ones = like.new_ones(chunk, chunk)
    return torch.cat([ones.tril(-1), ones.tril(0 if read == "running" else -1)])


def _inverse_of_unit_lower(strictly_lower: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(strictly_lower.shape[-1], dtype=strictly_lower.dtype, device=strictly_lower.device)
    return torch.linalg.solve_triangular(strictly_lower, identity, upper=False, unitriangular=True)
