"""Continuum memory against plain MLP blocks of the same width: what learning in the context costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.harness import Case, Factories, Provider
from benchmarks.measure import Work
from nl_models.layers.continuum import ContinuumMemory, LevelConfig

CHUNKS = (64, 256, 1024)


class PlainBlock(nn.Module):
    """``x + down(GELU(up(n(x))))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def hidden_size(shape: Mapping[str, int]) -> int:
    """Hidden width of each level: together as wide as one MLP of four times the stream."""
    return 4 * shape["D"] // len(CHUNKS)


def continuum(shape: Mapping[str, int], *, checkpoint_every: int | None = None, **options) -> ContinuumMemory:
    """The module with one level for each of :data:`CHUNKS`."""
    levels = [LevelConfig(hidden_size=hidden_size(shape), chunk_size=chunk, **options) for chunk in CHUNKS]
    return ContinuumMemory(shape["D"], levels, checkpoint_every=checkpoint_every)


def work(shape: Mapping[str, int]) -> Work:
    """Products of the reads, and of the steps that some token is served by, forward and backward."""
    batch, length, width = (shape[name] for name in ("B", "T", "D"))
    layer = width * hidden_size(shape)
    multiply_adds = 0
    for chunk in CHUNKS:
        stepped = (length - 1) // chunk * chunk
        # a step on a token: 2 products for its key, 1 back, 2 writes, each with two more in the backward;
        # and its key and its target
        multiply_adds += batch * (length * 6 * layer + stepped * (15 * layer + 6 * width**2))
    return Work(flops=2 * multiply_adds, bytes=4 * 4 * batch * length * width)


def training(case: Case, device: torch.device) -> Factories:
    """Forward and backward through all parameters."""
    shape = case.shape
    width = shape["D"]

    def factory(module: Callable[[], nn.Module], **provider) -> Callable[[], Provider]:
        def make() -> Provider:
            torch.manual_seed(0)
            x = torch.randn(
                shape["B"], shape["T"], width, device=device, dtype=case.dtype, requires_grad=True
            )
            grad = torch.randn_like(x)
            block = module().to(device=device, dtype=case.dtype)
            leaves = [x, *block.parameters()]

            def run() -> tuple[torch.Tensor, ...]:
                y = block(x)
                y = y[0] if isinstance(y, tuple) else y
                return (y.detach(), *torch.autograd.grad(y, leaves, grad))

            return Provider(run, **provider)

        return make

    static = {"role": "baseline", "headline": False, "note": "its weights do not change"}
    return {
        "eager dgd": factory(lambda: continuum(shape)),
        "eager dgd, checkpointed": factory(lambda: continuum(shape, checkpoint_every=1), role="variant"),
        "eager sgd": factory(lambda: continuum(shape, rule="sgd"), role="variant", note="another rule"),
        "eager, no steps": factory(lambda: continuum(shape, max_rate=0.0), role="variant", headline=False),
        "plain MLP": factory(lambda: PlainBlock(width, 4 * width), **static),
        "plain MLP per level": factory(
            lambda: nn.Sequential(*(PlainBlock(width, hidden_size(shape)) for _ in CHUNKS)), **static
        ),
    }


def decoding(case: Case, device: torch.device) -> Factories:
    """One token after a context that ends off every boundary."""
    shape = case.shape

    def make() -> Provider:
        torch.manual_seed(0)
        module = continuum(shape).to(device=device, dtype=case.dtype)
        x = torch.randn(shape["B"], shape["context"] + 1, shape["D"], device=device, dtype=case.dtype)
        with torch.no_grad():
            _, state = module(x[:, :-1], output_state=True)

        @torch.no_grad()
        def run() -> tuple[torch.Tensor, ...]:
            return (module(x[:, -1:], state, output_state=True)[0],)

        size = sum(t.numel() * t.element_size() for level in state for t in level if t is not None)
        return Provider(run, state_bytes=size)

    return {"eager dgd": make}


def _case(mode: str, shape: dict[str, int], devices: tuple[str, ...], **options) -> Case:
    if mode == "step":
        return Case("continuum", "decoding", mode, shape, decoding, devices=devices, **options)
    return Case(
        "continuum",
        "plain MLP",
        mode,
        shape,
        training,
        work=work(shape),
        devices=devices,
        memory=True,
        **options,
    )


CASES = [
    _case("forward+backward", {"B": 1, "T": 512, "D": 256}, ("cpu",), quick=True),
    _case("forward+backward", {"B": 1, "T": 2048, "D": 256}, ("cpu",)),
    _case("forward+backward", {"B": 4, "T": 8192, "D": 1024}, ("cuda",)),
    _case("step", {"B": 1, "T": 1, "D": 256, "context": 100}, ("cpu",), quick=True),
    _case("step", {"B": 1, "T": 1, "D": 256, "context": 100_100}, ("cpu",)),
    _case("step", {"B": 8, "T": 1, "D": 1024, "context": 100_100}, ("cuda",)),
]
