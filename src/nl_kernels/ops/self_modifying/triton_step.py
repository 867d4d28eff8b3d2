"""Triton one-token step of ``self_modifying_memory``: the state is read and written where it lies.

One program a sequence and head makes keys, values and gates at the snapshots of four memories, then lets
each of the five learn, one after another: M_memory's read is part of its turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nl_kernels.chunk_kernels.one_token import learn, load_row, normalized, serve, store_row
from nl_kernels.chunk_kernels.step_launch import plan_advance, warps_of
from nl_kernels.ops.self_modifying.launch import Options, StepInputs
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.tiles import power_of_two


@triton.jit
def _serve(
    inner_anchor,
    outer_anchor,
    first_snapshot,
    last_snapshot,
    anchor_index,
    program,
    x,
    MEMORY: tl.constexpr,
    IN_STACK: tl.constexpr,
    STACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """f(x) of a memory: the ``MEMORY``-th first layer, the ``IN_STACK``-th of ``STACKED`` last ones."""
    last_index = program * STACKED + IN_STACK
    if HIDDEN is None:
        y = serve(
            inner_anchor, None, last_snapshot, None, anchor_index, last_index, last_index, x,
            WIDTH, VALUE_DIM, HIDDEN, ACTIVATION, NORMALIZED, BLOCK_D, BLOCK_V, BLOCK_H,
        )  # fmt: skip
    else:
        y = serve(
            inner_anchor, outer_anchor, first_snapshot, last_snapshot, anchor_index, program * 5 + MEMORY,
            last_index, x,
            WIDTH, VALUE_DIM, HIDDEN, ACTIVATION, NORMALIZED, BLOCK_D, BLOCK_V, BLOCK_H,
        )  # fmt: skip
    return y


@triton.jit
def _learn(
    inner_anchor,
    outer_anchor,
    first_snapshot,
    last_snapshot,
    first,
    last,
    first_velocity,
    last_velocity,
    anchor_index,
    program,
    key,
    value,
    query,
    rate,
    decay,
    momentum,
    met,
    MEMORY: tl.constexpr,
    IN_STACK: tl.constexpr,
    STACKED: tl.constexpr,
    TARGET_RESIDUAL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    READ: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ERASE_INNER: tl.constexpr,
    ERASE_OUTER: tl.constexpr,
    PROXIMAL: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A memory learns ``key → its own target``; its read of ``query``. Layers as in :func:`_serve`."""
    last_index = program * STACKED + IN_STACK
    if HIDDEN is None:
        y = learn(
            inner_anchor, None, last_snapshot, None, last, None, last_velocity, None,
            anchor_index, last_index, last_index, key, value, query, rate, decay, momentum, met,
            True, TARGET_RESIDUAL, RESIDUAL, READ, WIDTH, VALUE_DIM, HIDDEN, ACTIVATION, NORMALIZED,
            ERASE_INNER, ERASE_OUTER, PROXIMAL, BOUND, BLOCK_D, BLOCK_V, BLOCK_H,
        )  # fmt: skip
    else:
        y = learn(
            inner_anchor, outer_anchor, first_snapshot, last_snapshot, first, last,
            first_velocity, last_velocity,
            anchor_index, program * 5 + MEMORY, last_index, key, value, query, rate, decay, momentum, met,
            True, TARGET_RESIDUAL, RESIDUAL, READ, WIDTH, VALUE_DIM, HIDDEN, ACTIVATION, NORMALIZED,
            ERASE_INNER, ERASE_OUTER, PROXIMAL, BOUND, BLOCK_D, BLOCK_V, BLOCK_H,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["H"])
