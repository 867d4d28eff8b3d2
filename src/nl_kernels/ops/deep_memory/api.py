"""The public function of the deep memory."""

from __future__ import annotations

import functools
import math

import torch

from nl_kernels.checks import (
    check_positive_int,
    check_range,
    check_sequences,
    check_tensor,
    check_tokens,
)
from nl_kernels.memory.bank import Op, Request
from nl_kernels.memory.call import run, run_step
from nl_kernels.memory.kernels.call import choose
from nl_kernels.memory.state import check_state
from nl_kernels.memory_checks import check_memory, check_rule
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.deep_memory.reference import deep_memory_reference
from nl_kernels.ops.deep_memory.state import DeepMemoryState

_DEFAULT_RULE = MemoryRule()
_OP = Op(DeepMemoryState, lambda weights: weights, ("query", "key", "value", "rate", "log_decay", "momentum"))


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
    if checkpoint_every is not None:
        check_positive_int("checkpoint_every", checkpoint_every)
    tokens = (q, k, v, rate, log_decay, momentum)
    state = ("initial_state", initial_state)
    call = _checked("deep_memory", impl, tokens, weights, state, chunk_size, rule, read, mask, cu_seqlens)
    o, final = run(call, cu_seqlens, checkpoint_every)
    return o, final if output_final_state else None


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
    tokens = (q, k, v, rate, log_decay, momentum)
    call = _checked("deep_memory_step", impl, tokens, weights, ("state", state), chunk_size, rule, read, mask)
    return run_step(call, inplace)


def _checked(op, impl, tokens, weights, state, chunk_size, rule, read, mask, cu_seqlens=None) -> Request:
    """A call on tokens [B, T, ..], or on one token [B, ..].

    ``state``: its name in messages, and itself.
    """
    rule = _DEFAULT_RULE if rule is None else rule
    q, k, v, rate, log_decay, momentum = tokens
    one = state[0] == "state"
    check_tokens("q", q, "[B, H, D]" if one else "[B, T, H, D]")
    *lead, width = q.shape
    check_tensor("k", k, q.shape, like=q)
    out = v.shape[-1] if isinstance(v, torch.Tensor) and v.ndim == q.ndim else width
    check_tensor("v", v, (*lead, out), like=q)
    numbers = (("rate", rate, 0.0, math.inf), ("log_decay", log_decay, -math.inf, 0.0))
    for name, x, low, high in (*numbers, ("momentum", momentum, 0.0, 1.0)):
        if x is not None or name != "momentum":
            check_tensor(name, x, lead, like=q)
            if not one:
                check_range(name, x, low, high, closed_high=name == "log_decay")
    check_positive_int("chunk_size", chunk_size)
    batch = check_sequences(mask, cu_seqlens, q, one=one)
    heads = lead[-1]
    check_memory("weights", weights, batch, heads, width, out, q)
    check_rule(rule, read, weights)
    if rule.residual and out != width:
        raise ValueError(f"v: a rule with a residual needs width {width} as the keys, got {out}")
    if one or state[1] is not None:
        shapes = DeepMemoryWeights(*(None if w is None else (batch, heads, *w.shape[-2:]) for w in weights))
        check_state(*state, DeepMemoryState, shapes, momentum is not None, chunk_size, q)
    implementation = choose(op, impl, "q, k, v", tokens, weights, state[1], rule, chunk_size)
    reference = functools.partial(deep_memory_reference, chunk_size=chunk_size)
    given, clocks = (tokens, {}, weights, state[1], reference), (chunk_size, chunk_size)
    return Request(_OP, implementation, *given, rule, read, mask, clocks)
