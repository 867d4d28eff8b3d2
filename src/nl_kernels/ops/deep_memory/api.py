"""The public function of the deep memory."""

from __future__ import annotations

import torch

from nl_kernels.checks import (
    check_choice,
    check_positive_int,
    check_tensor,
    has_readable_data,
)
from nl_kernels.dispatch import choose_implementation, kernels_run_on, needs_gradient, without_autocast
from nl_kernels.memory.call import learn_tokens
from nl_kernels.memory.kernels.call import unsupported
from nl_kernels.memory.state import (
    beginning,
    cast,
    check_state,
    map_tensors,
    named_tensors,
    overwritten,
    weights_in,
)
from nl_kernels.memory_checks import (
    by_sequence,
    check_gates,
    check_mask,
    check_memory,
    check_own_memory,
    check_position,
    check_rule,
    check_sequences,
    check_step_dtype,
    check_tokens,
    one_token,
    per_sequence,
    state_dtype,
)
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.deep_memory import eager_step
from nl_kernels.ops.deep_memory.reference import deep_memory_reference
from nl_kernels.ops.deep_memory.state import DeepMemoryState, bank_of, weights_of
from nl_kernels.triton_support.targets import architecture_of
from nl_kernels.zero_gradients import with_zero_gradients

READS = ("snapshot", "running")
_DEFAULT_RULE = MemoryRule()


def deep_memory(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    weights: DeepMemoryWeights,
    *,
    chunk_size: int,
    momentum: torch.Tensor | None = None,
    rule: MemoryRule | None = None,
    read: str = "snapshot",
    mask: torch.Tensor | None = None,
    initial_state: DeepMemoryState | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_every: int | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, DeepMemoryState | None]:
    """One network per head that learns ``k → v`` by delta gradient descent, and is read with ``q``.

    Each token takes one step on ``½‖M(k) − v‖²`` with the gradient at the chunk's first state, and each layer
    erases along its own input (arXiv 2512.24695, Eqs. 57, 88, 90; the neural memory of 2501.00663). Gradients
    flow through the writes into every input, the weights and the initial state. Chunk size is part of the
    model: run a state at the chunk size it was made with.

    Args:
        q, k: [B, T, H, D]. The default rule wants keys of unit norm.
        v: [B, T, H, Dv] targets; Dv = D when ``rule.residual``.
        rate: [B, T, H] >= 0, the learning rate η (with unit keys, stable below 1 + α). Above 1 an erase turns
            the sign of what a key holds.
        log_decay: [B, T, H] <= 0, the log of the retention α; −inf forgets everything.
        weights: the initial state, which is also the anchor of an anchored rule: inner [H, h, D] and outer
            [H, Dv, h], or [B, H, ..] by sequence; outer ``None`` for a linear memory (inner [.., Dv, D]).
            Unused values of a rule that is not anchored when ``initial_state`` is given.
        chunk_size: tokens between boundaries.
        momentum: [B, T, H] in [0, 1), the decay μ of the writes' average U, or of their sum: see
            ``rule.momentum``. ``None`` for no momentum.
        rule: how the memory is applied and written; default ``MemoryRule()``.
        read: "snapshot": ``o_t = M(q_t)`` at the chunk's first state; "running": after token t.
        mask: [B, T] bool, True = real token. Padding neither writes nor counts, and its output is zero.
        initial_state: the state to resume from.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] cumulative lengths of N sequences packed into B = 1; states and own weights
            then have N in place of B. Excludes ``mask``.
        checkpoint_every: chunks between the states kept for the backward pass, which recomputes the rest; the
            default balances the two. It changes memory and time, never results.
        impl: "triton", "eager" or "reference"; ``None`` picks by device: the kernels on CUDA, for calls that
            they serve (see the op's README), else eager.

    Returns:
        o [B, T, H, Dv] in the dtype of q, and the final state (fp32; fp64 for fp64 inputs) or ``None``.

    Raises:
        TypeError, ValueError: an argument of another kind, shape, dtype, device or range.
        NotImplementedError: ``impl="triton"`` for a call that the kernels do not serve.
        RuntimeError: ``impl="triton"`` where it cannot run.
    """
    rule = _DEFAULT_RULE if rule is None else rule
    batch, length = _check(
        q, k, v, rate, log_decay, momentum, weights, rule, read, chunk_size, mask, cu_seqlens
    )
    if checkpoint_every is not None:
        check_positive_int("checkpoint_every", checkpoint_every)
    out_width = v.shape[-1]
    if initial_state is not None:
        _check_state("initial_state", initial_state, weights, batch, q.shape[2], momentum is not None, q)
        check_position("initial_state.position", initial_state.position, batch, chunk_size, q)
    operands = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    unserved = None
    if impl == "triton" or (impl is None and kernels_run_on(q.device)):
        unserved = _unserved(q, v, weights, rule, chunk_size, momentum, operands)
    available = ("eager", "reference") if unserved and impl is None else ("triton", "eager", "reference")
    chosen = choose_implementation("deep_memory", impl, q.device, available)
    if chosen == "triton" and unserved:
        raise NotImplementedError(f"{unserved}; use impl='eager'")

    dtype = state_dtype(q, k, v, rate, log_decay, momentum, *weights, *weights_in(initial_state))
    inputs = [q, k, v, rate, log_decay, momentum]
    if chosen != "triton":  # the kernels take 16-bit tokens as they are
        inputs = [None if x is None else x.to(dtype) for x in inputs]
    tied = weights if initial_state is not None and not rule.anchored else ()
    if chosen == "reference":  # its loop leaves out what the last tokens would write
        tied = [*inputs[1:], *weights]
    inputs[0] = with_zero_gradients(inputs[0], tied)
    inputs, mask, alignment = by_sequence(inputs, mask, cu_seqlens)

    initial = map_tensors(lambda w: per_sequence(w, batch, dtype), weights)
    anchor = initial if rule.anchored else map_tensors(torch.zeros_like, initial)
    if initial_state is None:
        state = beginning(DeepMemoryState, initial, rule.anchored, batch, momentum is not None)
    else:
        state = cast(initial_state, dtype)

    # Autocast would round the products, and with them the state, to half precision.
    with without_autocast(q.device.type):
        if chosen == "reference":
            o, final = deep_memory_reference(
                *inputs, anchor, state, rule=rule, read=read, chunk_size=chunk_size, mask=mask
            )
        else:
            o, final = learn_tokens(
                chosen,
                (*inputs[:3], None, *inputs[3:5], (None,) * 3),
                inputs[5],
                state,
                anchor if rule.anchored else None,
                (bank_of, weights_of),
                rule=rule,
                read=read,
                chunk_size=chunk_size,
                generator_chunk_size=chunk_size,
                truncate_every=None,
                mask=mask,
                at_boundary=initial_state is None,
                checkpoint_every=checkpoint_every,
                dtype=operands,
            )
    if alignment is not None:
        o = alignment.scatter(o, 1, length)
    return o.reshape(q.shape[0], length, q.shape[2], out_width).to(
        q.dtype
    ), final if output_final_state else None


