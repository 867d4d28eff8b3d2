"""The public function of the self-modifying memory."""

from __future__ import annotations

import functools

import torch

from nl_kernels.checks import check_positive_int, check_range
from nl_kernels.dispatch import choose_implementation
from nl_kernels.memory.bank import Op, Request
from nl_kernels.memory.call import run, run_step
from nl_kernels.memory.kernels.call import choose
from nl_kernels.memory_checks import head_parameter
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.self_modifying.checks import check_call
from nl_kernels.ops.self_modifying.reference import self_modifying_memory_reference
from nl_kernels.ops.self_modifying.state import (
    SelfModifyingState,
    SelfModifyingWeights,
    stack_memories,
)

_DEFAULT_RULE = MemoryRule()
_OP = Op(SelfModifyingState, stack_memories, ("query", "key", "value", "gate", "rate", "momentum"))


def self_modifying_memory(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    weights: SelfModifyingWeights,
    *,
    chunk_size: int,
    generator_chunk_size: int | None = None,
    write_scale: torch.Tensor | None = None,
    momentum: torch.Tensor | None = None,
    rule: MemoryRule | None = None,
    rate_max: torch.Tensor | float = 1.0,
    rate_bias: torch.Tensor | float = 0.0,
    retention_bias: torch.Tensor | float = 4.0,
    read: str = "snapshot",
    detach_targets: bool = True,
    truncate_every: int | None = None,
    mask: torch.Tensor | None = None,
    initial_state: SelfModifyingState | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_every: int | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, SelfModifyingState | None]:
    """Five memories per head that make each other's keys, values, rates, retentions and targets.

    With every memory M read at the last boundary of its chunk (arXiv 2512.24695, Eqs. 83-91, 94-96)::

        k = l2norm(M_key(key_input))    v = M_value(value_input)
        α = sigmoid(M_retention(gate_input) + retention_bias)
        η = min(rate_max, 1 + α) · sigmoid(M_rate(gate_input) + rate_bias)
        o = M_memory(l2norm(query))
        every memory learns k → M(v), its self-made target, at rate η with retention α, as in ``deep_memory``

    Gradients of the outer loss flow through the writes and the targets into every input, the weights, the
    gate parameters and the initial state. In the printed formulas all inputs are one x; projections of x work
    better.

    Args:
        query, key_input, value_input, gate_input: [B, T, H, D]; the query is l2-normalised here.
        weights: initial states of the five memories, [H, ..] shared or [B, H, ..] by sequence, which are also
            the anchor of an anchored rule.
        chunk_size: tokens between boundaries of ``weights.memory``.
        generator_chunk_size: the same for the other four; default ``chunk_size``. One of the two must be a
            multiple of the other.
        write_scale: [B, T, H], at least 0, what multiplies the bounded errors that ``weights.memory`` learns
            from: values have one length in the loop of memories, and in what is read the length that they
            are given. Of linear memories. ``None``: 1.
        rate_max: in [0, 2], the largest rate, 0 writes nothing; a float or [H]. Above 1 the erase can turn
            the sign of what a key holds; no rate is above 1 + α, so that its factor α − η is in (-1, 1).
        rate_bias, retention_bias: floats or [H].
        detach_targets: the inner objective takes ``M(v)`` as a constant; otherwise its gradient also flows
            into the memory through its own target, which only the reference does. Either way the outer
            gradient is exact.
        truncate_every: the outer gradient does not cross every n-th boundary of the faster clock, counted
            from the slower clock's last boundary before this call; ``None`` for full backpropagation through
            time.
        momentum, rule, read, mask, initial_state, output_final_state, cu_seqlens, checkpoint_every, impl: as
            in :func:`nl_kernels.deep_memory`.

    Returns:
        o [B, T, H, D] in the dtype of query, and the final state (fp32; fp64 for fp64 inputs) or ``None``.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as :func:`nl_kernels.deep_memory`.
    """
    for name, value in (("truncate_every", truncate_every), ("checkpoint_every", checkpoint_every)):
        if value is not None:
            check_positive_int(name, value)
    tokens = (query, key_input, value_input, gate_input, write_scale, momentum)
    state, clocks = ("initial_state", initial_state), (chunk_size, generator_chunk_size)
    gates = {"rate_max": rate_max, "rate_bias": rate_bias, "retention_bias": retention_bias}
    options = (rule, read, detach_targets, truncate_every)
    call = _checked(
        "self_modifying_memory", impl, tokens, weights, state, clocks, gates, options, mask, cu_seqlens
    )
    check_range("rate_max", head_parameter(rate_max, query), 0.0, 2.0)
    o, final = run(call, cu_seqlens, checkpoint_every)
    return o, final if output_final_state else None


def self_modifying_memory_step(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    weights: SelfModifyingWeights,
    *,
    state: SelfModifyingState,
    chunk_size: int,
    generator_chunk_size: int | None = None,
    write_scale: torch.Tensor | None = None,
    momentum: torch.Tensor | None = None,
    rule: MemoryRule | None = None,
    rate_max: torch.Tensor | float = 1.0,
    rate_bias: torch.Tensor | float = 0.0,
    retention_bias: torch.Tensor | float = 4.0,
    read: str = "snapshot",
    detach_targets: bool = True,
    mask: torch.Tensor | None = None,
    inplace: bool = False,
    impl: str | None = None,
) -> tuple[torch.Tensor, SelfModifyingState]:
    """One token of :func:`self_modifying_memory`, for decoding: the same arguments without the time axis.

    Where gradients are needed this is ``self_modifying_memory`` with T = 1; otherwise one pass over the
    state. The values of rate_max and momentum are not checked.

    Args:
        query, key_input, value_input, gate_input: [B, H, D]. write_scale, momentum: [B, H]. mask: [B] bool.
        state: the state before the token, fp32 (fp64 for fp64 inputs).
        inplace: as in :func:`nl_kernels.deep_memory_step`.

    Returns:
        o [B, H, D] in the dtype of query, and the state after the token.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as :func:`nl_kernels.deep_memory_step`.
    """
    tokens = (query, key_input, value_input, gate_input, write_scale, momentum)
    gates = {"rate_max": rate_max, "rate_bias": rate_bias, "retention_bias": retention_bias}
    clocks, options = (chunk_size, generator_chunk_size), (rule, read, detach_targets, None)
    name = "self_modifying_memory_step"
    call = _checked(name, impl, tokens, weights, ("state", state), clocks, gates, options, mask)
    return run_step(call, inplace)


def _checked(op, impl, tokens, weights, state, clocks, gates, options, mask, cu_seqlens=None) -> Request:
    """A call, or one token of one; ``state`` comes with its name."""
    rule, read, detach, truncate_every = options
    rule = _DEFAULT_RULE if rule is None else rule
    clocks = (clocks[0], clocks[0] if clocks[1] is None else clocks[1])
    check_call(tokens, weights, rule, read, clocks, gates, state, mask, cu_seqlens)
    if detach:
        implementation = choose(op, impl, "query", tokens, weights, state[1], rule, min(clocks))
    elif impl in ("triton", "eager"):
        raise NotImplementedError(
            "detach_targets: the reference alone has targets that learn; use impl='reference' or None"
        )
    else:
        implementation = choose_implementation(op, impl, tokens[0].device, ("reference",))
    kept = {"clocks": clocks, "detach_targets": detach, "truncate_every": truncate_every}
    reference = functools.partial(self_modifying_memory_reference, **kept)
    given = (tokens, gates, weights, state[1], reference)
    return Request(_OP, implementation, *given, rule, read, mask, clocks, truncate_every)
