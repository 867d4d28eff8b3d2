"""What of ``continuum`` is compiled ahead of time: its launchers' calls, planned on no device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tools.catalogue.entry import CatalogueEntry, unallocated


def catalogue(architecture: str) -> Iterator[CatalogueEntry]:
    """Every kernel: the updates of one level's matrices, and the MLP with the gradients of a step."""
    yield from _updates()
    yield from _mlps(architecture)
    yield from _chunks(architecture)


def _updates() -> Iterator[CatalogueEntry]:
    """With and without what is optional; wide, narrow and odd rows."""
    from nl_kernels.ops.continuum.triton_update import plan_update

    for words, width, hidden in (
        ("1024x4096", 1024, 4096),
        ("256x341", 256, 341),
        ("4096x16384", 4096, 16384),
    ):
        shapes = [(8, hidden, width), (8, width, hidden), (8, hidden, width)]
        weights = [unallocated(*shape) for shape in shapes]
        started = "momentum norms sources where retention bfloat16"
        for options in ("plain", "momentum norms bfloat16", "momentum norms float16", started):
            dtype = {"plain": None}.get(options, getattr(torch, options.split()[-1], None))
            full = options != "plain"
            calls = plan_update(
                weights,
                [unallocated(*shape) for shape in shapes],
                [unallocated(*shape) for shape in shapes] if full else None,
                0.9,
                [unallocated(shape[1]) for shape in shapes] if full else None,
                [unallocated(*shape, dtype=dtype) for shape in shapes] if full else None,
                [unallocated(*shape[1:], dtype=dtype) for shape in shapes] if options == started else None,
                [unallocated(8, dtype=torch.bool) for _ in shapes] if options == started else None,
                [unallocated(*shape[1:]) for shape in shapes] if options == started else None,
                [unallocated() for _ in shapes] if options == started else None,
            )
            for call in calls:
                yield CatalogueEntry("continuum", f"{options} {words}", call)


def _mlps(architecture: str) -> Iterator[CatalogueEntry]:
    """Plain and gated, each dtype; weights in fp32, and in a copy of the dtype of what is read."""
    from nl_kernels.ops.continuum.triton_backward import plan_backward
    from nl_kernels.ops.continuum.triton_forward import plan_forward

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for batches, tokens, width, hidden in ((8, 64, 1024, 4096), (4, 16, 72, 200)):
            for gated, copied in ((False, False), (True, True)):
                kind = dtype if copied else torch.float32
                x, error = (unallocated(batches, tokens, width, dtype=dtype) for _ in range(2))
                up, gate = (unallocated(batches, hidden, width, dtype=kind) for _ in range(2))
                down = unallocated(batches, width, hidden, dtype=kind)
                gate = gate if gated else None
                words = f"{str(dtype).removeprefix('torch.')} {batches}x{tokens}x{width}x{hidden}"
                words += " gated" if gated else " plain"
                forward, _ = plan_forward(x, up, down, gate, architecture=architecture)
                backward, _ = plan_backward(error, x, up, down, gate, True, architecture=architecture)
                parts = ("hidden", "out", "signal", "up", "down", *(("gate",) if gated else ()), "input")
                for call, part in zip((*forward, *backward), parts):
                    yield CatalogueEntry("continuum", f"{words} {part}", call)


def _chunks(architecture: str) -> Iterator[CatalogueEntry]:
    """The error of a chunk's step, signals of bounded errors, and sums that are added to."""
    from nl_kernels.ops.continuum.triton_chunk import plan_chunk, plan_read_backward

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for batches, tokens, width, hidden in ((8, 64, 1024, 4096), (4, 16, 72, 200)):
            x, grad = (unallocated(batches, tokens, width, dtype=dtype) for _ in range(2))
            up, down = (
                unallocated(batches, *shape, dtype=dtype) for shape in ((hidden, width), (width, hidden))
            )
            words = f"{str(dtype).removeprefix('torch.')} {batches}x{tokens}x{width}x{hidden}"
            value, rates = unallocated(width, width, dtype=dtype), unallocated(batches, tokens)
            for gated, output in ((False, True), (True, True), (False, False)):
                gate = up if gated else None
                calls, _ = plan_chunk(
                    x, x, value, up, down, gate, rates, 1.0, output, architecture=architecture
                )
                what = ("read and learned" if output else "learned") + (", with gate" if gated else "")
                for call, part in zip(calls, ("hidden", "error", "back", "up", "down")):
                    if output or part == "error":
                        yield CatalogueEntry("continuum", f"{words} {what} {part}", call)
            totals = [unallocated(hidden, width), unallocated(width, hidden), None]
            calls, _ = plan_read_backward(
                grad, x, up, down, None, [(None, totals)], architecture=architecture
            )
            for call, part in zip(calls[2:], ("up", "down")):
                yield CatalogueEntry("continuum", f"{words} added {part}", call)
