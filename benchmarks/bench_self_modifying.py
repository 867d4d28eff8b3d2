"""``self_modifying_memory``: five memories per head, gradients through the writes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nl_kernels import DeepMemoryWeights, SelfModifyingWeights, self_modifying_memory

_BASE = {"batch": 1, "tokens": 2048, "heads": 4, "width": 64, "hidden": 64, "chunk": 16, "read": "snapshot"}
_CASES = [{}, {"read": "running"}, {"chunk": 8}, {"chunk": 64}]
SHAPES: dict[str, list[dict]] = {
    "cpu": [{**_BASE, **case} for case in _CASES],
    "cuda": [{**_BASE, "batch": 8, "tokens": 4096, "heads": 16, **case} for case in _CASES],
}


def providers(shape: dict, device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Closures that run forward and backward on the same random inputs and return the gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=generator)

    batch, tokens, heads, width, hidden = (shape[n] for n in ("batch", "tokens", "heads", "width", "hidden"))
    inputs = [normal(batch, tokens, heads, width).requires_grad_() for _ in range(4)]
    weights = SelfModifyingWeights(
        *(
            DeepMemoryWeights(
                (normal(heads, hidden, width) * width**-0.5).requires_grad_(),
                (normal(heads, out, hidden) * 0.02).requires_grad_(),
            )
            for out in (width, width, width, 1, 1)
        )
    )
    leaves = [*inputs, *(layer for memory in weights for layer in memory)]
    cotangent = normal(batch, tokens, heads, width)

    def eager() -> tuple[torch.Tensor, ...]:
        o, _ = self_modifying_memory(
            *inputs, weights, chunk_size=shape["chunk"], read=shape["read"], impl="eager"
        )
        return torch.autograd.grad(o, leaves, cotangent)

    return {"eager": eager}
