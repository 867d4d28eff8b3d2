"""The public function of the self-modifying memory."""

from __future__ import annotations

import functools

import torch

from nl_kernels.checks import check_positive_int, check_range
from nl_kernels.dispatch import choose_implementation
from nl_kernels.memory.call import Op, run, run_step
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
        momentum: [B, T, H] in [0, 1), the decay μ of the average U of each memory's writes, or of their sum:
            see ``rule.momentum``. ``None`` for none.
        rule: how the memories are applied and written; default ``MemoryRule()``.
        rate_max: in [0, 2], the largest rate, 0 writes nothing; a float or [H]. Above 1 the erase can turn
            the sign of what a key holds; no rate is above 1 + α, so that its factor α − η is in (-1, 1).
        rate_bias, retention_bias: floats or [H].
        read: "snapshot": o from the state at the chunk's start; "running": from the state after token t.
        detach_targets: the inner objective takes ``M(v)`` as a constant; otherwise its gradient also flows
            into the memory through its own target, which only the reference does. Either way the outer
            gradient is exact.
        truncate_every: the outer gradient does not cross every n-th boundary of the faster clock, counted
            from the slower clock's last boundary before this call; ``None`` for full backpropagation through
            time.
        mask: [B, T] bool, True = real token. Padding neither writes nor counts, and its output is zero.
        initial_state: the state to resume from.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] cumulative lengths of N sequences packed into B = 1; states and own weights
            then have N in place of B. Excludes ``mask``.
        checkpoint_every: chunks between the states kept for the backward pass, which recomputes the rest; the
            default balances the two. It changes memory and time, never results.
        impl: "triton", "eager" or "reference"; ``None`` picks Triton on CUDA where the kernels cover the call
            (the table of memory/kernels/README.md), else eager.

    Returns:
        o [B, T, H, D] in the dtype of query, and the final state (fp32; fp64 for fp64 inputs) or ``None``.

    Raises:
        TypeError, ValueError: an argument of another kind, shape, dtype, device or range.
        NotImplementedError: ``impl="triton"`` for a call that the kernels do not cover.
        RuntimeError: ``impl="triton"`` where it cannot run.
    """
    for name, value in (("truncate_every", truncate_every), ("checkpoint_every", checkpoint_every)):
        if value is not None:
            check_positive_int(name, value)
    call = _checked(
        "self_modifying_memory",
        impl,
        (query, key_input, value_input, gate_input, write_scale, momentum),
        weights,
        ("initial_state", initial_state),
        (chunk_size, generator_chunk_size),
        {"rate_max": rate_max, "rate_bias": rate_bias, "retention_bias": retention_bias},
        rule,
        read,
        detach_targets,
        truncate_every,
        mask,
        cu_seqlens,
    )
    check_range("rate_max", head_parameter(rate_max, query), 0.0, 2.0)
    o, final = run(_OP, **call, cu_seqlens=cu_seqlens, checkpoint_every=checkpoint_every)
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
        TypeError, ValueError, RuntimeError: as :func:`self_modifying_memory`; ``inplace`` where gradients are
            needed.
        NotImplementedError: ``impl="triton"`` for a call that the kernels do not cover.
    """
    call = _checked(
        "self_modifying_memory_step",
        impl,
        (query, key_input, value_input, gate_input, write_scale, momentum),
        weights,
        ("state", state),
        (chunk_size, generator_chunk_size),
        {"rate_max": rate_max, "rate_bias": rate_bias, "retention_bias": retention_bias},
        rule,
        read,
        detach_targets,
        None,
        mask,
    )
    return run_step(_OP, **call, inplace=inplace)


def _checked(
    op, impl, tokens, weights, state, clocks, gates, rule, read, detach, truncate, mask, cu_seqlens=None
) -> dict:
    """What :func:`~nl_kernels.memory.call.run` takes of a call, or of one token; ``state`` is named."""
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
    return {
        "implementation": implementation,
        "tensors": tokens,
        "gates": gates,
        "weights": weights,
        "state": state[1],
        "reference": functools.partial(self_modifying_memory_reference, detach_targets=detach),
        "rule": rule,
        "read": read,
        "chunk_size": clocks[0],
        "generator_chunk_size": clocks[1],
        "truncate_every": truncate,
        "mask": mask,
    }
