"""The public function of the self-modifying memory."""

from __future__ import annotations

import torch

from nl_kernels.checks import (
    check_choice,
    check_positive_int,
    check_range,
    has_readable_data,
)
from nl_kernels.dispatch import choose_implementation, kernels_run_on, needs_gradient, without_autocast
from nl_kernels.memory.call import learn_tokens
from nl_kernels.memory.kernels.call import unsupported
from nl_kernels.memory.state import (
    beginning,
    cast,
    map_tensors,
    named_tensors,
    overwritten,
    weights_in,
)
from nl_kernels.memory_checks import (
    by_sequence,
    check_own_memory,
    check_position,
    check_rule,
    check_step_dtype,
    one_token,
    per_sequence,
    state_dtype,
)
from nl_kernels.memory_rule import MemoryRule
from nl_kernels.ops.self_modifying import eager_step
from nl_kernels.ops.self_modifying.checks import (
    check_clocks,
    check_head_parameter,
    check_inputs,
    check_state,
    check_token,
    check_weights,
    head_parameter,
)
from nl_kernels.ops.self_modifying.reference import self_modifying_memory_reference
from nl_kernels.ops.self_modifying.state import (
    SelfModifyingState,
    SelfModifyingWeights,
    bank_of,
    stack_memories,
    stack_of,
)
from nl_kernels.triton_support.targets import architecture_of
from nl_kernels.zero_gradients import with_zero_gradients

READS = ("snapshot", "running")
_DEFAULT_RULE = MemoryRule()


