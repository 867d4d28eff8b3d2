"""``continuum_memory`` against the static MLP that it replaces: what learning in context costs.

    python -m benchmarks.run --op continuum

The MLP's hidden width is shared out among the levels, so that all have the same matrices in all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import decode_name, decode_provider, forward_backward
from benchmarks.harness import Case, Factories, Provider
from benchmarks.measure import Work, random_tensors
from nl_kernels.ops.continuum import ContinuumLevel, ContinuumState, continuum_memory

CHUNKS = (64, 256, 1024)
# A state also holds the tokens that a level has not yet learned from: the same number after 1 token.
PAST = 98 * CHUNKS[-1] + 1
RATE = 0.1  # relative; a token's rate is this over the width


def levels_of(
    case: Case, device: torch.device, dtype: torch.dtype, rule: str = "dgd"
) -> list[ContinuumLevel]:
    """Levels with weights as initialised; the same for every dtype."""
    width, hidden = case.shape["D"], case.shape["h"] // len(CHUNKS)
    levels = []
    for number, chunk in enumerate(CHUNKS):
        shapes = {
            "up": (hidden, width),
            "down": (width, hidden),
            "key": (width, width),
            "value": (width, width),
        }
        made = random_tensors(number + 1, shapes, torch.device("cpu"), torch.float64)
        weights = {name: x * x.shape[-1] ** -0.5 for name, x in made.items()}
        weights["norm"] = torch.ones(width, dtype=torch.float64)
        weights = {name: x.to(device, dtype).requires_grad_() for name, x in weights.items()}
        # The mini-batch form of sgd adds up a whole chunk's steps; dgd's solve bounds them.
        rate = RATE / width if rule == "dgd" else RATE / width / chunk
        levels.append(ContinuumLevel(**weights, chunk_size=chunk, rate=rate, rule=rule))
    return levels


def stream_of(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The input and the cotangent of the output."""
    shape = (case.shape["B"], case.shape["T"], case.shape["D"])
    made = random_tensors(0, {"x": shape, "cotangent": shape}, device, dtype)
    return made["x"].requires_grad_(), made["cotangent"]


def static_block(x: Tensor, norm: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``x + down GELU(up n(x))``."""
    return x + F.linear(F.gelu(F.linear(F.rms_norm(x, x.shape[-1:], norm, 1e-6), up)), down)


def training_providers(case: Case, device: torch.device) -> Factories:
    """Forward and backward, gradients of the input and of everything that a level holds."""

    def ours(role: str, rule: str = "dgd", note: str = "", **options: int) -> Provider:
        levels = levels_of(case, device, case.dtype, rule)
        x, cotangent = stream_of(case, device, case.dtype)
        parts = ("norm", "up", "down", "key", "value")
        leaves = [x, *(getattr(level, part) for level in levels for part in parts)]
        # A level whose first step lies beyond the sequence has no gradient for its keys and values.
        last = case.shape["T"] - 1
        leaves = [
            leaf
            for leaf in leaves
            if not any(leaf is lv.key or leaf is lv.value for lv in levels if lv.chunk_size > last)
        ]
        run = forward_backward(lambda: continuum_memory(x, levels, **options)[0], leaves, cotangent)
        return Provider(run, role=role, comparable=rule == "dgd", headline=rule == "dgd", note=note)

    def static() -> Provider:
        levels = levels_of(case, device, case.dtype)
        x, cotangent = stream_of(case, device, case.dtype)
        blocks = [(level.norm, level.up, level.down) for level in levels]

        def forward() -> Tensor:
            out = x
            for block in blocks:
                out = static_block(out, *block)
            return out

        run = forward_backward(forward, [x, *(weight for block in blocks for weight in block)], cotangent)
        return Provider(
            run, role="baseline", note="does not learn in context: the floor", work=static_work(case)
        )

    def never_stepping() -> Provider:
        levels = [replace(level, rate=0.0) for level in levels_of(case, device, case.dtype)]
        x, cotangent = stream_of(case, device, case.dtype)
        leaves = [x, *(weight for level in levels for weight in (level.norm, level.up, level.down))]
        run = forward_backward(lambda: continuum_memory(x, levels)[0], leaves, cotangent)
        return Provider(
            run, role="variant", headline=False, note="exactly the static MLP", work=static_work(case)
        )

    return {
        "nl_kernels": lambda: ours("ours"),
        "nl_kernels checkpointed": lambda: ours("variant", note="checkpoint_every=1", checkpoint_every=1),
        "nl_kernels sgd": lambda: ours("variant", "sgd"),
        "nl_kernels rate 0": never_stepping,
        "static MLP": static,
    }


def training_reference(case: Case, tokens: int) -> Tensor:
    """The token loop in fp64 on the first tokens."""
    cpu = torch.device("cpu")
    x, _ = stream_of(case, cpu, case.dtype)
    with torch.no_grad():
        return continuum_memory(
            x[:, :tokens].double(), levels_of(case, cpu, torch.float64), impl="reference"
        )[0]


def static_work(case: Case) -> Work:
    """Two products of the MLP, three times (forward and both gradients); input, output and weights once."""
    tokens, width, hidden = case.tokens, case.shape["D"], case.shape["h"]
    size = case.dtype.itemsize
    return Work(3 * 4 * tokens * width * hidden, 3 * size * (2 * tokens * width + 2 * width * hidden))


def learning_work(case: Case) -> Work:
    """The static part, and the steps that some token is served by.

    Forward, a step on a token takes five products of a layer's size (two for its key, one back, two writes),
    its key and its target; the backward takes twice as many.
    """
    static = static_work(case)
    width, hidden = case.shape["D"], case.shape["h"] // len(CHUNKS)
    stepped = case.shape["B"] * sum((case.shape["T"] - 1) // chunk * chunk for chunk in CHUNKS)
    return Work(static.flops + 3 * 2 * stepped * (5 * width * hidden + 2 * width**2), static.bytes)


def learning_case(device: str, quick: bool = False, memory: bool = False, **sizes: int) -> Case:
    """One training case on one kind of device."""
    case = Case(
        op="continuum",
        name="static MLP",
        mode="forward+backward",
        shape=sizes,
        providers=training_providers,
        reference=training_reference,
        memory=memory,
        quick=quick,
        devices=(device,),
    )
    return replace(case, work=learning_work(case))


def decode_providers(case: Case, device: torch.device) -> Factories:
    """One token after 1 token and after some 100,000."""

    def ours(past: int) -> Provider:
        levels = levels_of(case, device, case.dtype)
        x, _ = stream_of(case.with_tokens(2_000), device, case.dtype)

        def advance(state: ContinuumState | None, tokens: int) -> tuple[Tensor, ContinuumState]:
            return continuum_memory(x[:, :tokens], levels, initial_state=state, output_final_state=True)

        return decode_provider(
            lambda state: advance(state, 1), lambda state, tokens: advance(state, tokens)[1], past
        )

    return {decode_name("nl_kernels", past): lambda past=past: ours(past) for past in (1, PAST)}


CASES = [
    learning_case("cpu", quick=True, B=1, T=512, D=256, h=1024 // 3 * 3),
    learning_case("cpu", memory=True, B=1, T=2048, D=256, h=1024 // 3 * 3),
    learning_case("cuda", quick=True, memory=True, B=8, T=4096, D=1024, h=4096 // 3 * 3),
    Case(
        op="continuum",
        name="decode",
        mode="step",
        shape={"B": 1, "T": 1, "D": 256, "h": 1024 // 3 * 3},
        providers=decode_providers,
    ),
]
