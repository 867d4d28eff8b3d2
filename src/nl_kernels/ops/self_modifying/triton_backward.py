"""Launchers of the backward kernels.

The forward pass has kept the running states before every n-th chunk. Segment by segment, the last one first,
the forward kernel runs again and keeps those before each of its chunks; then the backward kernel walks over
the chunks in reverse. Gradients of states are carried from segment to segment in place.
"""

from __future__ import annotations

import torch

from nl_kernels.ops.self_modifying import launch
from nl_kernels.ops.self_modifying.triton_forward import forward_kernel, kept_states, kernel_arguments
from nl_kernels.ops.self_modifying.triton_linear_backward import linear_backward_kernel
from nl_kernels.ops.self_modifying.triton_two_layer_backward import two_layer_backward_kernel
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.targets import architecture_of


def plan_backward(
    grad_o: torch.Tensor,
    grad_stacks: list[torch.Tensor | None],
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
    """The calls of the backward pass and the gradients that they fill; runs nothing.

    Args:
        grad_stacks: cotangents of the running states, velocities and snapshot after the call; updated in
            place to those before the call.
        stacks: the parts of anchor, running states, velocities and snapshot before the call, then the kept
            states and velocities.

    Returns:
        The calls, and gradients of: query, key, value and gate input, momentum; largest rate and both
        biases by row, [B · H, 3]; anchor.
    """
    plan = launch.plan_of(query, stacks[3], stacks[4], momentum, options, architecture)
    inputs = {
        "query": query,
        "key_input": key_input,
        "value_input": value_input,
        "gate_input": gate_input,
        "momentum": momentum,
        "spans": spans,
        "rate_max": rate_max,
        "rate_bias": rate_bias,
        "retention_bias": retention_bias,
        **kernel_arguments(["anchor"], stacks[:3]),
        **kernel_arguments(["resumed"], stacks[9:12]),
    }
    running, velocity, kept = stacks[3:6], stacks[6:9], stacks[12:]
    segments = plan.segments()
    longest = options.checkpoint_every
    chunk_states = [kept_states(x, longest) for x in (*running, *velocity)]
    work = [None if x is None else torch.empty_like(x) for x in (*running, *velocity, *running)]
    like = torch.empty_like if spans is None else torch.zeros_like
    grad_tokens = [
        None if x is None else like(x) for x in (query, key_input, value_input, gate_input, momentum)
    ]
    grad_rates = query.new_zeros(plan.rows, 3)
    grad_anchor = [None if x is None else torch.zeros_like(x) for x in stacks[:3]]
    names = ("grad_query", "grad_key_input", "grad_value_input", "grad_gate_input", "grad_momentum")
    gradients = {
        "grad_o": grad_o,
        **dict(zip(names, grad_tokens, strict=True)),
        "grad_rates": grad_rates,
        **kernel_arguments(["grad", "grad_velocity", "grad_snapshot"], grad_stacks),
        **kernel_arguments(["grad_anchor"], grad_anchor),
    }
    scratch = plan.scratch(query)
    calls = []
    for index, (first, stop) in reversed(list(enumerate(segments))):
        span = {"first_chunk": first, "stop_chunk": stop, "kept_first_slot": first, "kept_slots": longest}
        states = kernel_arguments(["kept", "kept_velocity"], chunk_states)
        # Rows may begin after the first chunk, so the first segment takes the states before the call.
        initial = {"initial_slots": 1, "initial_slot": 0}
        initial |= kernel_arguments(["initial", "initial_velocity"], (*running, *velocity))
        if index > 0:
            initial = {"initial_slots": len(segments), "initial_slot": index}
            initial |= kernel_arguments(["initial", "initial_velocity"], kept)
        calls.append(
            plan.call(
                forward_kernel(plan),
                {
                    **inputs,
                    **initial,
                    "o": None,
                    **kernel_arguments(["final", "final_velocity", "snapshot"], work),
                    **states,
                    **span,
                    "kept_every": 1,
                    "scratch": scratch,
                },
                backward=False,
            )
        )
        last = {"is_last": int(stop == options.chunks)}
        calls.append(
            plan.call(backward_kernel(plan), {**inputs, **states, **gradients, **span, **last}, backward=True)
        )
    return calls, (*grad_tokens, grad_rates, *grad_anchor)


def backward_kernel(plan: launch.Plan):
    """The kernel for the plan's kind of memory."""
    return linear_backward_kernel if plan.hidden is None else two_layer_backward_kernel


def self_modifying_backward(
    grad_o: torch.Tensor,
    grad_stacks: tuple[torch.Tensor | None, ...],
    *tensors: torch.Tensor | None,
    options: launch.Options,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the tensors of ``plan_forward`` (``triton_forward.py``) but ``spans``.

    Args:
        grad_stacks: cotangents of the nine parts of the states after the call; an absent one is zero.
        tensors: those tensors, then the six kept ones.
    """
    tensors = [None if x is None else x.contiguous() for x in tensors]
    initial = (*tensors[12:18], *tensors[12:15])
    grads = [
        None
        if x is None
        else torch.zeros_like(x)
        if grad is None
        else grad.clone(memory_format=torch.contiguous_format)
        for x, grad in zip(initial, grad_stacks, strict=True)
    ]
    calls, results = plan_backward(
        grad_o.contiguous(),
        grads,
        *tensors,
        options=options,
        architecture=architecture_of(grad_o.device),
    )
    run_calls(calls, grad_o.device)
    *tokens, rates, first, last, gate = results
    heads = tensors[6].shape[0]
    by_head = rates.view(-1, heads, 3).sum(0)
    by_gate = (x.clone() for x in by_head.unbind(1))  # outputs of an operator may not share memory
    return (*tokens, *by_gate, first, last, gate, *grads)
