"""Softmax attention, the method to beat; and how forward, backward and decoding are run for all ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Factories, Provider
from benchmarks.measure import Work, random_tensors

PAST = 100_000
PREFILL = 2_000
DECODED = 64  # tokens decoded before the one that is timed: the state then lies as decoding leaves it


def forward_backward(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], cotangent: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A run that returns the output and the gradients of ``leaves``; nothing accumulates from run to run."""

    def run() -> tuple[Tensor, ...]:
        out = forward()
        return out.detach(), *torch.autograd.grad(out, leaves, cotangent)

    return run


def causal_attention(case: Case, device: torch.device) -> Provider:
    """Forward and backward of PyTorch's fused causal attention, in its own layout, without projections."""
    sizes = case.shape
    shape = (sizes["B"], sizes["H"], sizes["T"], sizes["D"])
    made = random_tensors(0, dict.fromkeys(("q", "k", "v", "cotangent"), shape), device, case.dtype)
    q, k, v, cotangent = made.values()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    # Half of the T² scores; two products forward, five backward.
    flops = 7 * sizes["B"] * sizes["H"] * sizes["T"] ** 2 * sizes["D"]
    work = Work(flops, 11 * q.numel() * q.element_size())
    return Provider(forward_backward(forward, leaves, cotangent), role="baseline", work=work)


def attention_decode(case: Case, device: torch.device, past: int) -> Provider:
    """One token of softmax attention over a cache of ``past`` tokens."""
    sizes = case.shape
    token = (sizes["B"], sizes["H"], 1, sizes["D"])
    cache = (sizes["B"], sizes["H"], past, sizes["D"])
    made = random_tensors(0, {"q": token, "k": cache, "v": cache}, device, case.dtype)
    state = 2 * made["k"].numel() * made["k"].element_size()

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (F.scaled_dot_product_attention(made["q"], made["k"], made["v"]),)

    return Provider(
        run, role="baseline", headline=past > 1, state_bytes=state, work=Work(2 * state / 4, state)
    )


def stream_of(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A layer's input ``[B, T, H·D]`` and the cotangent of its output."""
    shape = (case.shape["B"], case.shape["T"], case.shape["H"] * case.shape["D"])
    made = random_tensors(0, {"x": shape, "cotangent": shape}, device, dtype)
    return made["x"].requires_grad_(), made["cotangent"]


def decode_case(
    op: str, name: str, random_layer: Callable[[Case, torch.device, torch.dtype], Callable], **shape: int
) -> Case:
    """One token of one sequence through a layer of ours, after 1 token and after 100,000.

    Args:
        random_layer: makes ``(x [B, T, d], state, keep=True) -> (y, state)`` for a case; state None at first.
    """

    def providers(case: Case, device: torch.device) -> Factories:
        def ours(past: int) -> Provider:
            layer = random_layer(case, device, case.dtype)
            x, _ = stream_of(case.with_tokens(PREFILL), device, case.dtype)
            return decode_provider(
                lambda state: layer(x[:, :1], state, keep=True),
                lambda state, tokens: layer(x[:, :tokens], state, keep=True)[1],
                past,
            )

        return {decode_name("nl_kernels", past): lambda past=past: ours(past) for past in (1, PAST)}

    return Case(op=op, name=name, mode="step", shape={"B": 1, "T": 1, **shape}, providers=providers)


def decode_name(method: str, past: int) -> str:
    """``nl_kernels after 100,000 tokens``."""
    return f"{method} after {past:,} token{'s' * (past > 1)}"


def decode_provider(
    step: Callable[[object], tuple[Tensor, object]],
    prefill: Callable[[object | None, int], object],
    past: int,
) -> Provider:
    """A step of ours from the state that ``past`` tokens leave.

    Args:
        step: ``state -> (output, next state)`` for one token.
        prefill: ``(state, tokens) -> state`` reads that many more tokens; state None at first.
        past: tokens before the one that is timed.
    """
    with torch.no_grad():
        state, left = None, past
        while left:
            state = prefill(state, min(left, PREFILL))
            left -= min(left, PREFILL)
        for _ in range(DECODED):
            state = step(state)[1]

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (step(state)[0],)

    role = "ours" if past > 1 else "variant"
    return Provider(run, role=role, headline=False, state_bytes=state_bytes(state))


def state_bytes(state: object) -> int:
    """Bytes of all tensors in nested tuples."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, tuple):
        return sum(state_bytes(part) for part in state)
    return 0
