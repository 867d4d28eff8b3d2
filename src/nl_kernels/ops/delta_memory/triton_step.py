"""Triton one-token step of ``delta_memory``: decode reads and writes each byte of the state once."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from nl_kernels.ops.delta_memory import launch
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import load_tile, store_tile
from nl_kernels.triton_support.targets import architecture_of


@triton.jit
def step_kernel(
    q,
    k,
    v,
    log_decay,
    erase,
    momentum,
    initial_state,
    initial_momentum,
    o,
    new_state,
    new_momentum,
    scale,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    READ_BEFORE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a sequence, head and tile of the value width; everything in fp32."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    row = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_value = row < VALUE_DIM
    state_row = program * VALUE_DIM + row
    key_program = program // GROUP
    query = tl.load(q + key_program * KEY_DIM + column, mask=column < KEY_DIM, other=0.0).to(tl.float32)
    key = tl.load(k + key_program * KEY_DIM + column, mask=column < KEY_DIM, other=0.0).to(tl.float32)
    value = tl.load(v + state_row, mask=in_value, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(log_decay + program))
    beta = tl.load(erase + program)

    old = load_tile(initial_state, state_row, in_value, column, KEY_DIM).to(tl.float32)
    written = value[:, None] * key[None, :]
    if momentum is not None:
        velocity = load_tile(initial_momentum, state_row, in_value, column, KEY_DIM).to(tl.float32)
        written += tl.load(momentum + program) * velocity
        store_tile(new_momentum, state_row, in_value, column, KEY_DIM, written)
    recalled = tl.sum(old * key[None, :], 1)
    new = decay * old - (beta * recalled)[:, None] * key[None, :] + written
    store_tile(new_state, state_row, in_value, column, KEY_DIM, new)
    read = tl.sum((old if READ_BEFORE else new) * query[None, :], 1)
    tl.store(o + state_row, (scale * read).to(o.dtype.element_ty), mask=in_value)


def plan_step(
    *tensors: torch.Tensor | None, scale: float, read: str, architecture: str
) -> tuple[KernelCall, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """The call of the step and the tensors it fills; runs nothing (meta tensors will do)."""
    q, k, v, _, _, momentum, state, _ = tensors
    dtypes = q.dtype, k.dtype, v.dtype
    grid, *resources = _launch(v.shape, k.shape, dtypes, momentum is not None, read, architecture)
    o, new_state = torch.empty_like(v), torch.empty_like(state, dtype=torch.float32)
    new_momentum = None if momentum is None else torch.empty_like(new_state)
    made = {"o": o, "new_state": new_state, "new_momentum": new_momentum, "scale": scale}
    arguments = dict(zip(launch.INPUTS, tensors)) | made
    return KernelCall(step_kernel, grid, arguments, *resources), (o, new_state, new_momentum)


@functools.lru_cache(maxsize=512)
def _launch(values, keys, dtypes, has_momentum: bool, read: str, architecture: str) -> tuple:
    """Grid, constants, warps and stages for v and k of these shapes."""
    (batch, heads, value_dim), key_dim = values, keys[-1]
    launch.check_head_dims(key_dim, value_dim)
    config = launch.config_of(
        "step",
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=launch.operand_dtype(*dtypes),
        architecture=architecture,
        has_momentum=has_momentum,
        rows=batch * heads,
    )
    constants = {
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "GROUP": heads // keys[1],
        "READ_BEFORE": read == "before",
        "BLOCK_K": config.block_k,
        "BLOCK_V": config.block_v,
    }
    grid = (batch * heads, -(-value_dim // config.block_v))
    return grid, constants, config.num_warps, config.num_stages


def delta_memory_step(
    *tensors: torch.Tensor | None, scale: float, read: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One token: q, k [B, G, Dk], v [B, H, Dv], rates [B, H] fp32, states fp32 [B, H, Dv, Dk].

    In the order of :data:`launch.INPUTS`.

    Returns ``o`` [B, H, Dv] in v's dtype, the new state, and with momentum the new momentum. One launch,
    nothing read on the host: a CUDA graph can capture it.

    Raises:
        NotImplementedError: a head wider than :data:`launch.MAX_HEAD_DIM`, or fp64.
    """
    device = tensors[0].device
    call, outputs = plan_step(
        *launch.prepared(tensors), scale=scale, read=read, architecture=architecture_of(device)
    )
    run_calls([call], device)
    return outputs
