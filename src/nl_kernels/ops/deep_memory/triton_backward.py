"""Triton backward of ``deep_memory`` for small chunks: one program a row walks back over the row's chunks.

From a state that the forward kernel kept, the chunks up to the next one are run again, each chunk's start
state going to a stack; then each of them is differentiated, last one first. Gradients of the weights
accumulate in the buffers of their results. What one step of a chunk hands to the next goes by way of memory
that stays in the caches: together it would not fit the registers. The derivatives are those of
:mod:`nl_kernels.chunk_kernels.adjoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nl_kernels.chunk_kernels.forward import activated
from nl_kernels.chunk_kernels.scratch import take_back
from nl_kernels.ops.deep_memory import launch
from nl_kernels.ops.deep_memory.triton_adjoint import chunk_adjoint
from nl_kernels.ops.deep_memory.triton_chunk import (
    add_weight,
    chunk_tokens,
    copy_weight,
    fill_weight,
    locate_row,
)
from nl_kernels.ops.deep_memory.triton_forward import plan_erase
from nl_kernels.ops.deep_memory.triton_rerun import INNER, OUTER, SCRATCH_TILES, Z, carry_again, rerun_chunk
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import load_tile


@triton.jit(do_not_specialize=["tokens", "offset", "kept", "checkpoint", "chunk_places"])
def deep_memory_backward_kernel(
    do,
    d_inner_snapshot_after,
    d_outer_snapshot_after,
    q,
    k,
    v,
    rate,
    log_decay,
    momentum,
    inner_snapshot,
    outer_snapshot,
    inner_anchor,
    outer_anchor,
    begin,
    stop,
    origin,
    kept_inner,
    kept_outer,
    kept_inner_velocity,
    kept_outer_velocity,
    dq,
    dk,
    dv,
    d_rate,
    d_log_decay,
    d_momentum,
    d_inner,
    d_outer,
    d_inner_velocity,
    d_outer_velocity,
    d_inner_snapshot,
    d_outer_snapshot,
    d_inner_anchor,
    d_outer_anchor,
    inner_stack,
    outer_stack,
    inner_velocity_stack,
    outer_velocity_stack,
    pending_inner,
    pending_outer,
    pending_inner_velocity,
    pending_outer_velocity,
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
    TWO_LAYER: tl.constexpr,
    CHUNK: tl.constexpr,
    RECOMPUTES: tl.constexpr,
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
    """One program a row. ``d_inner`` … ``d_outer_velocity`` come holding the gradients of the final state."""
    SLOT: tl.constexpr = BLOCK_C * max(BLOCK_C, BLOCK_K, BLOCK_V, BLOCK_H)
    row = tl.program_id(0).to(tl.int64)
    first, last, zero = locate_row(row, begin, stop, origin, tokens, offset)
    scratch += row * (16 * SLOT)
    chunks = tl.cdiv(last, CHUNK) - first // CHUNK
    ends_at_boundary = (last % CHUNK == 0) & (last > first)

    fill_weight(d_inner_snapshot, row, 0.0, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
    fill_weight(d_inner_anchor, row, 0.0, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
    if TWO_LAYER:
        fill_weight(d_outer_snapshot, row, 0.0, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
        fill_weight(d_outer_anchor, row, 0.0, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
    tl.debug_barrier()
    # The snapshot after the call: the last state, the one at the last chunk's start, or the snapshot before.
    if ends_at_boundary:
        add_weight(d_inner, row, d_inner_snapshot_after, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
        if TWO_LAYER:
            add_weight(d_outer, row, d_outer_snapshot_after, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
    elif chunks <= 1:
        add_weight(d_inner_snapshot, row, d_inner_snapshot_after, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
        if TWO_LAYER:
            add_weight(
                d_outer_snapshot, row, d_outer_snapshot_after, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H
            )
    tl.debug_barrier()

    for back_index in range(0, chunks):
        index = chunks - 1 - back_index
        number = index % checkpoint
        if RECOMPUTES:
            place = row * checkpoint + number
            inner_states = inner_stack
            outer_states = outer_stack
            inner_velocities = inner_velocity_stack
            outer_velocities = outer_velocity_stack
            if (back_index == 0) | (number == checkpoint - 1):
                bottom = row * checkpoint
                source = row * kept + index // checkpoint
                copy_weight(kept_inner, source, inner_stack, bottom, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
                copy_weight(
                    kept_inner_velocity,
                    source,
                    inner_velocity_stack,
                    bottom,
                    HIDDEN,
                    KEY_DIM,
                    BLOCK_H,
                    BLOCK_K,
                )
                if TWO_LAYER:
                    copy_weight(kept_outer, source, outer_stack, bottom, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
                    copy_weight(
                        kept_outer_velocity,
                        source,
                        outer_velocity_stack,
                        bottom,
                        VALUE_DIM,
                        HIDDEN,
                        BLOCK_V,
                        BLOCK_H,
                    )
                tl.debug_barrier()
                for below in range(0, number):
                    again = index - number + below
                    slot, valid = chunk_tokens(again, first, last, CHUNK, BLOCK_C)
                    token = row * tokens + slot - zero
                    again_inverse = None
                    if ERASE_INNER:
                        again_inverse = inverses + (row * chunk_places + again) * (BLOCK_C * BLOCK_C)
                    rerun_chunk(
                        k,
                        v,
                        rate,
                        log_decay,
                        token,
                        valid,
                        inner_stack,
                        outer_stack,
                        bottom + below,
                        inner_snapshot,
                        outer_snapshot,
                        inner_anchor,
                        outer_anchor,
                        row,
                        again == 0,
                        again_inverse,
                        scratch,
                        SLOT,
                        KEY_DIM,
                        VALUE_DIM,
                        HIDDEN,
                        ACTIVATION,
                        NORMALIZED,
                        RESIDUAL,
                        ERASE_INNER,
                        ERASE_OUTER,
                        PROXIMAL,
                        BOUND,
                        BLOCK_C,
                        BLOCK_K,
                        BLOCK_V,
                        BLOCK_H,
                        PRECISION,
                    )
                    eta = tl.load(rate + token, mask=valid, other=0.0)
                    carry_again(
                        inner_stack,
                        inner_velocity_stack,
                        bottom + below,
                        load_tile(k, token, valid, tl.arange(0, BLOCK_K), KEY_DIM),
                        log_decay,
                        momentum,
                        eta,
                        token,
                        valid,
                        scratch + INNER * SLOT,
                        SLOT,
                        HIDDEN,
                        KEY_DIM,
                        BLOCK_H,
                        ERASE_INNER,
                        PROXIMAL,
                        PRECISION,
                    )
                    if TWO_LAYER:
                        z = take_back(scratch + Z * SLOT, tl.zeros([BLOCK_C, BLOCK_H], tl.float32))
                        carry_again(
                            outer_stack,
                            outer_velocity_stack,
                            bottom + below,
                            activated(z, ACTIVATION, NORMALIZED)[0],
                            log_decay,
                            momentum,
                            eta,
                            token,
                            valid,
                            scratch + OUTER * SLOT,
                            SLOT,
                            VALUE_DIM,
                            HIDDEN,
                            BLOCK_V,
                            ERASE_OUTER,
                            PROXIMAL,
                            PRECISION,
                        )
                    tl.debug_barrier()
        else:
            place = row * kept + index
            inner_states = kept_inner
            outer_states = kept_outer
            inner_velocities = kept_inner_velocity
            outer_velocities = kept_outer_velocity
        slot, valid = chunk_tokens(index, first, last, CHUNK, BLOCK_C)
        token = row * tokens + slot - zero
        inverse_place = None
        if ERASE_INNER:
            inverse_place = inverses + (row * chunk_places + index) * (BLOCK_C * BLOCK_C)
        chunk_adjoint(
            do,
            q,
            k,
            v,
            rate,
            log_decay,
            momentum,
            inner_snapshot,
            outer_snapshot,
            inner_anchor,
            outer_anchor,
            inner_states,
            outer_states,
            inner_velocities,
            outer_velocities,
            dq,
            dk,
            dv,
            d_rate,
            d_log_decay,
            d_momentum,
            d_inner,
            d_outer,
            d_inner_velocity,
            d_outer_velocity,
            d_inner_snapshot,
            d_outer_snapshot,
            d_inner_anchor,
            d_outer_anchor,
            pending_inner,
            pending_outer,
            pending_inner_velocity,
            pending_outer_velocity,
            inverse_place,
            scratch,
            place,
            row,
            index == 0,
            token,
            valid,
            SLOT,
            KEY_DIM,
            VALUE_DIM,
            HIDDEN,
            TWO_LAYER,
            RUNNING,
            ACTIVATION,
            NORMALIZED,
            RESIDUAL,
            ERASE_INNER,
            ERASE_OUTER,
            PROXIMAL,
            BOUND,
            BLOCK_C,
            BLOCK_K,
            BLOCK_V,
            BLOCK_H,
            PRECISION,
        )
        is_snapshot = (back_index == 0) & (index > 0) & (last % CHUNK != 0)
        if is_snapshot:
            add_weight(d_inner, row, d_inner_snapshot_after, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
            if TWO_LAYER:
                add_weight(d_outer, row, d_outer_snapshot_after, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)
        tl.debug_barrier()

    # With a single chunk and no snapshot given, that after the call is the state before it.
    if inner_snapshot is None and (chunks <= 1) & ((last % CHUNK != 0) | (last == first)):
        add_weight(d_inner, row, d_inner_snapshot_after, row, HIDDEN, KEY_DIM, BLOCK_H, BLOCK_K)
        if TWO_LAYER:
            add_weight(d_outer, row, d_outer_snapshot_after, row, VALUE_DIM, HIDDEN, BLOCK_V, BLOCK_H)


class Gradients(NamedTuple):
    """What the backward kernel fills: the gradients of :class:`~launch.Inputs`' tensors, but for slots."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    d_rate: torch.Tensor
    d_log_decay: torch.Tensor
    d_momentum: torch.Tensor | None
    d_inner: torch.Tensor
    d_outer: torch.Tensor | None
    d_inner_velocity: torch.Tensor | None
    d_outer_velocity: torch.Tensor | None
    d_inner_snapshot: torch.Tensor | None
    d_outer_snapshot: torch.Tensor | None
    d_inner_anchor: torch.Tensor | None
    d_outer_anchor: torch.Tensor | None