def deep_memory_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rate: torch.Tensor,
    log_decay: torch.Tensor,
    weights: DeepMemoryWeights,
    *,
    state: DeepMemoryState,
    chunk_size: int,
    momentum: torch.Tensor | None = None,
    rule: MemoryRule | None = None,
    read: str = "snapshot",
    mask: torch.Tensor | None = None,
    inplace: bool = False,
    impl: str | None = None,
) -> tuple[torch.Tensor, DeepMemoryState]:
    """One token of :func:`deep_memory`, for decoding: the same arguments without the time axis.

    Where gradients are needed this is ``deep_memory`` with T = 1; otherwise one pass over the state. The
    values of rate, log decay and momentum are not checked.

    Args:
        q, k: [B, H, D]. v: [B, H, Dv]. rate, log_decay, momentum: [B, H]. mask: [B] bool.
        state: the state before the token, fp32 (fp64 for fp64 inputs).
        inplace: write into the state's tensors and return them, so that memory stays where it is; they must
            be contiguous and share no memory, as in :meth:`DeepMemoryState.clone`. Otherwise the state stays
            as it is, and the new one may share tensors that did not change.

    Returns:
        o [B, H, Dv] in the dtype of q, and the state after the token.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`deep_memory`; ``inplace`` where gradients are needed.
        NotImplementedError: ``impl="triton"`` for a call that the kernels do not serve.
    """
    rule = _DEFAULT_RULE if rule is None else rule
    _check_step(q, k, v, rate, log_decay, momentum, weights, rule, read, chunk_size, mask, state)
    if inplace:
        check_own_memory(named_tensors("state", state), named_tensors("weights", weights))
    tensors = (q, k, v, rate, log_decay, momentum)
    leaves = [*weights, *weights_in(state)]
    unserved = None
    if impl == "triton" or (impl is None and kernels_run_on(q.device)):
        unserved = _unserved(q, v, weights, rule, chunk_size, momentum, q.dtype)
    available = ("eager", "reference") if unserved and impl is None else ("triton", "eager", "reference")
    chosen = choose_implementation("deep_memory_step", impl, q.device, available)
    if chosen == "triton" and unserved:
        raise NotImplementedError(f"{unserved}; use impl='eager'")
    differentiable = chosen == "reference" or needs_gradient(*tensors, *leaves)
    if differentiable or chosen == "triton":
        if inplace and differentiable:
            raise ValueError("inplace: not where gradients are needed, nor with impl='reference'")
        (*tokens, momentum), mask = one_token(tensors, mask)
        o, after = deep_memory(
            *tokens,
            weights,
            chunk_size=chunk_size,
            momentum=momentum,
            rule=rule,
            read=read,
            mask=mask,
            initial_state=state,
            output_final_state=True,
            impl=impl,
        )
        return o.squeeze(1), overwritten(state, after) if inplace else after
    check_step_dtype(state.running.inner, *tensors, *leaves)
    if mask is not None and mask.device.type == "cpu" and has_readable_data(mask) and bool(mask.all()):
        mask = None
    options = {"rule": rule, "read": read, "chunk_size": chunk_size, "mask": mask, "inplace": inplace}
    with without_autocast(q.device.type):
        o, state = eager_step.deep_memory_step(*tensors, weights, state, **options)
    return o.to(q.dtype), state


