"""Triton forward of ``deep_memory`` for small chunks: one program a row walks over the row's chunks.

Small memories stay in registers, tokens are loaded a chunk ahead. Of larger ones the running weights live in
the buffers of the final state, from which each step takes what it needs; they stay in the L2 cache. At a
boundary they are the snapshot, so that only a partial first and last chunk has a copy of its own. Formulas of
a layer are in :mod:`nl_kernels.chunk_kernels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import activated, error_signal, proximal_rate, spread
from nl_kernels.chunk_kernels.scratch import hand_on, take_back
from nl_kernels.ops.deep_memory import launch
from nl_kernels.ops.deep_memory.triton_chunk import (
    carry_layer,
    chunk_coefficients,
    chunk_tokens,
    coefficients_of,
    copy_weight,
    erasing,
    load_base,
    load_weight,
    locate_row,
    read_layer,
    save_weight,
    serve,
    store_weight,
    write_layer,
)
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import load_tile, matmul, store_tile


@triton.jit(do_not_specialize=["tokens", "offset", "chunks"])
def erase_chunks_kernel(
    k,
    rate,
    log_decay,
    begin,
    stop,
    origin,
    inverses,
    tokens,
    offset,
    chunks,
    KEY_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    PROXIMAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a row and chunk: the inverse by which the first layer erases, which needs no state."""
    place = tl.program_id(0).to(tl.int64)
    row = place // chunks
    first, last, zero = locate_row(row, begin, stop, origin, tokens, offset)
    slot, valid = chunk_tokens(place % chunks, first, last, CHUNK, BLOCK_C)
    token = row * tokens + slot - zero
    decay = spread(tl.load(log_decay + token, mask=valid, other=0.0), BLOCK_C)
    eta = tl.load(rate + token, mask=valid, other=0.0)
    key = load_tile(k, token, valid, tl.arange(0, BLOCK_K), KEY_DIM)
    _, _, inverse = erasing(key, eta, decay[2], True, PROXIMAL, BLOCK_C, PRECISION)
    hand_on(inverses + place * (BLOCK_C * BLOCK_C), inverse)


