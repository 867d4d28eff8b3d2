"""What each kernel executes, counted by the emulator: ``python -m tools.ptx_emulator.instructions``.

Writes a table of the instructions that a program's warps execute into docs/compiled_kernels.md. No GPU takes
part.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import torch

import nl_kernels
from nl_kernels.doctor import tensors_of
from nl_models.files import write_bytes
from tools import op_inputs
from tools.environment import ROOT
from tools.ptx_emulator.driver import emulated

PAGE = ROOT / "docs/compiled_kernels.md"
BEGIN, END = "<!-- made by make instructions -->", "<!-- to here -->"
CLASSES = ("mma", "shared", "barriers", "global", "shuffles", "alu")
LANES = "threads store different values to one address"  # of sums that are fused; errors stay in budget
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _with_gradients(op: Callable, inputs: dict, **options) -> None:
    leaves = [x for x in tensors_of(inputs) if x.requires_grad]
    o, state = op(**inputs, **options, output_final_state=True, impl="triton")
    loss = sum(x.float().square().sum() for x in (o, *tensors_of(state)))
    torch.autograd.grad(loss, leaves, allow_unused=True)


def _delta_memory(dtype: torch.dtype, momentum: bool) -> None:
    made = op_inputs.delta_memory_inputs(1, 128, 1, 64, momentum=momentum, initial_state=True, dtype=dtype)
    _with_gradients(
        nl_kernels.delta_memory, {n: None if x is None else x.requires_grad_() for n, x in made.items()}
    )
    token = {
        n: None if made[n] is None else made[n][:, 0]
        for n in ("q", "k", "v", "log_decay", "erase", "momentum")
    }
    with torch.no_grad():
        nl_kernels.delta_memory_step(
            **token, state=made["initial_state"], momentum_state=made["initial_momentum"], impl="triton"
        )


def _long_delta_memory(dtype: torch.dtype) -> None:
    """Of few heads: its scan may be cut into parts."""
    made = op_inputs.delta_memory_inputs(1, 3072, 1, 16, dtype=dtype)
    nl_kernels.delta_memory(**made, chunk_size=16, impl="triton")


def _deep_memory(dtype: torch.dtype, width: int, hidden: int | None) -> None:
    made = op_inputs.deep_memory_inputs(1, 32, 1, width, hidden, dtype=dtype, requires_grad=True)
    _with_gradients(nl_kernels.deep_memory, made, chunk_size=16, read="running")


def _self_modifying(dtype: torch.dtype, width: int, hidden: int | None) -> None:
    made = op_inputs.self_modifying_inputs(
        1, 32, 1, width, hidden, outer_scale=0.1, dtype=dtype, requires_grad=True
    )
    _with_gradients(nl_kernels.self_modifying_memory, made, chunk_size=16, read="running")


def _continuum(dtype: torch.dtype) -> None:
    """One level's chunks of 64 tokens, with momentum, gates and a bound; then an MLP with its gradients."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return x.to(dtype).requires_grad_()

    width, hidden = 64, 128
    level = nl_kernels.ContinuumLevel(
        norm=torch.ones(width, dtype=dtype).requires_grad_(),
        up=random(hidden, width),
        down=random(width, hidden),
        gate=random(hidden, width),
        value=random(width, width),
        chunk_size=64,
        rate=0.01,
        rule="momentum",
        error_bound=0.3,
    )
    slower = nl_kernels.ContinuumLevel(
        norm=level.norm, up=level.up, down=level.down, value=level.value, chunk_size=128, rate=0.01
    )
    x = random(1, 128, width)
    for variant in ("sequential", "nested"):
        y, _ = nl_kernels.continuum_memory(
            x, [level, slower], variant=variant, detach_updates=True, impl="triton"
        )
        torch.autograd.grad(y.float().square().sum(), [x, level.up])
    batched = [random(1, *w.shape) for w in (level.up, level.down, level.gate)]
    y = nl_kernels.continuum_mlp(x, *batched, impl="triton")
    torch.autograd.grad(y.float().square().sum(), [x, *batched])


def _newton_schulz(dtype: torch.dtype) -> None:
    x = torch.randn(1, 96, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    nl_kernels.newton_schulz(x, steps=1, impl="triton")


CALLS: dict[str, dict[str, Callable[[torch.dtype], None]]] = {
    "delta_memory": {
        "64 wide": lambda dtype: _delta_memory(dtype, False),
        "64 wide, momentum": lambda dtype: _delta_memory(dtype, True),
        "16 wide, 3,072 tokens": _long_delta_memory,
    },
    "deep_memory": {
        "linear, 64 wide": lambda dtype: _deep_memory(dtype, 64, None),
        "two layers, 64 wide": lambda dtype: _deep_memory(dtype, 64, 64),
    },
    "self_modifying": {
        "linear, 64 wide": lambda dtype: _self_modifying(dtype, 64, None),
        "two layers, 32 wide": lambda dtype: _self_modifying(dtype, 32, 32),
    },
    "continuum": {"64 wide, hidden 128": _continuum},
    "newton_schulz": {"96 × 160": _newton_schulz},
}


def count(op: str, what: str, dtype: torch.dtype) -> dict[str, tuple[int, Counter]]:
    """By kernel the programs that ran, and the instructions of all of them."""
    with emulated(seed=None) as launches:
        CALLS[op][what](dtype)
    found: dict[str, tuple[int, Counter]] = {}
    for record in launches:
        wrong = [line for line in record.findings if LANES not in line]
        assert not wrong, wrong
        programs, instructions = found.get(record.kernel, (0, Counter()))
        found[record.kernel] = programs + record.programs, instructions + record.instructions
    return found


def _table(dtype: torch.dtype) -> list[str]:
    lines = [f"| op | kernel | {' | '.join(CLASSES)} | all |", "| --- " * 2 + "| ---: " * 7 + "|"]
    for op, calls in CALLS.items():
        for what in calls:
            for kernel, (programs, instructions) in count(op, what, dtype).items():
                each = [instructions[name] / programs for name in CLASSES]
                cells = [f"{n:,.0f}" for n in (*each, sum(each))]
                lines.append(f"| {op}, {what} | {kernel.removesuffix('_kernel')} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    lines = []
    for name, dtype in DTYPES.items():
        print(f"running every kernel in {name}", file=sys.stderr)
        lines += ["", f"### {name}", "", *_table(dtype)]
    text = "\n".join([before + BEGIN, *lines, "", END + after])
    write_bytes(PAGE, text.encode())
    print(f"{PAGE}: {len(lines)} lines")


if __name__ == "__main__":
    main()
