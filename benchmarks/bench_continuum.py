"""``continuum_memory`` against the static MLP that it replaces: what learning in context costs.

    python -m benchmarks.run --op continuum

The MLP's hidden width is shared out among the levels, in multiples of 16: all have as many weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import decode_name, decode_provider, forward_backward
from benchmarks.continuum_steps import STEP_CASES
from benchmarks.harness import Case, Factories, Provider
from benchmarks.measure import Work, random_tensors
from nl_kernels.ops.continuum import ContinuumLevel, ContinuumState, continuum_memory

CHUNKS = (64, 256, 1024)
# A state also holds the tokens that a level has not yet learned from: the same number after 1 token.
PAST = 98 * CHUNKS[-1] + 1
RATE = 0.1  # relative; a token's rate is this over the width


def hidden_widths(case: Case) -> list[int]:
    """The hidden width of each level: multiples of 16, the last one takes what is left."""
    share = case.shape["h"] // len(CHUNKS) // 16 * 16
    return [*[share] * (len(CHUNKS) - 1), case.shape["h"] - share * (len(CHUNKS) - 1)]


def levels_of(
    case: Case, device: torch.device, dtype: torch.dtype, rule: str = "sgd", *, projected_keys: bool = True
) -> list[ContinuumLevel]:
    """Levels with weights as initialised; the same for every dtype."""
    width, levels = case.shape["D"], []
    for number, (chunk, hidden) in enumerate(zip(CHUNKS, hidden_widths(case))):
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
        if not projected_keys:
            del weights["key"]
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
    """The MLP block of a transformer, ``x + down GELU(up n(x))``."""
    return x + F.linear(F.gelu(F.linear(F.rms_norm(x, x.shape[-1:], norm, 1e-6), up)), down)


def training_providers(case: Case, device: torch.device) -> Factories:
    """Forward and backward, gradients of the input and of everything that a level holds."""

    def ours(
        role: str, rule: str = "sgd", note: str = "", *, projected_keys: bool = True, **options: object
    ) -> Provider:
        levels = levels_of(case, device, case.dtype, rule, projected_keys=projected_keys)
        x, cotangent = stream_of(case, device, case.dtype)
        parts = ["norm", "up", "down"]
        if not options.get("detach_updates"):
            parts += ["key", "value"] if projected_keys else ["value"]
        # A level whose first step lies beyond the sequence has no gradient for its keys and values.
        last = case.shape["T"] - 1
        leaves = [
            getattr(level, part)
            for level in levels
            for part in parts
            if part not in ("key", "value") or level.chunk_size <= last
        ]
        run = forward_backward(lambda: continuum_memory(x, levels, **options)[0], [x, *leaves], cotangent)
        work = None if projected_keys else learning_work(case, through_steps="value" in parts, keys=False)
        default = rule == "sgd" and projected_keys
        return Provider(run, role=role, comparable=default, headline=default, note=note, work=work)

    def static(widths: list[int], note: str) -> Provider:
        x, cotangent = stream_of(case, device, case.dtype)
        blocks = []
        for number, hidden in enumerate(widths):
            shapes = {"up": (hidden, case.shape["D"]), "down": (case.shape["D"], hidden)}
            made = random_tensors(number + 1, shapes, device, case.dtype)
            made = [made["up"] * case.shape["D"] ** -0.5, made["down"] * hidden**-0.5]
            norm = torch.ones(case.shape["D"], device=device, dtype=case.dtype)
            blocks.append([w.requires_grad_() for w in (norm, *made)])

        def forward() -> Tensor:
            out = x
            for block in blocks:
                out = static_block(out, *block)
            return out

        run = forward_backward(forward, [x, *(weight for block in blocks for weight in block)], cotangent)
        return Provider(run, role="baseline", note=note, work=static_work(case))

    def never_stepping() -> Provider:
        levels = [replace(level, rate=0.0) for level in levels_of(case, device, case.dtype)]
        x, cotangent = stream_of(case, device, case.dtype)
        leaves = [x, *(weight for level in levels for weight in (level.norm, level.up, level.down))]
        run = forward_backward(lambda: continuum_memory(x, levels)[0], leaves, cotangent)
        return Provider(
            run, role="variant", headline=False, note="exactly the static MLPs", work=static_work(case)
        )

    shared = {"projected_keys": False}
    on_kernels = {}
    if device.type == "cuda":  # where the default of these settings is Triton
        on_kernels = {
            "nl_kernels first-order eager": lambda: ours(
                "variant", note="first-order, impl='eager'", detach_updates=True, impl="eager", **shared
            )
        }
    return {
        "nl_kernels": lambda: ours("ours"),
        "nl_kernels checkpointed": lambda: ours("variant", note="checkpoint_every=1", checkpoint_every=1),
        "nl_kernels dgd": lambda: ours("variant", "dgd"),
        "nl_kernels keys as read": lambda: ours("variant", note="key=None", **shared),
        "nl_kernels first-order": lambda: ours(
            "variant", note="key=None, detach_updates=True", detach_updates=True, **shared
        ),
        "nl_kernels first-order nested": lambda: ours(
            "variant", note="the same, nested", detach_updates=True, variant="nested", **shared
        ),
        **on_kernels,
        "nl_kernels rate 0": never_stepping,
        "static MLP": lambda: static([case.shape["h"]], "does not learn in context: the floor"),
        "static MLPs": lambda: static(hidden_widths(case), "one after the other, as wide as the levels"),
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


def learning_work(case: Case, *, through_steps: bool = True, keys: bool = True) -> Work:
    """The static part, and the steps that some token is served by.

    A step on a token takes three products of a layer's size (one back, two writes) and its target; with keys
    of its own, two more and the key. Through the steps, the backward takes twice as many. Where the keys are
    what is read, the backward of the step's forward is that of the read.
    """
    static = static_work(case)
    width = case.shape["D"]
    flops = 0
    for chunk, hidden in zip(CHUNKS, hidden_widths(case)):
        stepped = case.shape["B"] * ((case.shape["T"] - 1) // chunk * chunk)
        products = (5 if keys else 3) * width * hidden + (2 if keys else 1) * width**2
        flops += (3 if through_steps else 1) * 2 * stepped * products
    return Work(static.flops + flops, static.bytes)


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


def reading_providers(case: Case, device: torch.device) -> Factories:
    """Learning while reading, without gradients, keys as read; the same widths that never learn."""

    def ours(role: str, rate: float | None = None, **options: object) -> Provider:
        levels = levels_of(case, device, case.dtype, projected_keys=False)
        if rate is not None:
            levels = [replace(level, rate=rate) for level in levels]
        x, _ = stream_of(case, device, case.dtype)

        @torch.no_grad()
        def run() -> Tensor:
            return continuum_memory(x, levels, **options)[0]

        return Provider(run, role=role, work=static_reading(case) if rate == 0 else None)

    found = {"nl_kernels": lambda: ours("ours"), "nl_kernels rate 0": lambda: ours("baseline", 0.0)}
    if device.type == "cuda":  # where the default is Triton
        found["nl_kernels eager"] = lambda: ours("variant", impl="eager")
    return found


def static_reading(case: Case) -> Work:
    """The forward third of :func:`static_work`."""
    work = static_work(case)
    return Work(work.flops / 3, work.bytes / 3)


def reading_case(device: str, **sizes: int) -> Case:
    """One case of reading without gradients."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = Case("continuum", "reading", "forward", sizes, reading_providers, dtype=dtype, devices=(device,))
    learned = learning_work(case, through_steps=False, keys=False).flops - static_work(case).flops
    work = static_reading(case)
    return replace(case, work=Work(work.flops + learned, work.bytes), memory=True)


