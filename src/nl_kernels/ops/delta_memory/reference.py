"""The definition of the delta memory: one token at a time, differentiable by autograd, exact in fp64."""

from __future__ import annotations

import itertools

import torch

from nl_kernels.checks import state_dtype


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``U_t = μ_t U_{t-1} + v_t k_tᵀ``; ``S_t = α_t S_{t-1} − β_t (S_{t-1} k_t) k_tᵀ + U_t``;
    ``o_t = scale · S_t q_t``.

    Shapes as in :func:`nl_kernels.delta_memory`. Everything is computed in fp32, or in fp64 for fp64 inputs.

    Returns:
        ``(o, S, U)`` after the last token of each sequence; ``U`` is None without momentum.
    """
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    results = []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        tokens = slice(start, end)
        states = slice(None) if cu_seqlens is None else slice(n, n + 1)
        results.append(
            _one_stretch(
                *(x[:, tokens] for x in (q, k, v, log_decay, erase)),
                None if momentum is None else momentum[:, tokens],
                None if initial_state is None else initial_state[states],
                None if initial_momentum is None else initial_momentum[states],
                scale=scale,
                read=read,
            )
        )
    o, state, momentum_state = zip(*results)
    return torch.cat(o, dim=1), torch.cat(state), None if momentum is None else torch.cat(momentum_state)


def _one_stretch(q, k, v, log_decay, erase, momentum, state, momentum_state, *, scale, read):
    dtype = state_dtype(q)
    output_dtype = v.dtype
    batch, length, heads, key_width = k.shape
    zeros = k.new_zeros(batch, heads, v.shape[-1], key_width, dtype=dtype)
    state = zeros if state is None else state.to(dtype)
    momentum_state = zeros if momentum_state is None else momentum_state.to(dtype)
    q, k, v, decay, erase = (x.to(dtype) for x in (q, k, v, log_decay.to(dtype).exp(), erase))
    outputs = []
    for t in range(length):
        write = v[:, t, :, :, None] * k[:, t, :, None, :]
        if momentum is not None:
            momentum_state = momentum[:, t, :, None, None].to(dtype) * momentum_state + write
            write = momentum_state
        recalled = (state * k[:, t, :, None, :]).sum(-1, keepdim=True)
        erased = erase[:, t, :, None, None] * recalled * k[:, t, :, None, :]
        before, state = state, decay[:, t, :, None, None] * state - erased + write
        source = state if read == "running" else before
        outputs.append(scale * (source * q[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1).to(output_dtype), state, momentum_state