def step_kernel(
    query,
    key_input,
    value_input,
    gate_input,
    momentum,
    rate_max,
    rate_bias,
    retention_bias,
    key_inner,
    key_outer,
    value_inner,
    value_outer,
    memory_inner,
    memory_outer,
    rate_inner,
    rate_outer,
    retention_inner,
    retention_outer,
    first_snapshot,
    last_snapshot,
    gate_snapshot,
    first,
    last,
    gate,
    first_velocity,
    last_velocity,
    gate_velocity,
    position,
    mask,
    o,
    H,
    ANCHOR_SHARED: tl.constexpr,
    MEMORY_CLOCK: tl.constexpr,
    OTHERS_CLOCK: tl.constexpr,
    READ: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PROJECTION: tl.constexpr,
    TARGET: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ERASE_INNER: tl.constexpr,
    ERASE_OUTER: tl.constexpr,
    PROXIMAL: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a sequence and head; everything in fp32."""
    program = tl.program_id(0).to(tl.int64)
    sequence = program // H
    head = program % H
    if mask is not None:  # noqa: SIM102 - decided when compiling, the other when running
        if tl.load(mask + sequence) == 0:
            store_row(o, program, WIDTH, BLOCK_D, tl.zeros([1, BLOCK_D], tl.float32))
            return
    at = head if ANCHOR_SHARED else program
    after = tl.load(position + sequence) + 1
    own, others = after % MEMORY_CLOCK == 0, after % OTHERS_CLOCK == 0

    x = load_row(key_input, program, WIDTH, BLOCK_D)
    key = _serve(
        key_inner, key_outer, first_snapshot, last_snapshot, at, program, x,
        0, 0, 3, WIDTH, WIDTH, HIDDEN, ACTIVATION, NORMALIZED, BLOCK_D, BLOCK_D, BLOCK_H,
    )  # fmt: skip
    if PROJECTION:
        key += x
    key = normalized(key)
    x = load_row(value_input, program, WIDTH, BLOCK_D)
    value = _serve(
        value_inner, value_outer, first_snapshot, last_snapshot, at, program, x,
        1, 1, 3, WIDTH, WIDTH, HIDDEN, ACTIVATION, NORMALIZED, BLOCK_D, BLOCK_D, BLOCK_H,
    )  # fmt: skip
    if PROJECTION:
        value += x
    x = load_row(gate_input, program, WIDTH, BLOCK_D)
    logit = _serve(
        rate_inner, rate_outer, first_snapshot, gate_snapshot, at, program, x,
        3, 0, 2, WIDTH, 1, HIDDEN, ACTIVATION, NORMALIZED, BLOCK_D, 1, BLOCK_H,
    )  # fmt: skip
    rate = tl.load(rate_max + head).to(tl.float32)
    rate *= tl.sigmoid(tl.sum(logit) + tl.load(rate_bias + head).to(tl.float32))
    logit = _serve(
        retention_inner, retention_outer, first_snapshot, gate_snapshot, at, program, x,
        4, 1, 2, WIDTH, 1, HIDDEN, ACTIVATION, NORMALIZED, BLOCK_D, 1, BLOCK_H,
    )  # fmt: skip
    decay = tl.sigmoid(tl.sum(logit) + tl.load(retention_bias + head).to(tl.float32))
    carried = 0.0
    if momentum is not None:
        carried = tl.load(momentum + program).to(tl.float32)
    q = normalized(load_row(query, program, WIDTH, BLOCK_D))

    # Every thread has read the snapshots above: a barrier comes before the first write, in `learn`.
    _learn(
        key_inner, key_outer, first_snapshot, last_snapshot, first, last, first_velocity, last_velocity,
        at, program, key, value, q, rate, decay, carried, others,
        0, 0, 3, TARGET, PROJECTION, "none", WIDTH, WIDTH, HIDDEN, ACTIVATION, NORMALIZED,
        ERASE_INNER, ERASE_OUTER, PROXIMAL, BOUND, BLOCK_D, BLOCK_D, BLOCK_H,
    )  # fmt: skip
    _learn(
        value_inner, value_outer, first_snapshot, last_snapshot, first, last, first_velocity, last_velocity,
        at, program, key, value, q, rate, decay, carried, others,
        1, 1, 3, TARGET, PROJECTION, "none", WIDTH, WIDTH, HIDDEN, ACTIVATION, NORMALIZED,
        ERASE_INNER, ERASE_OUTER, PROXIMAL, BOUND, BLOCK_D, BLOCK_D, BLOCK_H,
    )  # fmt: skip
    read = _learn(
        memory_inner, memory_outer, first_snapshot, last_snapshot, first, last, first_velocity, last_velocity,
        at, program, key, value, q, rate, decay, carried, own,
        2, 2, 3, TARGET, RESIDUAL, READ, WIDTH, WIDTH, HIDDEN, ACTIVATION, NORMALIZED,
        ERASE_INNER, ERASE_OUTER, PROXIMAL, BOUND, BLOCK_D, BLOCK_D, BLOCK_H,
    )  # fmt: skip
    if RESIDUAL:
        read += q
    store_row(o, program, WIDTH, BLOCK_D, read)
    _learn(
        rate_inner, rate_outer, first_snapshot, gate_snapshot, first, gate, first_velocity, gate_velocity,
        at, program, key, value, q, rate, decay, carried, others,
        3, 0, 2, False, False, "none", WIDTH, 1, HIDDEN, ACTIVATION, NORMALIZED,
        ERASE_INNER, ERASE_OUTER, PROXIMAL, BOUND, BLOCK_D, 1, BLOCK_H,
    )  # fmt: skip
    _learn(
        retention_inner, retention_outer, first_snapshot, gate_snapshot, first, gate,
        first_velocity, gate_velocity,
        at, program, key, value, q, rate, decay, carried, others,
        4, 1, 2, False, False, "none", WIDTH, 1, HIDDEN, ACTIVATION, NORMALIZED,
        ERASE_INNER, ERASE_OUTER, PROXIMAL, BOUND, BLOCK_D, 1, BLOCK_H,
    )  # fmt: skip


def plan_step(inputs: StepInputs, options: Options) -> tuple[list[KernelCall], torch.Tensor]:
    """The calls of a step and the reads that they fill; runs nothing (meta tensors will do)."""
    batch, heads, width = inputs.query.shape
    hidden = None if inputs.first is None else inputs.last.shape[-1]
    o = torch.empty_like(inputs.query)
    constants = {
        "ANCHOR_SHARED": inputs.key_inner is not None and inputs.key_inner.ndim == 3,
        "MEMORY_CLOCK": options.chunk_size,
        "OTHERS_CLOCK": options.generator_chunk_size,
        "READ": options.read,
        "RESIDUAL": options.residual,
        "PROJECTION": options.projection_residual,
        "TARGET": options.target_residual,
        "WIDTH": width,
        "HIDDEN": hidden,
        "ACTIVATION": options.activation,
        "NORMALIZED": options.normalize_hidden,
        "ERASE_INNER": options.erase != "none",
        "ERASE_OUTER": options.erase == "per_layer",
        "PROXIMAL": options.proximal,
        "BOUND": options.error_bound,
        "BLOCK_D": power_of_two(width),
        "BLOCK_H": power_of_two(hidden or 1),
    }
    arguments = {**inputs._asdict(), "o": o, "H": heads}
    step = KernelCall(
        step_kernel, (batch * heads,), arguments, constants, warps_of(width, hidden or width), 1
    )
    period = max(options.chunk_size, options.generator_chunk_size)
    return [step, plan_advance(inputs.position, inputs.mask, period)], o


def self_modifying_step(inputs: StepInputs, options: Options) -> torch.Tensor:
    """One token: ``o`` [B, H, D] in the query's dtype; the state's tensors are written where they lie.

    All tensors are contiguous. Two launches, nothing read on the host: a CUDA graph can capture it.
    """
    calls, o = plan_step(inputs, options)
    run_calls(calls, inputs.query.device)
    return o