def decode_providers(case: Case, device: torch.device) -> Factories:
    """One token after 1 token and after some 100,000."""

    def ours(past: int) -> Provider:
        levels = levels_of(case, device, case.dtype, "dgd")
        x, _ = stream_of(case.with_tokens(2_000), device, case.dtype)

        def advance(state: ContinuumState | None, tokens: int) -> tuple[Tensor, ContinuumState]:
            return continuum_memory(x[:, :tokens], levels, initial_state=state, output_final_state=True)

        return decode_provider(
            lambda state: advance(state, 1), lambda state, tokens: advance(state, tokens)[1], past
        )

    return {decode_name("nl_kernels", past): lambda past=past: ours(past) for past in (1, PAST)}


CASES = [
    learning_case("cpu", quick=True, B=1, T=512, D=256, h=1024),
    learning_case("cpu", memory=True, B=1, T=2048, D=256, h=1024),
    learning_case("cuda", quick=True, memory=True, B=8, T=4096, D=1024, h=4096),
    Case(
        op="continuum",
        name="decode",
        mode="step",
        shape={"B": 1, "T": 1, "D": 256, "h": 1024},
        providers=decode_providers,
    ),
    reading_case("cuda", B=8, T=4096, D=1024, h=4096),
    reading_case("cpu", B=1, T=2048, D=256, h=1024),
    *STEP_CASES,
]
