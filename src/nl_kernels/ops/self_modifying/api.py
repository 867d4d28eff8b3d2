"""The public function of the self-modifying memory."""

from __future__ import annotations

import functools

import torch

from nl_kernels.checks import check_positive_int, check_range, check_sequences
from nl_kernels.dispatch import choose_implementation
from nl_kernels.memory.call import Op, run, run_step
from nl_kernels.memory.kernels.call import choose
from nl_kernels.memory_checks import check_error_at, check_rule, head_parameter
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.self_modifying.checks import (
    check_clocks,
    check_head_parameter,
    check_inputs,
    check_state,
    check_weights,
)
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
    rule = _DEFAULT_RULE if rule is None else rule
    generator_chunk_size = chunk_size if generator_chunk_size is None else generator_chunk_size
    for name, value in (("truncate_every", truncate_every), ("checkpoint_every", checkpoint_every)):
        if value is not None:
            check_positive_int(name, value)
    tokens = (query, key_input, value_input, gate_input, write_scale, momentum)
    clocks = (chunk_size, generator_chunk_size)
    parameters = {"rate_max": rate_max, "rate_bias": rate_bias, "retention_bias": retention_bias}
    _check(tokens, weights, rule, read, clocks, parameters, "initial_state", initial_state, mask, cu_seqlens)
    check_range("rate_max", head_parameter(rate_max, query), 0.0, 2.0)
    o, final = run(
        _OP,
        _choose("self_modifying_memory", impl, tokens, weights, initial_state, rule, clocks, detach_targets),
        tokens,
        parameters,
        weights,
        initial_state,
        **_options(rule, read, clocks, truncate_every, detach_targets),
        mask=mask,
        cu_seqlens=cu_seqlens,
        checkpoint_every=checkpoint_every,
    )
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
        inplace: write into the state's tensors and return them, so that memory stays where it is; they must
            be contiguous and share no memory, as in :meth:`SelfModifyingState.clone`. Otherwise the state
            stays as it is, and the new one may share tensors that did not change.

    Returns:
        o [B, H, D] in the dtype of query, and the state after the token.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`self_modifying_memory`; ``inplace`` where gradients are
            needed.
        NotImplementedError: ``impl="triton"`` for a call that the kernels do not cover.
    """
    rule = _DEFAULT_RULE if rule is None else rule
    generator_chunk_size = chunk_size if generator_chunk_size is None else generator_chunk_size
    inputs = (query, key_input, value_input, gate_input, write_scale, momentum)
    clocks = (chunk_size, generator_chunk_size)
    parameters = {"rate_max": rate_max, "rate_bias": rate_bias, "retention_bias": retention_bias}
    _check(inputs, weights, rule, read, clocks, parameters, "state", state, mask)
    return run_step(
        _OP,
        _choose("self_modifying_memory_step", impl, inputs, weights, state, rule, clocks, detach_targets),
        inputs,
        parameters,
        weights,
        state,
        **_options(rule, read, clocks, None, detach_targets),
        mask=mask,
        inplace=inplace,
    )


def _options(rule, read, clocks, truncate_every, detach_targets) -> dict:
    options = {
        "rule": rule,
        "read": read,
        "chunk_size": clocks[0],
        "generator_chunk_size": clocks[1],
        "truncate_every": truncate_every,
    }
    reference = functools.partial(self_modifying_memory_reference, detach_targets=detach_targets, **options)
    return {"reference": reference, **options}


def _check(tokens, weights, rule, read, clocks, parameters, state_name, state, mask, cu_seqlens=None) -> None:
    """Check a call on tokens [B, T, ..], or on one token [B, ..]."""
    check_rule(rule, read)
    check_clocks(*clocks)
    query, one = tokens[0], state_name == "state"
    check_inputs(tokens, one)
    batch = check_sequences(mask, cu_seqlens, query, one=one)
    heads, width = query.shape[-2:]
    check_weights(weights, batch, heads, width, query)
    check_error_at(rule, weights.key)
    if tokens[4] is not None and weights.key.outer is not None:
        raise ValueError("write_scale: of linear memories alone, got memories of two layers")
    if one or state is not None:
        momentum = tokens[-1] is not None
        check_state(state_name, state, weights, batch, (heads, width), momentum, max(clocks), query)
    for name, value in parameters.items():
        check_head_parameter(name, value, heads, query)


def _choose(op, impl, tokens, weights, state, rule, clocks, detach_targets) -> str:
    """The implementation of a call."""
    if not detach_targets:
        if impl in ("triton", "eager"):
            raise NotImplementedError(
                "detach_targets: the reference alone has targets that learn; use impl='reference' or None"
            )
        return choose_implementation(op, impl, tokens[0].device, ("reference",))
    return choose(op, impl, "query", tokens, weights, state, rule, min(clocks))