def self_modifying_memory(
    query: torch.Tensor,
    key_input: torch.Tensor,
    value_input: torch.Tensor,
    gate_input: torch.Tensor,
    weights: SelfModifyingWeights,
    *,
    chunk_size: int,
    generator_chunk_size: int | None = None,
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
            the anchor of an anchored rule. They must not be zero for a linear memory to learn anything.
        chunk_size: tokens between boundaries of ``weights.memory``.
        generator_chunk_size: the same for the other four; default ``chunk_size``. One of the two must be a
            multiple of the other.
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
    check_rule(rule)
    check_choice("read", read, READS)
    check_clocks(chunk_size, generator_chunk_size)
    for name, value in (("truncate_every", truncate_every), ("checkpoint_every", checkpoint_every)):
        if value is not None:
            check_positive_int(name, value)
    batch, length = check_inputs(query, key_input, value_input, gate_input, momentum, mask, cu_seqlens)
    heads, width = query.shape[2:]
    check_weights(weights, batch, heads, width, query)
    if initial_state is not None:
        period = max(chunk_size, generator_chunk_size)
        check_state(
            "initial_state", initial_state, weights, batch, (heads, width), momentum is not None, query
        )
        check_position("initial_state.position", initial_state.position, batch, period, query)
    gates = [
        head_parameter(name, value, heads, query)
        for name, value in (
            ("rate_max", rate_max),
            ("rate_bias", rate_bias),
            ("retention_bias", retention_bias),
        )
    ]
    if query.device.type == "cpu":
        check_range("rate_max", gates[0], 0.0, 2.0)
    tensors = [query, key_input, value_input, gate_input, momentum]
    flat_weights = [layer for memory in weights for layer in memory]
    dtype = state_dtype(*tensors, *flat_weights, *weights_in(initial_state))
    unserved = None
    if impl == "triton" or (impl is None and kernels_run_on(query.device)):
        unserved = _unserved(query, weights, rule, min(chunk_size, generator_chunk_size), momentum, dtype)
    available = ("eager", "reference") if unserved else ("triton", "eager", "reference")
    if not detach_targets:
        available = _alone_in_the_reference(impl)
    elif impl == "triton" and unserved:
        raise NotImplementedError(f"{unserved}; use impl='eager'")
    chosen = choose_implementation("self_modifying_memory", impl, query.device, available)

    # The kernels take 16-bit tokens as they are.
    inputs = [None if x is None else x if chosen == "triton" else x.to(dtype) for x in tensors]
    gates = [x.to(dtype) for x in gates]
    tied = flat_weights if initial_state is not None and not rule.anchored else ()
    if chosen == "reference":  # its loop leaves out what the last tokens would write
        tied = [*inputs[1:], *gates, *flat_weights]
    inputs[0] = with_zero_gradients(inputs[0], tied)
    inputs, mask, alignment = by_sequence(inputs, mask, cu_seqlens)

    initial = stack_memories(map_tensors(lambda w: per_sequence(w, batch, dtype), weights))
    anchor = initial if rule.anchored else map_tensors(torch.zeros_like, initial)
    if initial_state is None:
        state = beginning(SelfModifyingState, initial, rule.anchored, batch, momentum is not None)
    else:
        state = cast(initial_state, dtype)

    options = {
        "rule": rule,
        "read": read,
        "chunk_size": chunk_size,
        "generator_chunk_size": generator_chunk_size,
        "truncate_every": truncate_every,
        "mask": mask,
    }
    # Autocast would round the products, and with them the state, to half precision.
    with without_autocast(query.device.type):
        if chosen == "reference":
            o, final = self_modifying_memory_reference(
                *inputs,
                anchor,
                state,
                rate_max=gates[0],
                rate_bias=gates[1],
                retention_bias=gates[2],
                detach_targets=detach_targets,
                **options,
            )
        else:
            o, final = learn_tokens(
                chosen,
                (*inputs[:4], None, None, gates),
                inputs[4],
                state,
                anchor if rule.anchored else None,
                (bank_of, stack_of),
                at_boundary=initial_state is None,
                checkpoint_every=checkpoint_every,
                dtype=query.dtype,
                **options,
            )
    if alignment is not None:
        o = alignment.scatter(o, 1, length)
    return o.to(query.dtype), final if output_final_state else None


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
        query, key_input, value_input, gate_input: [B, H, D]. momentum: [B, H]. mask: [B] bool.
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
    check_rule(rule)
    check_choice("read", read, READS)
    check_clocks(chunk_size, generator_chunk_size)
    inputs = (query, key_input, value_input, gate_input, momentum)
    check_token(*inputs, mask)
    batch, heads, width = query.shape
    check_weights(weights, batch, heads, width, query)
    check_state("state", state, weights, batch, (heads, width), momentum is not None, query)
    period = max(chunk_size, generator_chunk_size)
    check_position("state.position", state.position, batch, period, query)
    options = {"rate_max": rate_max, "rate_bias": rate_bias, "retention_bias": retention_bias}
    for name, value in options.items():
        check_head_parameter(name, value, heads, query)
    if inplace:
        check_own_memory(named_tensors("state", state), named_tensors("weights", weights))
    options |= {
        "rule": rule,
        "read": read,
        "chunk_size": chunk_size,
        "generator_chunk_size": generator_chunk_size,
    }
    leaves = [*(layer for memory in weights for layer in memory), *weights_in(state)]
    parameters = (x for x in (rate_max, rate_bias, retention_bias) if isinstance(x, torch.Tensor))
    unserved = None
    if impl == "triton" or (impl is None and kernels_run_on(query.device)):
        chunk = min(chunk_size, generator_chunk_size)
        unserved = _unserved(query, weights, rule, chunk, momentum, query.dtype)
    available = ("eager", "reference") if unserved and impl is None else ("triton", "eager", "reference")
    if not detach_targets:
        available = _alone_in_the_reference(impl)
    chosen = choose_implementation("self_modifying_memory_step", impl, query.device, available)
    if chosen == "triton" and unserved:
        raise NotImplementedError(f"{unserved}; use impl='eager'")
    differentiable = chosen == "reference" or needs_gradient(*inputs, *leaves, *parameters)
    if differentiable or chosen == "triton":
        if inplace and differentiable:
            raise ValueError("inplace: not where gradients are needed, nor with impl='reference'")
        (*tokens, momentum), mask = one_token(inputs, mask)
        o, after = self_modifying_memory(
            *tokens,
            weights,
            momentum=momentum,
            mask=mask,
            initial_state=state,
            output_final_state=True,
            detach_targets=detach_targets,
            impl=impl,
            **options,
        )
        return o.squeeze(1), overwritten(state, after) if inplace else after
    check_step_dtype(state.running.last, *inputs, *leaves)
    if mask is not None and mask.device.type == "cpu" and has_readable_data(mask) and bool(mask.all()):
        mask = None
    with without_autocast(query.device.type):
        o, state = eager_step.self_modifying_memory_step(
            *inputs, weights, state, **options, mask=mask, inplace=inplace
        )
    return o.to(query.dtype), state


def _alone_in_the_reference(impl: str | None) -> tuple[str, ...]:
    """The implementations of targets that learn; an error for others."""
    if impl in ("triton", "eager"):
        raise NotImplementedError(
            "detach_targets: the reference alone has targets that learn; use impl='reference' or None"
        )
    return ("reference",)


def _unserved(query, weights, rule, chunk, momentum, dtype) -> str | None:
    """Why the kernels do not take a call, or ``None``."""
    return unsupported(
        "query",
        rule=rule,
        dtype=dtype,
        width=query.shape[-1],
        hidden=None if weights.key.outer is None else weights.key.inner.shape[-2],
        chunk=chunk,
        momentum=momentum is not None,
        self_made=True,
        architecture=architecture_of(query.device),
    )
