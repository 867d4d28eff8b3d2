"""Training steps of a preset, beside their plan: ``python -m benchmarks.training_step --device cuda``.

The plan comes first, which takes no memory: the step is then that of the fastest way that the device holds,
without activation checkpointing before with it, and with half the sequences where neither fits. Rows are
written as they come: the plan, the first step (in which kernels are compiled), the steps after it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import environment
from benchmarks.run import Device, append_rows
from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.profiling.memory import PeakMemory
from nl_models.profiling.plan import plan_training_step

_SPARE = 0.92  # of the memory of a device, what a plan may take: the rest is the context's and fragments


def fitting_step(config: HopeConfig, batch: int, length: int, memory: float, kernels: bool) -> dict[str, Any]:
    """The first way to train on up to ``batch`` sequences at once whose planned peak is below ``memory``.

    Raises:
        RuntimeError: not even one sequence fits.
    """
    while batch:
        for checkpoints in (False, True):
            sizes = {"batch": batch, "length": length, "block_checkpoints": checkpoints}
            plan = plan_training_step(config, **sizes, kernels=kernels)
            if plan.peak < memory:
                return sizes | {"planned_peak_bytes": plan.peak, "planned_calls": plan.calls}
        batch //= 2
    raise RuntimeError(f"a step of one sequence of {length} tokens takes {plan.peak / 1e9:.1f} GB")


def main(
    preset: Annotated[str, typer.Option(help="Of HopeConfig.")] = "340m",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer blocks than the preset's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most sequences at a time.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="To time, after the first.")] = 5,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cuda,
    output: Annotated[Path | None, typer.Option(help="JSONL file to append to.")] = None,
) -> None:
    """Time AdamW steps with fp32 weights and bf16 autocast; print and record tokens per second and peak."""
    where = torch.device(device.value)
    on_cuda = where.type == "cuda"
    config = HopeConfig.preset(preset, **({} if layers is None else {"num_hidden_layers": layers}))
    memory = _SPARE * torch.cuda.get_device_properties(where).total_memory if on_cuda else float("inf")
    row = {**environment(where), "preset": preset, "layers": config.num_hidden_layers}
    row |= fitting_step(config, batch, length, memory, kernels=on_cuda)

    def record(**figures: Any) -> None:
        typer.echo(figures)
        if output is not None:
            append_rows(output, [row | figures])

    record(planned_peak_bytes=row["planned_peak_bytes"], batch=row["batch"])
    peak = PeakMemory(where)
    with where:
        torch.manual_seed(0)
        model = HopeForCausalLM(config).train()
        ids = torch.randint(config.vocab_size, (row["batch"], length))
    if row["block_checkpoints"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast(where.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits
        if on_cuda:
            torch.cuda.synchronize(where)
        return time.perf_counter() - began

    record(step=0, seconds=step(), peak_bytes=peak.bytes())
    for number in range(1, steps + 1):
        seconds = step()
        taken = peak.bytes()
        record(
            step=number,
            seconds=seconds,
            tokens_per_second=row["batch"] * length / seconds,
            peak_bytes=taken,
            peak_by_plan=taken / row["planned_peak_bytes"],
        )


if __name__ == "__main__":
    typer.run(main)