def plan_backward(
    do: torch.Tensor,
    final: Sequence[torch.Tensor | None],
    snapshot: Sequence[torch.Tensor | None],
    inputs: launch.Inputs,
    kept: Sequence[torch.Tensor | None],
    options: launch.Options,
) -> tuple[list[KernelCall], Gradients]:
    """The kernels' calls, and what they fill.

    Args:
        do: gradient of the reads. final, snapshot: of the final running weights and velocities (four) and the
            final snapshot (two); ``None``: zero.
        kept: of :class:`~launch.Results`.
    """
    plan = launch.plan_rows(inputs, options)
    new = inputs.q.new_empty
    make = torch.empty_like if inputs.begin is None else torch.zeros_like  # slots without a token
    tokens = [None if x is None else make(x) for x in inputs[:6]]
    running = [
        None if x is None else torch.zeros_like(x) if g is None else g.clone()
        for x, g in zip(inputs[6:10], final)
    ]
    others = [None if x is None else torch.empty_like(x) for x in inputs[10:14]]
    gradients = Gradients(*tokens, *running, *others)

    weights = inputs[6:10]
    stack = [
        None if x is None or plan.checkpoint == 1 else new((plan.rows, plan.checkpoint, *x.shape[1:]))
        for x in weights
    ]
    pending = [None if x is None or options.read != "running" else torch.empty_like(x) for x in weights]
    calls, inverses = plan_erase(inputs, plan)
    block_c, *widths = plan.blocks
    scratch = new((plan.rows, SCRATCH_TILES, block_c * max(block_c, *widths)))
    names = ("inner", "outer", "inner_velocity", "outer_velocity")
    arguments = {
        **inputs._asdict(),
        **gradients._asdict(),
        "do": do,
        "d_inner_snapshot_after": snapshot[0],
        "d_outer_snapshot_after": snapshot[1],
        **{f"kept_{name}": x for name, x in zip(names, kept)},
        **{f"{name}_stack": x for name, x in zip(names, stack)},
        **{f"pending_{name}": x for name, x in zip(names, pending)},
        "inverses": inverses,
        "scratch": scratch,
    }
    return [*calls, plan.call(deep_memory_backward_kernel, arguments)], gradients


def deep_memory_backward(
    do: torch.Tensor,
    final: Sequence[torch.Tensor | None],
    snapshot: Sequence[torch.Tensor | None],
    inputs: launch.Inputs,
    kept: Sequence[torch.Tensor | None],
    options: launch.Options,
) -> Gradients:
    """Run what :func:`plan_backward` plans."""
    inputs = launch.Inputs(*launch.contiguous(inputs))
    cotangents = list(launch.contiguous((do, *final, *snapshot)))
    calls, gradients = plan_backward(cotangents[0], cotangents[1:5], cotangents[5:], inputs, kept, options)
    run_calls(calls, inputs.q.device)
    return gradients
