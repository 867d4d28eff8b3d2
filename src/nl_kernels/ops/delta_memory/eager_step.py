"""One token of ``delta_memory`` for decoding on the CPU: no chunk, no gradient, one pass over the state."""

from __future__ import annotations

import torch

from nl_kernels.checks import state_dtype


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
    """One token: q, k ``[B, G, Dk]``, v ``[B, H, Dv]``, rates ``[B, H]``, states ``[B, H, Dv, Dk]``.

    Returns ``(o, state, momentum_state)``; the states are new tensors.
    """
    dtype = state_dtype(q)
    # Batch and heads as one axis of matrices and columns.
    before = state.to(dtype).flatten(0, 1)
    if k.shape[1] != v.shape[1]:
        q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
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
    o = torch.bmm(after if read == "running" else before, q).mul_(scale)
    return o.view(v.shape).to(v.dtype), after.view(state.shape), momentum_state
