"""The plan of a bank's backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nl_kernels.memory.kernels.arguments import Bank, Options
from nl_kernels.memory.kernels.launch import Inputs, Plan, copies, kept_states
from nl_kernels.memory.state import map_tensors
from nl_kernels.triton_support.kernel_call import KernelCall


def _final_gradients(plan: Plan, d_running: Bank, d_snapshot: Bank) -> tuple[Bank, Bank]:
    """Gradients of weights and snapshot after the call, in memory of their own, from those of the results.

    A memory that ends at a boundary has taken its snapshot from the weights after the last token.
    """
    d_running, d_snapshot = copies(d_running), copies(d_snapshot)
    bank, (begin, stop) = plan.bank, plan.bounds()
    has_tokens = True if begin is None else stop > begin
    for at_running, at_snapshot, layer in zip(d_running, d_snapshot, plan.layers):
        if at_running is None:
            continue
        row = torch.arange(at_running.shape[1], device=at_running.device)[:, None]
        own = row.div(layer.OUT, rounding_mode="floor") == bank.OWN
        for clock, rows in ((bank.MEMORY_CLOCK, own), (bank.OTHERS_CLOCK, ~own)):
            met = torch.as_tensor((stop % clock == 0) & has_tokens, device=rows.device) & rows
            at_running += at_snapshot.masked_fill(~met, 0)
            at_snapshot.masked_fill_(met, 0)
    return d_running, d_snapshot


def plan_backward(
    d_o: torch.Tensor, d_running: Bank, d_snapshot: Bank, inputs: Inputs, kept: Bank, options: Options
) -> Iterator[KernelCall | Inputs]:
    """The calls of the backward pass, each to be run before the next is planned; then the gradients.

    The forward pass has ``kept`` the running weights before every n-th chunk. Segment by segment, the last
    one first, the forward kernel keeps those before each of its chunks; then the backward kernel walks over
    them. ``d_running`` and ``d_snapshot`` are gradients of the weights after the call.
    """
    plan = Plan.of(inputs, options)
    d_running, d_snapshot = _final_gradients(plan, d_running, d_snapshot)
    every, segments = options.checkpoint_every, plan.segments()
    tokens = inputs.tokens
    like = torch.empty_like if tokens.spans is None else torch.zeros_like
    gates = ("rate_max", "rate_bias", "retention_bias")
    d_tokens = map_tensors(like, tokens._replace(**dict.fromkeys((*gates, "spans"))))
    d_gates = None if tokens.gate is None else inputs.running.last.new_zeros(plan.heads, 3)
    d_anchor = map_tensors(torch.zeros_like, inputs.anchor)
    states, slots = kept, options.chunks
    if every == 1:  # nothing to run again: one launch for all chunks
        segments = [(0, options.chunks)]
    else:
        states, slots = kept_states(plan, every), every
    for index, (first, stop) in reversed(list(enumerate(segments))):
        span = {"first_chunk": first, "stop_chunk": stop, "kept_first": first, "kept_slots": slots}
        if every > 1:
            running, snapshot = plan.at_segment(kept, index, first * options.chunk)
            yield plan.learn(running, snapshot, states, None, **span, kept_every=1)
        arguments = {
            "kept": states,
            "d_o": d_o,
            "d_tokens": d_tokens,
            "d_running": d_running,
            "d_snapshot": d_snapshot,
            "d_anchor": d_anchor,
            "d_gates": d_gates,
        }
        yield plan.adjoint(arguments, **span)
    if d_gates is not None:
        by_head = d_gates.unflatten(0, (-1, tokens.query.shape[2])).sum(0).unbind(1)
        by_gate = {name: x.to(getattr(tokens, name).dtype, copy=True) for name, x in zip(gates, by_head)}
        d_tokens = d_tokens._replace(**by_gate)
    yield Inputs(d_tokens, d_running, d_snapshot, d_anchor)