@triton.jit(do_not_specialize=["tokens", "offset", "kept", "checkpoint", "chunk_places"])
def deep_memory_forward_kernel(
    q,
    k,
    v,
    rate,
    log_decay,
    momentum,
    inner,
    outer,
    inner_velocity,
    outer_velocity,
    inner_snapshot,
    outer_snapshot,
    inner_anchor,
    outer_anchor,
    begin,
    stop,
    origin,
    o,
    final_inner,
    final_outer,
    final_inner_velocity,
    final_outer_velocity,
    final_inner_snapshot,
    final_outer_snapshot,
    kept_inner,
    kept_outer,
    kept_inner_velocity,
    kept_outer_velocity,
    inverses,
    scratch,
    tokens,
    offset,
    kept,
    checkpoint,
    chunk_places,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
    RUNNING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ERASE_INNER: tl.constexpr,
    ERASE_OUTER: tl.constexpr,
    PROXIMAL: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a row. Of a linear memory, HIDDEN is the width of the values.

    Without ``scratch`` the steps of a chunk hand their tiles on in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    first, last, zero = locate_row(row, begin, stop, origin, tokens, offset)
    inner_held = None
    outer_held = None
    if HELD:
        inner_held = load_weight(inner, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
        if outer is not None:
            outer_held = load_weight(outer, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
    else:
        copy_weight(inner, row, final_inner, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
        copy_weight(inner_velocity, row, final_inner_velocity, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
        if outer is not None:
            copy_weight(outer, row, final_outer, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
            copy_weight(outer_velocity, row, final_outer_velocity, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
    if inner_snapshot is not None:
        copy_weight(inner_snapshot, row, final_inner_snapshot, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
    else:
        copy_weight(inner, row, final_inner_snapshot, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
    if outer is not None:
        if outer_snapshot is not None:
            copy_weight(outer_snapshot, row, final_outer_snapshot, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
        else:
            copy_weight(outer, row, final_outer_snapshot, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
    tl.debug_barrier()

    key_column = tl.arange(0, BLOCK_K)
    value_column = tl.arange(0, BLOCK_V)
    z_place = None
    back_place = None
    error_place = None
    inverse_place = None
    written_place = None
    if scratch is not None:
        z_place = scratch + row * (BLOCK_C * (3 * BLOCK_H + 2 * BLOCK_V + BLOCK_C))
        back_place = z_place + BLOCK_C * BLOCK_H  # then the running read of the first layer
        error_place = back_place + BLOCK_C * BLOCK_H
        inverse_place = error_place + BLOCK_C * BLOCK_V
        written_place = inverse_place + BLOCK_C * BLOCK_C
    slot, valid = chunk_tokens(0, first, last, CHUNK, BLOCK_C)
    token = row * tokens + slot - zero
    next_key = load_tile(k, token, valid, key_column, KEY_DIM)
    next_query = load_tile(q, token, valid, key_column, KEY_DIM)
    next_target = load_tile(v, token, valid, value_column, VALUE_DIM)
    next_eta = tl.load(rate + token, mask=valid, other=0.0)
    next_log = tl.load(log_decay + token, mask=valid, other=0.0)
    next_inverse = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    if ERASE_INNER:
        inverses += row * chunk_places * (BLOCK_C * BLOCK_C)
        next_inverse = take_back(inverses, next_inverse)
    chunks = tl.cdiv(last, CHUNK) - first // CHUNK
    for index in range(0, chunks):
        slot, valid = chunk_tokens(index, first, last, CHUNK, BLOCK_C)
        token = row * tokens + slot - zero
        is_first = index == 0
        if scratch is None:
            key = next_key
            query = next_query
            target = next_target
            eta = next_eta
            log = next_log
            inverse = next_inverse
            if ERASE_INNER:
                following = tl.minimum(index + 1, chunks - 1)
                next_inverse = take_back(inverses + following * (BLOCK_C * BLOCK_C), next_inverse)
            slot, later = chunk_tokens(index + 1, first, last, CHUNK, BLOCK_C)
            ahead = row * tokens + slot - zero
            next_key = load_tile(k, ahead, later, key_column, KEY_DIM)
            next_query = load_tile(q, ahead, later, key_column, KEY_DIM)
            next_target = load_tile(v, ahead, later, value_column, VALUE_DIM)
            next_eta = tl.load(rate + ahead, mask=later, other=0.0)
            next_log = tl.load(log_decay + ahead, mask=later, other=0.0)
        if kept_inner is not None and index % checkpoint == 0:
            to = row * kept + index // checkpoint
            save_weight(inner_held, final_inner, row, kept_inner, to, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
            save_weight(outer_held, final_outer, row, kept_outer, to, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
            copy_weight(final_inner_velocity, row, kept_inner_velocity, to, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
            copy_weight(
                final_outer_velocity, row, kept_outer_velocity, to, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H
            )
        # A boundary precedes the last chunk, unless it is the first one as well.
        if final_inner_snapshot is not None and (index == chunks - 1) & (index > 0):
            save_weight(
                inner_held, final_inner, row, final_inner_snapshot, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K
            )
            save_weight(
                outer_held, final_outer, row, final_outer_snapshot, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H
            )

        # Barriers part the steps of a chunk, so that nothing is loaded, and held, before its step.
        base = load_base(
            inner_held,
            final_inner,
            row,
            inner_snapshot,
            inner_anchor,
            row,
            is_first,
            HIDDEN,
            KEY_DIM,
            BLOCK_H,
            BLOCK_K,
        )
        outer_base = None
        if outer is not None:
            outer_base = load_base(
                outer_held,
                final_outer,
                row,
                outer_snapshot,
                outer_anchor,
                row,
                is_first,
                VALUE_DIM,
                HIDDEN,
                BLOCK_V,
                BLOCK_H,
            )
        if not RUNNING:
            if scratch is not None:
                query = load_tile(q, token, valid, key_column, KEY_DIM)
            y = matmul(query, tl.trans(base), PRECISION)
            if outer is not None:
                y = matmul(activated(y, ACTIVATION, NORMALIZED)[0], tl.trans(outer_base), PRECISION)
            if RESIDUAL:
                y += query
            store_tile(o, token, valid, value_column, VALUE_DIM, y)
            if not HELD:
                tl.debug_barrier()
        if scratch is not None:
            key = load_tile(k, token, valid, key_column, KEY_DIM)
            target = load_tile(v, token, valid, value_column, VALUE_DIM)
        z, back, error, _ = serve(
            key, target, base, outer_base, ACTIVATION, NORMALIZED, RESIDUAL, BOUND, PRECISION
        )
        hand_on(error_place, error)
        if outer is not None:
            hand_on(z_place, z)
            hand_on(back_place, back)
        if not HELD:
            tl.debug_barrier()
        if scratch is not None:
            log = tl.load(log_decay + token, mask=valid, other=0.0)
            eta = tl.load(rate + token, mask=valid, other=0.0)
            key = load_tile(k, token, valid, key_column, KEY_DIM)
        mu = None
        if momentum is not None:
            mu = tl.load(momentum + token, mask=valid, other=1.0)
        decay, carried, mixed = coefficients_of(log, mu, valid, BLOCK_C, PRECISION)
        used = eta
        if ERASE_INNER:
            if PROXIMAL:
                used = proximal_rate(eta, key)
            if scratch is not None:
                inverse = take_back(inverses + index * (BLOCK_C * BLOCK_C), next_inverse)
        else:
            inverse = next_inverse
        error = take_back(error_place, error)
        signal = error
        if outer is not None:
            hidden = activated(take_back(z_place, z), ACTIVATION, NORMALIZED)
            back = take_back(back_place, back)
            signal = error_signal(back, hidden[0], hidden[1], hidden[3], NORMALIZED, BOUND)[0]
        _, written, _ = write_layer(
            inner_held,
            final_inner,
            row,
            key,
            signal,
            used,
            decay[0],
            inverse,
            HIDDEN,
            KEY_DIM,
            ERASE_INNER,
            PRECISION,
        )
        hand_on(written_place, written)
        if not HELD:
            tl.debug_barrier()
        if scratch is not None:
            key = load_tile(k, token, valid, key_column, KEY_DIM)
        if RUNNING:
            if scratch is not None:
                query = load_tile(q, token, valid, key_column, KEY_DIM)
            read = read_layer(
                inner_held,
                final_inner,
                final_inner_velocity,
                row,
                inner_anchor,
                row,
                query,
                key,
                take_back(written_place, written),
                decay,
                mixed,
                HIDDEN,
                KEY_DIM,
                PRECISION,
            )
            if outer is not None:
                hand_on(back_place, read)
            if not HELD:
                tl.debug_barrier()
            if scratch is not None:
                key = load_tile(k, token, valid, key_column, KEY_DIM)
        after = carry_layer(
            inner_held,
            final_inner,
            final_inner_velocity,
            row,
            final_inner,
            final_inner_velocity,
            row,
            key,
            take_back(written_place, written),
            signal,
            used,
            decay,
            carried,
            mixed,
            HIDDEN,
            KEY_DIM,
            PRECISION,
        )
        if HELD:
            inner_held = after
        if outer is not None:
            if not HELD:
                tl.debug_barrier()
            if scratch is not None:
                decay, carried, mixed = chunk_coefficients(
                    log_decay, momentum, token, valid, BLOCK_C, PRECISION
                )
                eta = tl.load(rate + token, mask=valid, other=0.0)
            value = activated(take_back(z_place, z), ACTIVATION, NORMALIZED)[0]
            used, _, inverse = erasing(value, eta, decay[2], ERASE_OUTER, PROXIMAL, BLOCK_C, PRECISION)
            if scratch is not None:
                hand_on(inverse_place, inverse)
            if not HELD:
                tl.debug_barrier()
            value = activated(take_back(z_place, z), ACTIVATION, NORMALIZED)[0]
            _, written, _ = write_layer(
                outer_held,
                final_outer,
                row,
                value,
                take_back(error_place, error),
                used,
                decay[0],
                take_back(inverse_place, inverse),
                VALUE_DIM,
                HIDDEN,
                ERASE_OUTER,
                PRECISION,
            )
            hand_on(written_place, written)
            if not HELD:
                tl.debug_barrier()
            if RUNNING:
                read = read_layer(
                    outer_held,
                    final_outer,
                    final_outer_velocity,
                    row,
                    outer_anchor,
                    row,
                    activated(take_back(back_place, read), ACTIVATION, NORMALIZED)[0],
                    activated(take_back(z_place, z), ACTIVATION, NORMALIZED)[0],
                    take_back(written_place, written),
                    decay,
                    mixed,
                    VALUE_DIM,
                    HIDDEN,
                    PRECISION,
                )
                if not HELD:
                    tl.debug_barrier()
            after = carry_layer(
                outer_held,
                final_outer,
                final_outer_velocity,
                row,
                final_outer,
                final_outer_velocity,
                row,
                activated(take_back(z_place, z), ACTIVATION, NORMALIZED)[0],
                take_back(written_place, written),
                take_back(error_place, error),
                used,
                decay,
                carried,
                mixed,
                VALUE_DIM,
                HIDDEN,
                PRECISION,
            )
            if HELD:
                outer_held = after
        if RUNNING:
            if RESIDUAL:
                read += load_tile(q, token, valid, key_column, KEY_DIM)
            store_tile(o, token, valid, value_column, VALUE_DIM, read)
        if not HELD:
            tl.debug_barrier()

    if HELD:
        store_weight(final_inner, row, inner_held, HIDDEN, KEY_DIM)
        if outer is not None:
            store_weight(final_outer, row, outer_held, VALUE_DIM, HIDDEN)
    if final_inner_snapshot is not None and (last % CHUNK == 0) & (last > first):
        save_weight(
            inner_held, final_inner, row, final_inner_snapshot, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K
        )
        save_weight(
            outer_held, final_outer, row, final_outer_snapshot, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H
        )


def plan_erase(inputs: launch.Inputs, plan: launch.RowPlan) -> tuple[list[KernelCall], torch.Tensor | None]:
    """The call that makes the first layer's inverses, and these: [N, chunks, C, C]; none without erasing."""
    if plan.options.erase == "none":
        return [], None
    block_c = plan.blocks[0]
    inverses = inputs.q.new_empty((plan.rows, plan.chunks, block_c, block_c))
    arguments = {**inputs._asdict(), "inverses": inverses}
    return [plan.call(erase_chunks_kernel, arguments, by_chunk=True)], inverses


def plan_forward(
    inputs: launch.Inputs, options: launch.Options, *, keep: bool
) -> tuple[list[KernelCall], launch.Results]:
    """The kernels' calls, and what they fill; ``keep`` also keeps the states that the backward pass needs."""
    plan = launch.plan_rows(inputs, options)
    new, like = inputs.q.new_empty, torch.empty_like
    make = torch.empty if inputs.begin is None else torch.zeros  # slots without a token are not written
    o = make(*inputs.q.shape[:2], plan.value_dim, dtype=inputs.q.dtype, device=inputs.q.device)
    weights = inputs[6:10]
    final = [None if x is None else like(x) for x in weights]
    snapshot = [None if x is None or plan.ends_at_boundary else like(x) for x in weights[:2]]
    shape = (plan.rows, plan.kept)
    kept = [None if x is None or not keep else new((*shape, *x.shape[1:])) for x in weights]
    results = launch.Results(o, *final, *snapshot, *kept)
    calls, inverses = plan_erase(inputs, plan)
    scratch = new(plan.forward_scratch) if plan.forward_scratch else None
    arguments = {**inputs._asdict(), **results._asdict(), "inverses": inverses, "scratch": scratch}
    return [*calls, plan.call(deep_memory_forward_kernel, arguments)], results


def deep_memory_forward(inputs: launch.Inputs, options: launch.Options, *, keep: bool) -> launch.Results:
    """Run what :func:`plan_forward` plans."""
    inputs = launch.Inputs(*launch.contiguous(inputs))
    calls, results = plan_forward(inputs, options, keep=keep)
    run_calls(calls, inputs.q.device)
    return results
