"""Triton forward of ``delta_memory``: solve each chunk, scan the state over chunks, read each chunk.

The names follow the op's README: with ``K, V, Q`` the rows of a chunk, ``S, U`` the state and momentum it
starts from (held transposed, [Dk, Dv]),

    Z = pseudo-values = value_transform · V − key_transform · S − momentum_key_transform · U
    S ← b_C S + c_C U + Kᵀ (B_C ∘ Z + E_C ∘ V)
    O = scale · (b ∘ Q S + c ∘ Q U + (B ∘ QKᵀ) Z + (E ∘ QKᵀ) V)

and without momentum the terms in ``U`` and ``E`` vanish, with ``Z + V`` in the place of ``Z``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from nl_kernels.ops.delta_memory import launch
from nl_kernels.ops.delta_memory.triton_decays import (
    carried_from_start,
    decay_between,
    decay_from_start,
    decays_of,
    load_pairs,
    pairs_of,
    safe_log,
    store_cumulated,
)
from nl_kernels.ops.delta_memory.triton_segments import join_segments_kernel
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import (
    invert_unit_lower,
    load_tile,
    locate_chunk,
    locate_sequence,
    matmul,
    products_of_rows,
    store_tile,
)
from nl_kernels.triton_support.targets import architecture_of


@triton.jit(do_not_specialize=["T", "H"])
def solve_chunks_kernel(
    k,
    v,
    log_decay,
    erase,
    momentum,
    decays,
    pairs,
    key_transform,
    momentum_key_transform,
    pseudo_values,
    inverse,
    chunk_table,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INPUTS: tl.constexpr,
    STATE: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """One program a chunk and head: everything about it that does not need the state.

    Writes the chunk's ``decays``, ``T diag(β b⁻) K``, with momentum ``T diag(β c⁻) K``, M and E⁻, the
    state-free part of the pseudo-values, and where asked ``T = (I + A)⁻¹``.
    """
    program = tl.program_id(0)
    head = program % H
    start, count = locate_chunk(program // H, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    program = program.to(tl.int64)
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + head
    key_token = token // GROUP
    alpha, mu, carried_before, momentum_tail = decays_of(decays, program, BLOCK_C, MOMENTUM)
    store_cumulated(alpha, row, tl.load(log_decay + token, mask=valid, other=-float("inf")), BLOCK_C)
    if MOMENTUM:
        store_cumulated(mu, row, safe_log(tl.load(momentum + token, mask=valid, other=0.0)), BLOCK_C)
    tl.debug_barrier()

    key_products = products_of_rows(k, k, key_token, valid, KEY_DIM, BLOCK_K, INPUTS)
    beta = tl.load(erase + token, mask=valid, other=0.0)
    key_products *= beta[:, None]
    decay_before = decay_between(alpha, row[:, None] - 1, row[None, :], BLOCK_C)
    if MOMENTUM:
        mu_matrix = decay_between(mu, row[:, None], row[None, :], BLOCK_C)
        # The conditions keep products out of fused additions, which would make lanes differ in a last bit.
        carried = tl.where(
            row[:, None] > row[None, :], decay_before * decay_from_start(mu, row)[None, :], 0.0
        )
        tl.store(carried_before + row, tl.sum(carried, 1))
        tail = decay_between(alpha, count - 1, row, BLOCK_C)[:, None]
        tl.store(
            momentum_tail + row, tl.sum(tl.where(row[:, None] >= row[None, :], tail * mu_matrix, 0.0), 0)
        )
        mu_pairs, mixed = pairs_of(pairs, program, BLOCK_C)
        store_tile(mu_pairs, row, row < BLOCK_C, row, BLOCK_C, mu_matrix)
        store_tile(mixed, row, row < BLOCK_C, row, BLOCK_C, matmul(decay_before, mu_matrix, SOLVE))
        tl.debug_barrier()
    inverted = invert_unit_lower(decay_before * key_products, BLOCK_C, SOLVE)
    if inverse is not None:
        store_tile(inverse, program * BLOCK_C + row, row < BLOCK_C, row, BLOCK_C, inverted)
    # By column: loaded again, in the layout of the product that it scales.
    erased = tl.load(erase + token, mask=valid, other=0.0)
    key_mixing = inverted * (erased * decay_from_start(alpha, row - 1))[None, :]
    value_transform = inverted
    if MOMENTUM:
        momentum_key_mixing = inverted * (erased * tl.load(carried_before + row))[None, :]
        # A second time, so that they need no registers in between.
        key_products = products_of_rows(k, k, key_token, valid, KEY_DIM, BLOCK_K, INPUTS)
        key_products *= beta[:, None] * load_pairs(mixed, row[:, None], row[None, :], BLOCK_C)
        value_transform = -matmul(inverted, key_products, SOLVE)

    for first in range(0, KEY_DIM, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        key = load_tile(k, key_token, valid, column, KEY_DIM)
        store_tile(key_transform, token, valid, column, KEY_DIM, matmul(key_mixing, key, STATE))
        if MOMENTUM:
            product = matmul(momentum_key_mixing, key, STATE)
            store_tile(momentum_key_transform, token, valid, column, KEY_DIM, product)
    for first in range(0, VALUE_DIM, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        value = load_tile(v, token, valid, column, VALUE_DIM)
        store_tile(pseudo_values, token, valid, column, VALUE_DIM, matmul(value_transform, value, STATE))


@triton.jit(do_not_specialize=["segments", "T", "H"])
def scan_chunks_kernel(
    k,
    v,
    decays,
    key_transform,
    momentum_key_transform,
    pseudo_values,
    initial_state,
    initial_momentum,
    chunk_states,
    chunk_momenta,
    segment_maps,
    segment_states,
    final_state,
    final_momentum,
    cu_seqlens,
    chunk_offsets,
    segments,
    T,
    H,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SUMMARY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STATE: tl.constexpr,
):
    """One program a sequence, head, segment and tile of the value width: carries the state over the chunks.

    Writes the state (and momentum) that each chunk starts from, completes the pseudo-values in place, and
    writes the final state. Only this kernel is sequential; it holds the state in registers, [Dk, tile].
    A segment starts from its ``segment_states``. SUMMARY writes instead what a segment makes of no state, and
    in tiles beyond the value width of the identity: ``segment_maps`` [programs, Dk, value tiles and Dk].
    """
    program = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
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
    place = tl.program_id(0).to(tl.int64) * KEY_DIM + key_column
    WIDTH: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V * BLOCK_V
    if SUMMARY:
        state += (key_column[:, None] == (value_column - WIDTH)[None, :]).to(tl.float32)
    elif segment_states is not None:
        state += load_tile(segment_states, place, key_column < KEY_DIM, value_column, VALUE_DIM)
    elif initial_state is not None:
        state += tl.load(initial_state + public, mask=state_mask, other=0.0).to(tl.float32)
    if MOMENTUM:
        velocity = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if initial_momentum is not None:
            velocity += tl.load(initial_momentum + public, mask=state_mask, other=0.0).to(tl.float32)

    chunks = tl.cdiv(length, BLOCK_C).to(tl.int32)
    first = segment * tl.cdiv(chunks, segments)
    for index in range(first, tl.minimum(first + tl.cdiv(chunks, segments), chunks)):
        chunk = (first_chunk + index) * H + head
        state_row = chunk * KEY_DIM + key_column
        if not SUMMARY:
            store_tile(chunk_states, state_row, key_column < KEY_DIM, value_column, VALUE_DIM, state)
        valid = index * BLOCK_C + row < length
        last = tl.minimum(length - index * BLOCK_C, BLOCK_C) - 1
        token = (start + index * BLOCK_C + row) * H + head
        key = load_tile(k, token // GROUP, valid, key_column, KEY_DIM)
        transform = load_tile(key_transform, token, valid, key_column, KEY_DIM)
        pseudo = load_tile(pseudo_values, token, valid, value_column, VALUE_DIM).to(tl.float32)
        pseudo -= matmul(transform, state, STATE)

        alpha, mu, carried_before, momentum_tail = decays_of(decays, chunk, BLOCK_C, MOMENTUM)
        written = decay_between(alpha, last, row, BLOCK_C)[:, None]
        state *= decay_from_start(alpha, last)
        if MOMENTUM:
            store_tile(chunk_momenta, state_row, key_column < KEY_DIM, value_column, VALUE_DIM, velocity)
            transform = load_tile(momentum_key_transform, token, valid, key_column, KEY_DIM)
            pseudo -= matmul(transform, velocity, STATE)
            value = load_tile(v, token, valid, value_column, VALUE_DIM).to(tl.float32)
            written = written * pseudo + tl.load(momentum_tail + row)[:, None] * value
            state += carried_from_start(alpha, mu, carried_before, last, BLOCK_C, False) * velocity
            velocity *= decay_from_start(mu, last)
            value *= decay_between(mu, last, row, BLOCK_C)[:, None]
            velocity += matmul(tl.trans(key), value, STATE)
        else:
            written *= pseudo
        if not SUMMARY:
            store_tile(pseudo_values, token, valid, value_column, VALUE_DIM, pseudo)
        state += matmul(tl.trans(key), written, STATE)

    if SUMMARY:
        store_tile(segment_maps, place, key_column < KEY_DIM, value_column, WIDTH + KEY_DIM, state)
    elif segment == segments - 1:
        tl.store(final_state + public, state, mask=state_mask)
    if MOMENTUM:
        tl.store(final_momentum + public, velocity, mask=state_mask)


@triton.jit(do_not_specialize=["T", "H"])
def read_chunks_kernel(
    q,
    k,
    v,
    decays,
    pairs,
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
    GROUP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INPUTS: tl.constexpr,
    STATE: tl.constexpr,
):
    """One program a chunk, head and tile of the value width: the outputs."""
    program = tl.program_id(0)
    head = program % H
    start, count = locate_chunk(program // H, chunk_table, T, BLOCK_C)
    if count == 0:
        return
    program = program.to(tl.int64)
    row = tl.arange(0, BLOCK_C)
    valid = row < count
    token = (start + row) * H + head
    key_token = token // GROUP
    value_column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)

    query_key = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    from_state = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    from_velocity = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
    for first in range(0, KEY_DIM, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        query = load_tile(q, key_token, valid, column, KEY_DIM)
        key = load_tile(k, key_token, valid, column, KEY_DIM)
        query_key += matmul(query, tl.trans(key), INPUTS)
        state_row = program * KEY_DIM + column
        state = load_tile(chunk_states, state_row, column < KEY_DIM, value_column, VALUE_DIM)
        from_state += matmul(query, state, STATE)
        if MOMENTUM:
            state = load_tile(chunk_momenta, state_row, column < KEY_DIM, value_column, VALUE_DIM)
            from_velocity += matmul(query, state, STATE)

    alpha, mu, carried_before, _ = decays_of(decays, program, BLOCK_C, MOMENTUM)
    seen = row - BEFORE  # the row whose state is read
    decay = decay_between(alpha, seen[:, None], row[None, :], BLOCK_C)
    read = from_state * decay_from_start(alpha, seen)[:, None]
    pseudo = load_tile(pseudo_values, token, valid, value_column, VALUE_DIM)
    read += matmul(decay * query_key, pseudo, STATE)
    if MOMENTUM:
        read += carried_from_start(alpha, mu, carried_before, row, BLOCK_C, BEFORE)[:, None] * from_velocity
        mu_pairs, before = pairs_of(pairs, program, BLOCK_C)
        mixed = load_pairs(before, row[:, None], row[None, :], BLOCK_C)
        if not BEFORE:
            mixed *= decay_between(alpha, row, row - 1, BLOCK_C)[:, None]
            mixed += load_pairs(mu_pairs, row[:, None], row[None, :], BLOCK_C)
        query_key *= mixed
        value = load_tile(v, token, valid, value_column, VALUE_DIM)
        read += matmul(query_key, value, STATE)
    store_tile(o, token, valid, value_column, VALUE_DIM, scale * read)


def plan_forward(
    *tensors: torch.Tensor | None, scale: float, read: str, chunk_size: int, architecture: str
) -> tuple[list[KernelCall], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """The calls of the forward pass and the tensors they fill; runs nothing (meta tensors will do).

    Takes the tensors named by :data:`launch.INPUTS`, then ``cu_seqlens``.
    """
    plan, given = launch.plan_chunks(*tensors, chunk_size=chunk_size, architecture=architecture)
    buffers, launches = _forward(plan, read)
    given |= launch.allocated(buffers, given["k"], given["log_decay"])
    o = given["o"] = torch.empty_like(given["v"])
    given["scale"] = scale
    return [call(given) for call in launches], (o, given["final_state"], given["final_momentum"])


@functools.lru_cache(maxsize=512)
def _forward(plan: launch.ChunkPlan, read: str) -> tuple[list[launch.Buffer], list[launch.Launch]]:
    """What the calls fill but ``o``, and what makes them."""
    buffers, launches = states_of(plan)
    return buffers, [*launches, plan.launch(read_chunks_kernel, tiles="value", read=read)]


def states_of(plan: launch.ChunkPlan) -> tuple[list[launch.Buffer], list[launch.Launch]]:
    """What the calls up to the chunk states fill, and what makes them; backward repeats them."""
    work, fp32, chunks = plan.precision.workspace, torch.float32, (plan.chunks, plan.heads)
    per_key = (plan.batch, plan.tokens, plan.heads, plan.key_dim)
    state = (plan.sequences, plan.heads, plan.value_dim, plan.key_dim)
    chunk_state = (*chunks, plan.key_dim, plan.value_dim)
    buffers = [
        ("decays", (*chunks, 6 if plan.has_momentum else 2, plan.block_c), fp32),
        ("key_transform", per_key, work),
        ("pseudo_values", (*per_key[:3], plan.value_dim), work),
        ("chunk_states", chunk_state, work),
        ("final_state", state, fp32),
    ]
    if plan.has_momentum:
        buffers += [
            ("pairs", (*chunks, 2, plan.block_c, plan.block_c), fp32),
            ("momentum_key_transform", per_key, work),
            ("chunk_momenta", chunk_state, work),
            ("final_momentum", state, fp32),
        ]
    launches, scan = [plan.launch(solve_chunks_kernel)], {"tiles": "value", "scan": True}
    if plan.segments > 1:
        tile = plan.config(scan_chunks_kernel).block_v
        rows = (plan.sequences * plan.heads * plan.segments, plan.key_dim)
        width = -(-plan.value_dim // tile) * tile + plan.key_dim
        buffers += [("segment_maps", (*rows, width), fp32), ("segment_states", (*rows, plan.value_dim), fp32)]
        launches += [
            plan.launch(scan_chunks_kernel, **scan, segments=plan.segments, summary=True),
            plan.launch(join_segments_kernel, **scan),
        ]
    return buffers, [*launches, plan.launch(scan_chunks_kernel, **scan, segments=plan.segments)]


def delta_memory_forward(
    *tensors: torch.Tensor | None, **options: float | int | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Outputs ``o`` [B, T, H, Dv] in v's dtype, final state and momentum (fp32 [B or N, H, Dv, Dk]).

    Shapes as in :func:`nl_kernels.delta_memory`, which checks them, in the order of :data:`launch.INPUTS`,
    then ``cu_seqlens``; options ``scale``, ``read`` and ``chunk_size``, a hint, as the result does not depend
    on it. Waits for nothing on the device.

    Raises:
        NotImplementedError: a head wider than :data:`launch.MAX_HEAD_DIM`, or fp64.
    """
    device = tensors[0].device
    calls, outputs = plan_forward(*launch.prepared(tensors), **options, architecture=architecture_of(device))
    run_calls(calls, device)
    return outputs
