"""Triton forward of ``delta_memory``: solve each chunk, scan the state over chunks, read each chunk.

The names follow the op's README: with ``K, V, Q`` the rows of a chunk, ``S, U`` the state and momentum it
starts from (held transposed, [Dk, Dv]),

    Z = pseudo-values = value_transform · V − key_transform · S − momentum_key_transform · U
    S ← b_C S + c_C U + Kᵀ (B_C ∘ Z + E_C ∘ V)
    O = scale · (b ∘ Q S + c ∘ Q U + (B ∘ QKᵀ) Z + (E ∘ QKᵀ) V)

and without momentum the terms in ``U`` and ``E`` vanish, with ``Z + V`` in the place of ``Z``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nl_kernels.ops.delta_memory import launch
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import (
    cumulate_log,
    decay_between,
    decay_from_start,
    decay_matrix,
    invert_unit_lower,
    load_tile,
    locate_chunk,
    locate_sequence,
    matmul,
    safe_log,
    store_tile,
    total_log,
)
from nl_kernels.triton_support.targets import architecture_of


@triton.jit(do_not_specialize=["T", "H"])
def solve_chunks_kernel(
    k,
    v,
    log_decay,
    erase,
    momentum,
    key_transform,
    momentum_key_transform,
    pseudo_values,
    inverse,
    carried_before,
    momentum_tail,
    chunk_table,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INPUTS: tl.constexpr,
    STATE: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """One program a chunk and head: everything about it that does not need the state.

    Writes ``T diag(β b⁻) K``, with momentum ``T diag(β c⁻) K``, the state-free part of the pseudo-values;
    where asked ``T = (I + A)⁻¹``, and with momentum c⁻ and the last row of E.
    """
    program = tl.program_id(0)
    chunk = program // H
    head = program % H
    start, count = locate_chunk(chunk, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + head
    strict = row[:, None] > row[None, :]

    log_a = tl.load(log_decay + token, mask=valid, other=0.0)
    beta = tl.load(erase + token, mask=valid, other=0.0)
    total, residue, total_before, residue_before = cumulate_log(log_a)
    decay_before = decay_matrix(total_before, residue_before, total, residue, strict)

    key_products = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for first in range(0, KEY_DIM, BLOCK_K):
        key = load_tile(k, token, valid, first + tl.arange(0, BLOCK_K), KEY_DIM)
        key_products += matmul(key, tl.trans(key), INPUTS)
    key_products *= beta[:, None]
    if momentum is not None:
        mu = tl.load(momentum + token, mask=valid, other=1.0)
        mu_total, mu_residue, _, _ = cumulate_log(safe_log(mu))
        lower = (row[:, None] >= row[None, :]) & valid[:, None]
        mu_matrix = decay_matrix(mu_total, mu_residue, mu_total, mu_residue, lower)
        all_total, all_residue = total_log(log_a)
        tail = tl.where(valid, decay_between(all_total, all_residue, total, residue), 0.0)
        tl.store(momentum_tail + token, tl.sum(tail[:, None] * mu_matrix, 0), mask=valid)
        mu_start = tl.where(valid, decay_from_start(mu_total), 0.0)
        carried = tl.sum(decay_before * mu_start[None, :], 1)
        tl.store(carried_before + token, carried, mask=valid)
        value_mixing = matmul(decay_before, mu_matrix, SOLVE) * key_products

    inverted = invert_unit_lower(decay_before * key_products, BLOCK_C, SOLVE)
    if inverse is not None:
        chunk_row = program.to(tl.int64) * BLOCK_C + row
        store_tile(inverse, chunk_row, row < BLOCK_C, row, BLOCK_C, inverted)
    key_mixing = inverted * (beta * decay_from_start(total_before))[None, :]
    if momentum is not None:
        momentum_key_mixing = inverted * (beta * carried)[None, :]
        value_transform = -matmul(inverted, value_mixing, SOLVE)
    else:
        value_transform = inverted

    for first in range(0, KEY_DIM, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        key = load_tile(k, token, valid, column, KEY_DIM)
        store_tile(key_transform, token, valid, column, KEY_DIM, matmul(key_mixing, key, STATE))
        if momentum is not None:
            product = matmul(momentum_key_mixing, key, STATE)
            store_tile(momentum_key_transform, token, valid, column, KEY_DIM, product)
    for first in range(0, VALUE_DIM, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        value = load_tile(v, token, valid, column, VALUE_DIM)
        store_tile(pseudo_values, token, valid, column, VALUE_DIM, matmul(value_transform, value, STATE))


@triton.jit(do_not_specialize=["T", "H"])
def scan_chunks_kernel(
    k,
    v,
    log_decay,
    momentum,
    key_transform,
    momentum_key_transform,
    pseudo_values,
    momentum_tail,
    initial_state,
    initial_momentum,
    chunk_states,
    chunk_momenta,
    final_state,
    final_momentum,
    cu_seqlens,
    chunk_offsets,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STATE: tl.constexpr,
):
    """One program a sequence, head and tile of the value width: carries the state over the chunks.

    Writes the state (and momentum) that each chunk starts from, completes the pseudo-values in place, and
    writes the final state. Only this kernel is sequential; it holds the state in registers, [Dk, tile].
    """
    program = tl.program_id(0)
    sequence = program // H
    head = program % H
    start, length, first_chunk = locate_sequence(sequence, cu_seqlens, chunk_offsets, T, BLOCK_C)
    row = tl.arange(0, BLOCK_C)
    key_column = tl.arange(0, BLOCK_K)
    value_column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    state_mask = (key_column < KEY_DIM)[:, None] & (value_column < VALUE_DIM)[None, :]
    # The public state is [Dv, Dk]; chunk states are kept [Dk, Dv], as they are held here.
    public = program.to(tl.int64) * VALUE_DIM * KEY_DIM
    public += value_column[None, :] * KEY_DIM + key_column[:, None]

    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial_state is not None:
        state += tl.load(initial_state + public, mask=state_mask, other=0.0).to(tl.float32)
    if momentum is not None:
        velocity = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if initial_momentum is not None:
            velocity += tl.load(initial_momentum + public, mask=state_mask, other=0.0).to(tl.float32)

    for index in range(0, tl.cdiv(length, BLOCK_C)):
        state_row = ((first_chunk + index) * H + head) * KEY_DIM + key_column
        store_tile(chunk_states, state_row, key_column < KEY_DIM, value_column, VALUE_DIM, state)
        valid = index * BLOCK_C + row < length
        token = (start + index * BLOCK_C + row) * H + head
        key = load_tile(k, token, valid, key_column, KEY_DIM)
        transform = load_tile(key_transform, token, valid, key_column, KEY_DIM)
        pseudo = load_tile(pseudo_values, token, valid, value_column, VALUE_DIM).to(tl.float32)
        pseudo -= matmul(transform, state, STATE)

        log_a = tl.load(log_decay + token, mask=valid, other=0.0)
        total, residue, _, _ = cumulate_log(log_a)
        all_total, all_residue = total_log(log_a)
        tail = decay_between(all_total, all_residue, total, residue)
        kept = decay_from_start(all_total)
        if momentum is None:
            store_tile(pseudo_values, token, valid, value_column, VALUE_DIM, pseudo)
            state = kept * state + matmul(tl.trans(key), tail[:, None] * pseudo, STATE)
        else:
            store_tile(chunk_momenta, state_row, key_column < KEY_DIM, value_column, VALUE_DIM, velocity)
            transform = load_tile(momentum_key_transform, token, valid, key_column, KEY_DIM)
            pseudo -= matmul(transform, velocity, STATE)
            store_tile(pseudo_values, token, valid, value_column, VALUE_DIM, pseudo)
            log_mu = safe_log(tl.load(momentum + token, mask=valid, other=1.0))
            mu_total, mu_residue, _, _ = cumulate_log(log_mu)
            mu_all_total, mu_all_residue = total_log(log_mu)
            mu_start = tl.where(valid, decay_from_start(mu_total), 0.0)
            mu_tail = decay_between(mu_all_total, mu_all_residue, mu_total, mu_residue)
            mixed_tail = tl.load(momentum_tail + token, mask=valid, other=0.0)
            value = load_tile(v, token, valid, value_column, VALUE_DIM).to(tl.float32)
            written = tail[:, None] * pseudo + mixed_tail[:, None] * value
            state = kept * state + tl.sum(tail * mu_start, 0) * velocity
            state += matmul(tl.trans(key), written, STATE)
            velocity = decay_from_start(mu_all_total) * velocity
            velocity += matmul(tl.trans(key), mu_tail[:, None] * value, STATE)

    tl.store(final_state + public, state, mask=state_mask)
    if momentum is not None:
        tl.store(final_momentum + public, velocity, mask=state_mask)


@triton.jit(do_not_specialize=["T", "H"])
def read_chunks_kernel(
    q,
    k,
    v,
    log_decay,
    momentum,
    pseudo_values,
    chunk_states,
    chunk_momenta,
    o,
    chunk_table,
    scale,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    READ_BEFORE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INPUTS: tl.constexpr,
    STATE: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """One program a chunk, head and tile of the value width: the outputs."""
    program = tl.program_id(0)
    chunk = program // H
    head = program % H
    start, count = locate_chunk(chunk, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + head
    value_column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)

    query_key = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    from_state = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    from_velocity = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    for first in range(0, KEY_DIM, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        query = load_tile(q, token, valid, column, KEY_DIM)
        key = load_tile(k, token, valid, column, KEY_DIM)
        query_key += matmul(query, tl.trans(key), INPUTS)
        state_row = program.to(tl.int64) * KEY_DIM + column
        state = load_tile(chunk_states, state_row, column < KEY_DIM, value_column, VALUE_DIM)
        from_state += matmul(query, state, STATE)
        if momentum is not None:
            state = load_tile(chunk_momenta, state_row, column < KEY_DIM, value_column, VALUE_DIM)
            from_velocity += matmul(query, state, STATE)

    log_a = tl.load(log_decay + token, mask=valid, other=0.0)
    total, residue, total_before, residue_before = cumulate_log(log_a)
    if READ_BEFORE:
        seen = row[:, None] > row[None, :]
        decay = decay_matrix(total_before, residue_before, total, residue, seen)
        read = from_state * decay_from_start(total_before)[:, None]
    else:
        seen = row[:, None] >= row[None, :]
        decay = decay_matrix(total, residue, total, residue, seen)
        read = from_state * decay_from_start(total)[:, None]
    pseudo = load_tile(pseudo_values, token, valid, value_column, VALUE_DIM)
    read += matmul(decay * query_key, pseudo, STATE)
    if momentum is not None:
        log_mu = safe_log(tl.load(momentum + token, mask=valid, other=1.0))
        mu_total, mu_residue, _, _ = cumulate_log(log_mu)
        lower = (row[:, None] >= row[None, :]) & valid[:, None]
        mu_matrix = decay_matrix(mu_total, mu_residue, mu_total, mu_residue, lower)
        mu_start = tl.where(valid, decay_from_start(mu_total), 0.0)
        read += tl.sum(decay * mu_start[None, :], 1)[:, None] * from_velocity
        value = load_tile(v, token, valid, value_column, VALUE_DIM)
        read += matmul(matmul(decay, mu_matrix, SOLVE) * query_key, value, STATE)
    store_tile(o, token, valid, value_column, VALUE_DIM, scale * read)


def plan_forward(
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
    architecture: str,
) -> tuple[list[KernelCall], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """The calls of the forward pass and the tensors they fill; runs nothing (meta tensors will do)."""
    plan = launch.plan_chunks(q, k, v, momentum, cu_seqlens, chunk_size=chunk_size, architecture=architecture)
    calls, recomputed, final_state, final_momentum = plan_states(
        plan, k, v, log_decay, erase, momentum, initial_state, initial_momentum, keep_inverse=False
    )
    o = torch.empty_like(v)
    calls.append(
        plan.call(
            read_chunks_kernel,
            {
                "q": q,
                "k": k,
                "v": v,
                "log_decay": log_decay,
                "momentum": momentum,
                "pseudo_values": recomputed.pseudo_values,
                "chunk_states": recomputed.chunk_states,
                "chunk_momenta": recomputed.chunk_momenta,
                "o": o,
                "scale": scale,
            },
            tiles="value",
            read=read,
        )
    )
    return calls, (o, final_state, final_momentum)


@dataclass(frozen=True)
class ChunkStates:
    """What :func:`plan_states` computes per chunk, and backward uses again."""

    key_transform: torch.Tensor
    momentum_key_transform: torch.Tensor | None
    pseudo_values: torch.Tensor
    inverse: torch.Tensor | None
    carried_before: torch.Tensor | None
    momentum_tail: torch.Tensor | None
    chunk_states: torch.Tensor
    chunk_momenta: torch.Tensor | None


def plan_states(
    plan: launch.ChunkPlan,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    erase: torch.Tensor,
    momentum: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    initial_momentum: torch.Tensor | None,
    *,
    keep_inverse: bool,
) -> tuple[list[KernelCall], ChunkStates, torch.Tensor, torch.Tensor | None]:
    """The calls up to the chunk states, which backward repeats; returns calls, buffers, final states."""
    work = plan.precision.workspace
    per_key = (plan.batch, plan.tokens, plan.heads, plan.key_dim)
    state = (plan.sequences, plan.heads, plan.value_dim, plan.key_dim)
    chunk_state = (plan.chunks, plan.heads, plan.key_dim, plan.value_dim)
    inverse = (plan.chunks, plan.heads, plan.block_c, plan.block_c)
    has = momentum is not None
    states = ChunkStates(
        key_transform=k.new_empty(per_key, dtype=work),
        momentum_key_transform=k.new_empty(per_key, dtype=work) if has else None,
        pseudo_values=torch.empty_like(v, dtype=work),
        inverse=k.new_empty(inverse, dtype=work) if keep_inverse else None,
        carried_before=torch.empty_like(log_decay) if has else None,
        momentum_tail=torch.empty_like(log_decay) if has else None,
        chunk_states=k.new_empty(chunk_state, dtype=work),
        chunk_momenta=k.new_empty(chunk_state, dtype=work) if has else None,
    )
    final_state = k.new_empty(state, dtype=torch.float32)
    final_momentum = k.new_empty(state, dtype=torch.float32) if has else None
    inputs = {"k": k, "v": v, "log_decay": log_decay, "momentum": momentum}
    transforms = {
        "key_transform": states.key_transform,
        "momentum_key_transform": states.momentum_key_transform,
        "pseudo_values": states.pseudo_values,
        "carried_before": states.carried_before,
        "momentum_tail": states.momentum_tail,
    }
    solve = plan.call(
        solve_chunks_kernel, {**inputs, "erase": erase, **transforms, "inverse": states.inverse}
    )
    scan = plan.call(
        scan_chunks_kernel,
        {
            **inputs,
            **transforms,
            "initial_state": initial_state,
            "initial_momentum": initial_momentum,
            "chunk_states": states.chunk_states,
            "chunk_momenta": states.chunk_momenta,
            "final_state": final_state,
            "final_momentum": final_momentum,
        },
        tiles="value",
        scan=True,
    )
    return [solve, scan], states, final_state, final_momentum


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
    """Outputs ``o`` [B, T, H, Dv] in v's dtype, final state and momentum (fp32 [B or N, H, Dv, Dk]).

    Shapes as in :func:`nl_kernels.delta_memory`, which checks them; ``chunk_size`` is a hint, as the result
    does not depend on it. Waits for nothing on the device.

    Raises:
        NotImplementedError: a head wider than :data:`launch.MAX_HEAD_DIM`, or fp64.
    """
    q, k, v = launch.contiguous(q, k, v)
    log_decay, erase, momentum, initial_state, initial_momentum = launch.contiguous_fp32(
        log_decay, erase, momentum, initial_state, initial_momentum
    )
    calls, outputs = plan_forward(
        q,
        k,
        v,
        log_decay,
        erase,
        momentum,
        initial_state,
        initial_momentum,
        cu_seqlens,
        scale=scale,
        read=read,
        chunk_size=chunk_size,
        architecture=architecture_of(k.device),
    )
    run_calls(calls, k.device)
    return outputs
