"""``deep_memory``: one two-layer memory per head, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nl_kernels import DeepMemoryWeights, deep_memory

_BASE = {"batch": 1, "tokens": 2048, "heads": 4, "width": 64, "hidden": 64, "chunk": 64, "read": "snapshot"}
_CASES = [{}, {"hidden": 256}, {"chunk": 16}, {"hidden": 256, "chunk": 16}, {"read": "running"}]
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
    q, k = (torch.nn.functional.normalize(normal(batch, tokens, heads, width), dim=-1) for _ in range(2))
    v = normal(batch, tokens, heads, width)
    rate = torch.sigmoid(normal(batch, tokens, heads))
    log_decay = torch.nn.functional.logsigmoid(normal(batch, tokens, heads) + 4)
    weights = DeepMemoryWeights(
        normal(heads, hidden, width) * width**-0.5, normal(heads, width, hidden) * 0.02
    )
    inputs = [x.requires_grad_() for x in (q, k, v, rate, log_decay, *weights)]
    cotangent = normal(batch, tokens, heads, width)

    def eager() -> tuple[torch.Tensor, ...]:
        o, _ = deep_memory(
            *inputs[:5],
            DeepMemoryWeights(*inputs[5:]),
            chunk_size=shape["chunk"],
            read=shape["read"],
            impl="eager",
        )
        return torch.autograd.grad(o, inputs, cotangent)

    return {"eager": eager}
