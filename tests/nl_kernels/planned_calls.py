"""Calls of every op's kernels, planned for tensors that take no memory, so of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.triton_support.kernel_call import KernelCall
from tools.catalogue import unallocated

DEFAULT = MemoryRule()
TITANS = dataclasses.replace(DEFAULT, erase="none")
ARCHITECTURE = "sm_90"
BF16 = torch.bfloat16


def delta_memory_calls(
    batch: int, tokens: int, heads: int, width: int, *, sequences: int = 0
) -> list[KernelCall]:
    """Forward and backward with momentum; of ``sequences`` packed ones, if any."""
    from nl_kernels.ops.delta_memory.triton_backward import plan_backward
    from nl_kernels.ops.delta_memory.triton_forward import plan_forward

    state = unallocated(sequences or batch, heads, width, width)
    inputs = [
        *[unallocated(batch, tokens, heads, width, dtype=BF16)] * 3,
        *[unallocated(batch, tokens, heads)] * 3,
        *[state] * 2,
        unallocated(sequences + 1, dtype=torch.int64) if sequences else None,
    ]
    options = {"scale": 1.0, "read": "running", "chunk_size": 64, "architecture": ARCHITECTURE}
    forward, (o, *final) = plan_forward(*inputs, **options)
    backward, _ = plan_backward(o, *final, *inputs, **options)
    return [*forward, *backward]


def memory_calls(
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    hidden: int | None,
    chunk_size: int,
    *,
    self_made: bool,
    rule: MemoryRule = DEFAULT,
    offset: int = 0,
    packed: bool = False,
) -> list[KernelCall]:
    """Forward and backward of a bank of memories; ``packed``: sequences lie differently."""
    from tools.catalogue.memories import calls_of, inputs_of, options_of

    inputs = inputs_of(
        batch, tokens, heads, width, hidden, rule, self_made=self_made, dtype=BF16, apart=packed
    )
    options = options_of(BF16, rule, chunk_size, offset + tokens, ARCHITECTURE, read="running", offset=offset)
    return calls_of(inputs, options._replace(checkpoint_every=max(16, options.chunks // 2)))


def continuum_calls(batch: int, tokens: int, width: int, hidden: int) -> list[KernelCall]:
    """A chunk's step with weights of each sequence, what is read with its gradient, and the update."""
    from nl_kernels.ops.continuum import triton_backward, triton_chunk, triton_forward, triton_update

    target = {"architecture": ARCHITECTURE}
    x = unallocated(batch, tokens, width, dtype=BF16)
    up, down = unallocated(batch, hidden, width), unallocated(batch, width, hidden)
    rates = unallocated(batch, tokens)
    forward, _ = triton_forward.plan_forward(x, up, down, up, **target)
    backward, _ = triton_backward.plan_backward(x, x, up, down, up, True, **target)
    value = unallocated(width, width)
    chunk, sums = triton_chunk.plan_chunk(x, x, value, up, down, up, rates, 1.0, True, **target)
    read, _ = triton_chunk.plan_read_backward(x, x, up, down, up, [(None, sums[1:])], **target)
    weights = [up, down]
    update = triton_update.plan_update(
        weights,
        weights,
        weights,
        0.9,
        [unallocated(hidden), unallocated(width)],
        [x.to(BF16) for x in weights],
    )
    return [*forward, *backward, *chunk, *read, *update]


def newton_schulz_calls(count: int, rows: int, columns: int) -> list[KernelCall]:
    from nl_kernels.ops.newton_schulz.triton_forward import plan_forward

    x = unallocated(count, rows, columns, dtype=BF16)
    return plan_forward(x, [(1.0, 1.0, 1.0)], architecture=ARCHITECTURE)[0]


def step_calls(batch: int, heads: int, width: int, hidden: int | None) -> Iterator[KernelCall]:
    """One token of every op that has a step."""
    from nl_kernels.ops.delta_memory import triton_step as delta_step

    token, number = unallocated(batch, heads, width, dtype=BF16), unallocated(batch, heads)
    state = unallocated(batch, heads, width, width)
    call, _ = delta_step.plan_step(
        *[token] * 3, *[number] * 3, *[state] * 2, scale=1.0, read="running", architecture=ARCHITECTURE
    )
    yield call
    for self_made in (False, True):
        yield memory_calls(batch, 1, heads, width, hidden, 16, self_made=self_made, packed=True)[0]


def kind_of(call: KernelCall) -> tuple:
    """What two calls that run the same compiled code have in common."""
    from tools.ahead_of_time import signature_of

    signature = tuple(signature_of(call).items())
    return call.kernel.__name__, signature, tuple(call.constants.items()), call.num_warps, call.num_stages
