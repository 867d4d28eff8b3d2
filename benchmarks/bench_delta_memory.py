"""Delta memory against causal softmax attention of the same shape, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from nl_kernels import delta_memory
from nl_kernels.testing import delta_memory_inputs

SHAPES = {
    "cpu": [{"batch": 1, "length": length, "heads": 4, "width": 64} for length in (512, 2048, 8192)],
    "cuda": [{"batch": 4, "length": length, "heads": 16, "width": 128} for length in (2048, 8192, 32768)],
}


def providers(
    shape: dict, device: str, dtype: torch.dtype
) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """Closures that run forward and backward once on the same random inputs and return all gradients."""
    batch, length, heads, width = (shape[name] for name in ("batch", "length", "heads", "width"))
    inputs = delta_memory_inputs(batch, length, heads, width, dtype=dtype, device=device, requires_grad=True)
    leaves = tuple(x for x in inputs.values() if x is not None)
    cotangent = torch.randn_like(inputs["v"])

    def ours(impl: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        def run():
            o, _ = delta_memory(**inputs, impl=impl)
            return torch.autograd.grad(o, leaves, cotangent)

        return run

    # Attention's own layout is prepared outside of the timing.
    qkv = tuple(inputs[name].detach().transpose(1, 2).contiguous().requires_grad_() for name in "qkv")
    attention_cotangent = cotangent.transpose(1, 2).contiguous()

    def attention():
        o = F.scaled_dot_product_attention(*qkv, is_causal=True)
        return torch.autograd.grad(o, qkv, attention_cotangent)

    return {"eager": ours("eager"), "causal_attention": attention}
