"""Triton one-token step of ``deep_memory``: reads and writes each byte of the state once, where it lies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nl_kernels.chunk_kernels.one_token import learn, load_row, store_row
from nl_kernels.chunk_kernels.step_launch import plan_advance, warps_of
from nl_kernels.ops.deep_memory.launch import Options, StepInputs
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.tiles import power_of_two


@triton.jit(do_not_specialize=["H"])
def step_kernel(
    q,
    k,
    v,
    rate,
    log_decay,
    momentum,
    inner_anchor,
    outer_anchor,
    inner_snapshot,
    outer_snapshot,
    inner,
    outer,
    inner_velocity,
    outer_velocity,
    position,
    mask,
    o,
    H,
    ANCHOR_SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    READ: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ERASE_INNER: tl.constexpr,
    ERASE_OUTER: tl.constexpr,
    PROXIMAL: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a sequence and head; everything in fp32."""
    program = tl.program_id(0).to(tl.int64)
    sequence = program // H
    if mask is not None:  # noqa: SIM102 - decided when compiling, the other when running
        if tl.load(mask + sequence) == 0:
            store_row(o, program, VALUE_DIM, BLOCK_V, tl.zeros([1, BLOCK_V], tl.float32))
            return
    met = (tl.load(position + sequence) + 1) % CHUNK == 0
    query = load_row(q, program, KEY_DIM, BLOCK_K)
    carried = 0.0
    if momentum is not None:
        carried = tl.load(momentum + program).to(tl.float32)
    read = learn(
        inner_anchor,
        outer_anchor,
        inner_snapshot,
        outer_snapshot,
        inner,
        outer,
        inner_velocity,
        outer_velocity,
        program % H if ANCHOR_SHARED else program,
        program,
        program,
        load_row(k, program, KEY_DIM, BLOCK_K),
        load_row(v, program, VALUE_DIM, BLOCK_V),
        query,
        tl.load(rate + program).to(tl.float32),
        tl.exp(tl.load(log_decay + program).to(tl.float32)),
        carried,
        met,
        False,
        False,
        RESIDUAL,
        READ,
        KEY_DIM,
        VALUE_DIM,
        HIDDEN,
        ACTIVATION,
        NORMALIZED,
        ERASE_INNER,
        ERASE_OUTER,
        PROXIMAL,
        BOUND,
        BLOCK_K,
        BLOCK_V,
        BLOCK_H,
    )
    if RESIDUAL:
        read += query
    store_row(o, program, VALUE_DIM, BLOCK_V, read)


def plan_step(inputs: StepInputs, options: Options) -> tuple[list[KernelCall], torch.Tensor]:
    """The calls of a step and the reads that they fill; runs nothing (meta tensors will do)."""
    batch, heads, key_dim = inputs.k.shape
    value_dim = inputs.v.shape[-1]
    hidden = None if inputs.outer is None else inputs.outer.shape[-1]
    o = torch.empty_like(inputs.v, dtype=inputs.q.dtype)
    constants = {
        "ANCHOR_SHARED": inputs.inner_anchor is not None and inputs.inner_anchor.ndim == 3,
        "CHUNK": options.chunk_size,
        "READ": options.read,
        "RESIDUAL": options.residual,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "HIDDEN": hidden,
        "ACTIVATION": options.activation,
        "NORMALIZED": options.normalize_hidden,
        "ERASE_INNER": options.erase != "none",
        "ERASE_OUTER": options.erase == "per_layer",
        "PROXIMAL": options.proximal,
        "BOUND": options.error_bound or 0.0,
        "BLOCK_K": power_of_two(key_dim),
        "BLOCK_V": power_of_two(value_dim),
        "BLOCK_H": power_of_two(hidden or 1),
    }
    step = KernelCall(
        step_kernel,
        (batch * heads,),
        {**inputs._asdict(), "o": o, "H": heads},
        constants,
        warps_of(key_dim, value_dim, hidden),
        1,
    )
    return [step, plan_advance(inputs.position, inputs.mask, options.chunk_size)], o


def deep_memory_step(inputs: StepInputs, options: Options) -> torch.Tensor:
    """One token: ``o`` [B, H, Dv] in q's dtype; the state's tensors are written where they lie.

    All tensors are contiguous. Two launches, nothing read on the host: a CUDA graph can capture it.
    """
    calls, o = plan_step(inputs, options)
    run_calls(calls, inputs.q.device)
    return o
