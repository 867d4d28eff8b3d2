"""Launchers of the forward kernels: tensors in, planned calls and the tensors that they fill out."""

from __future__ import annotations

import torch

from nl_kernels.ops.self_modifying import launch
from nl_kernels.ops.self_modifying.triton_linear import linear_forward_kernel
from nl_kernels.ops.self_modifying.triton_two_layer import two_layer_forward_kernel
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.targets import architecture_of

PARTS = ("first", "last", "gate")


def kernel_arguments(names: list[str], tensors) -> dict[str, torch.Tensor | None]:
    """Tensors of stacks by the kernels' names, ``anchor_first``, ``anchor_last``, ``anchor_gate`` for one."""
    return dict(zip((f"{name}_{part}" for name in names for part in PARTS), tensors, strict=True))


def plan_forward(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    momentum: torch.Tensor | None,
    spans: torch.Tensor | None,
    rate_max: torch.Tensor,
    rate_bias: torch.Tensor,
    retention_bias: torch.Tensor,
    *stacks: torch.Tensor | None,
    options: launch.Options,
    architecture: str,
) -> tuple[list[KernelCall], tuple[torch.Tensor | None, ...]]:
    """The call of the forward pass and what it fills; runs nothing (meta tensors will do).

    ``stacks`` are the parts of anchor, running states, velocities and snapshot. Filled are ``o``, the parts
    of the running states, velocities and snapshot after the call, and of the kept states and velocities.
    """
    plan = launch.plan_of(query, stacks[3], stacks[4], momentum, options, architecture)
    tokens = {
        "query": query,
        "key_input": key_input,
        "value_input": value_input,
        "gate_input": gate_input,
        "momentum": momentum,
        "spans": spans,
        "rate_max": rate_max,
        "rate_bias": rate_bias,
        "retention_bias": retention_bias,
    }
    given = kernel_arguments(["anchor", "initial", "initial_velocity", "resumed"], stacks)
    running, velocity = stacks[3:6], stacks[6:9]
    o = torch.empty_like(query) if spans is None else torch.zeros_like(query)
    made = [None if x is None else torch.empty_like(x) for x in (*running, *velocity, *running)]
    kept: list[torch.Tensor | None] = [None] * 6
    slots = 0
    if options.checkpoint_every:
        slots = len(plan.segments())
        kept = [kept_states(x, slots) for x in (*running, *velocity)]
    call = plan.call(
        forward_kernel(plan),
        {
            **tokens,
            **given,
            "o": o,
            **kernel_arguments(["final", "final_velocity", "snapshot"], made),
            **kernel_arguments(["kept", "kept_velocity"], kept),
            "first_chunk": 0,
            "stop_chunk": options.chunks,
            "initial_slots": 1,
            "initial_slot": 0,
            "kept_every": max(1, options.checkpoint_every),
            "kept_first_slot": 0,
            "kept_slots": slots,
            "scratch": plan.scratch(query),
        },
        backward=False,
    )
    return [call], (o, *made, *kept)


def kept_states(state: torch.Tensor | None, slots: int) -> torch.Tensor | None:
    """Room for ``slots`` states of each row, [B · H, slots, ..]."""
    if state is None:
        return None
    return state.new_empty((state.shape[0] * state.shape[1], slots, *state.shape[2:]))


def forward_kernel(plan: launch.Plan):
    """The kernel for the plan's kind of memory."""
    return linear_forward_kernel if plan.hidden is None else two_layer_forward_kernel


def self_modifying_forward(*tensors: torch.Tensor | None, options: launch.Options):
    """``o`` [B, T, H, D] and the stacks after the call, see :func:`plan_forward`."""
    tensors = [None if x is None else x.contiguous() for x in tensors]
    calls, results = plan_forward(*tensors, options=options, architecture=architecture_of(tensors[0].device))
    run_calls(calls, tensors[0].device)
    return results
