"""Continuum memory against the plain MLP of the same total width: what learning in context costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nl_models.layers.continuum import ContinuumMemory, LevelConfig

SHAPES: dict[str, list[dict]] = {
    "cpu": [
        {"batch": 1, "tokens": 512, "width": 256, "chunks": (64, 256, 1024)},
        {"batch": 1, "tokens": 2048, "width": 256, "chunks": (64, 256, 1024)},
    ],
    "cuda": [
        {"batch": 8, "tokens": 4096, "width": 1024, "chunks": (64, 256, 1024)},
        {"batch": 1, "tokens": 32768, "width": 1024, "chunks": (512, 2048, 8192)},
    ],
}


class PlainBlock(nn.Module):
    """``x + down(GELU(up(n(x))))``, 4 times as wide inside."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def providers(shape: dict, device: str, dtype: torch.dtype) -> dict[str, Callable[[], tuple]]:
    """Closures that run forward and backward once and return (y, gradient of x)."""
    width, chunks = shape["width"], shape["chunks"]
    x = torch.randn(shape["batch"], shape["tokens"], width, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    hidden = 4 * width // len(chunks)

    def levels(rule: str, **options) -> list[LevelConfig]:
        return [LevelConfig(hidden_size=hidden, chunk_size=c, rule=rule, **options) for c in chunks]

    modules = {
        "plain MLP": PlainBlock(width, 4 * width),
        "plain MLPs, one per level": nn.Sequential(*(PlainBlock(width, hidden) for _ in chunks)),
        "eager, never stepping": ContinuumMemory(width, levels("dgd", max_rate=0.0)),
        "eager, dgd": ContinuumMemory(width, levels("dgd")),
        "eager, sgd": ContinuumMemory(width, levels("sgd")),
        "eager, dgd, checkpointed": ContinuumMemory(width, levels("dgd"), checkpoint_every=1),
    }

    def closure(module: nn.Module) -> Callable[[], tuple]:
        module.to(device=device, dtype=dtype)
        parameters = list(module.parameters())

        def run() -> tuple:
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            return y.detach(), torch.autograd.grad(y, [x, *parameters], grad)[0]

        return run

    return {name: closure(module) for name, module in modules.items()}