def _unserved(q, v, weights, rule, chunk_size, momentum, dtype) -> str | None:
    """Why the kernels do not take a call, or ``None``."""
    return unsupported(
        "q, k, v",
        rule=rule,
        dtype=dtype,
        width=max(q.shape[-1], v.shape[-1]),
        hidden=None if weights.outer is None else weights.inner.shape[-2],
        chunk=chunk_size,
        momentum=momentum is not None,
        self_made=False,
        architecture=architecture_of(q.device),
    )


def _check(q, k, v, rate, log_decay, momentum, weights, rule, read, chunk_size, mask, cu_seqlens):
    """Check everything but the state; the number of sequences and the number of tokens of each row."""
    check_tokens("q", q, "[B, T, H, D]")
    rows, length, heads, width = q.shape
    check_tensor("k", k, q.shape, like=q)
    out = v.shape[-1] if isinstance(v, torch.Tensor) and v.ndim == 4 else width
    check_tensor("v", v, (rows, length, heads, out), like=q)
    check_tensor("rate", rate, (rows, length, heads), like=q)
    check_tensor("log_decay", log_decay, (rows, length, heads), like=q)
    if momentum is not None:
        check_tensor("momentum", momentum, (rows, length, heads), like=q)
    check_gates(rate, log_decay, momentum)
    check_rule(rule)
    if rule.residual and out != width:
        raise ValueError(f"v: a rule with a residual needs width {width} as the keys, got {out}")
    check_choice("read", read, READS)
    check_positive_int("chunk_size", chunk_size)
    batch = check_sequences(mask, cu_seqlens, q)
    check_memory("weights", weights, batch, heads, width, out, q)
    return batch, length


def _check_state(name, state, weights, batch, heads, has_momentum, like) -> None:
    shapes = DeepMemoryWeights(*(None if w is None else (batch, heads, *w.shape[-2:]) for w in weights))
    check_state(name, state, DeepMemoryState, shapes, has_momentum, like)


def _check_step(q, k, v, rate, log_decay, momentum, weights, rule, read, chunk_size, mask, state) -> None:
    check_tokens("q", q, "[B, H, D]")
    batch, heads, width = q.shape
    out = v.shape[-1] if isinstance(v, torch.Tensor) and v.ndim == 3 else width
    check_tensor("k", k, q.shape, like=q)
    check_tensor("v", v, (batch, heads, out), like=q)
    for name, x in (("rate", rate), ("log_decay", log_decay), ("momentum", momentum)):
        if x is not None or name != "momentum":
            check_tensor(name, x, (batch, heads), like=q)
    check_rule(rule)
    if rule.residual and out != width:
        raise ValueError(f"v: a rule with a residual needs width {width} as the keys, got {out}")
    check_choice("read", read, READS)
    check_positive_int("chunk_size", chunk_size)
    if mask is not None:
        check_mask(mask, (batch,), q)
    check_memory("weights", weights, batch, heads, width, out, q)
    _check_state("state", state, weights, batch, heads, momentum is not None, q)
    check_position("state.position", state.position, batch, chunk_size, q)
