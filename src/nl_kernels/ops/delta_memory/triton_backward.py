"""Triton backward of ``delta_memory``: recompute the chunk states, scan their gradients back, then by chunk.

Five steps after the recomputed forward, with ``dS, dU`` the gradients of the state and momentum that a chunk
*ends* with, and ``Z`` its pseudo-values:

1. ``read_gradients``: what the outputs alone ask of Z and V, ``(B ∘ QKᵀ)ᵀ dO`` and ``(E ∘ QKᵀ)ᵀ dO``, and the
   gradient of ``QKᵀ``;
2. ``scan_gradients`` (sequential): completes dZ, carries ``dS, dU`` to the chunk's start;
3. ``solve_gradients``: back through ``Z = T R``: dV, and the gradient of ``KKᵀ``;
4. ``state_gradients``: products with a state; dQ, dK;
5. ``rate_gradients``: gathers the terms of decay, erase and momentum that came from states.

Kernels 1 and 3 are in :mod:`.triton_pair_gradients`, 2 and 4 in :mod:`.triton_state_gradients`, the last in
:mod:`.triton_rate_gradients`.

A gradient of a decay from token j to token t goes to every factor between them: ``sum_over_spans``.
"""

from __future__ import annotations

import functools

import torch

from nl_kernels.ops.delta_memory import launch
from nl_kernels.ops.delta_memory.triton_forward import states_of
from nl_kernels.ops.delta_memory.triton_pair_gradients import read_gradients_kernel, solve_gradients_kernel
from nl_kernels.ops.delta_memory.triton_rate_gradients import rate_gradients_kernel
from nl_kernels.ops.delta_memory.triton_state_gradients import scan_gradients_kernel, state_gradients_kernel
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.targets import architecture_of


def plan_backward(
    *tensors: torch.Tensor | None, scale: float, read: str, chunk_size: int, architecture: str
) -> tuple[list[KernelCall], tuple[torch.Tensor | None, ...]]:
    """The calls of the backward pass and the gradients they fill; runs nothing (meta tensors will do).

    Takes the gradients of ``o`` and the final states, then what :func:`plan_forward` takes.
    """
    do, d_final_state, d_final_momentum, q, k, v, log_decay, erase, momentum, *_ = tensors
    plan, given = launch.plan_chunks(*tensors[3:], chunk_size=chunk_size, architecture=architecture)
    buffers, launches = _backward(plan, read)
    given |= launch.allocated(buffers, k, log_decay)
    has, d_pseudo = plan.has_momentum, torch.empty_like(given["pseudo_values"])
    gradients = {
        "dq": torch.empty_like(q),
        "dk": torch.empty_like(k),
        "dv": torch.empty_like(v),
        "d_log_decay": torch.empty_like(log_decay),
        "d_erase": torch.empty_like(erase),
        "d_momentum": torch.empty_like(momentum) if has else None,
        "d_initial_state": torch.empty_like(given["final_state"]),
        "d_initial_momentum": torch.empty_like(given["final_state"]) if has else None,
    }
    given |= gradients | {
        "do": do,
        "d_final_state": d_final_state,
        "d_final_momentum": d_final_momentum,
        "d_pseudo": d_pseudo,
        "d_right": d_pseudo,
        "d_value": torch.empty_like(d_pseudo) if has else None,
        "d_chunk_states": torch.empty_like(given["chunk_states"]),
        "d_chunk_momenta": torch.empty_like(given["chunk_states"]) if has else None,
        "scale": scale,
        "tokens": plan.batch * plan.tokens,
    }
    return [call(given) for call in launches], tuple(gradients.values())


@functools.lru_cache(maxsize=512)
def _backward(plan: launch.ChunkPlan, read: str) -> tuple[list[launch.Buffer], list[launch.Launch]]:
    """What the calls fill that is like no other tensor, and what makes them."""
    (buffers, launches), work, has = states_of(plan), plan.precision.workspace, plan.has_momentum
    key_tiles = plan.tiles(state_gradients_kernel, "key")
    pairs = (plan.chunks, plan.heads, plan.block_c, plan.block_c)
    buffers += [
        ("inverse", pairs, work),
        ("d_key_query", pairs, work),
        ("d_key_key", pairs, work),
        ("token_terms", (key_tiles, 7 if has else 3, plan.batch * plan.tokens * plan.heads), torch.float32),
        ("chunk_terms", (key_tiles, 3 if has else 1, plan.chunks * plan.heads), torch.float32),
    ]
    launches += [
        plan.launch(read_gradients_kernel, read=read),
        plan.launch(scan_gradients_kernel, tiles="value", scan=True, read=read),
        plan.launch(solve_gradients_kernel),
        plan.launch(state_gradients_kernel, tiles="key", of_keys=True, read=read),
        plan.launch(rate_gradients_kernel, read=read, key_tiles=key_tiles),
    ]
    return buffers, launches


def delta_memory_backward(
    do: torch.Tensor,
    d_final_state: torch.Tensor | None,
    d_final_momentum: torch.Tensor | None,
    *inputs: torch.Tensor | None,
    **options: float | int | str,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients ``(dq, dk, dv, dlog_decay, derase, dmomentum, dinitial_state, dinitial_momentum)``.

    Each in the dtype of its input (the initial states' in fp32, present also when the input was not), the
    two momentum entries ``None`` without momentum. Needs the inputs of the forward pass only; ``None`` for a
    final cotangent is zero.

    Raises:
        NotImplementedError: a head wider than :data:`launch.MAX_HEAD_DIM`, or fp64.
    """
    given = (do.contiguous(), *launch.contiguous_fp32(d_final_state, d_final_momentum))
    calls, gradients = plan_backward(
        *given, *launch.prepared(inputs), **options, architecture=architecture_of(do.device)
    )
    run_calls(calls, do.device)
    return tuple(g if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, inputs))
