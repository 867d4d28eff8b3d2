"""The steps of several weights in one pass over memory: momentum, weight, retention, row norms, working copy.

A program has whole rows of one matrix, so that their norms are known before anything is written. Widths are
compile-time constants: a launch is specialised for the matrices of its levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nl_kernels.ops.continuum import launch
from nl_kernels.ops.continuum.registration import Update
from nl_kernels.triton_support.kernel_call import KernelCall, run_calls
from nl_kernels.triton_support.language import finish_loads


@triton.jit
def _update_rows(
    weights,
    gradients,
    momenta,
    norms,
    copies,
    sources,
    where,
    initial,
    retention,
    block,
    rows,
    norm_rows,
    source_rows,
    initial_rows,
    sequence_rows,
    decay,
    I: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows ``block · BLOCK_M …`` of matrix I."""
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    if where is not None:
        steps = tl.load(where[I] + row // sequence_rows, mask=row < rows, other=0)[:, None] != 0
    step = tl.load(gradients[I] + at, mask=inside, other=0.0).to(tl.float32)
    if momenta is not None:
        momentum = tl.load(momenta[I] + at, mask=inside, other=0.0)
        step += decay * momentum
        after = step
        if where is not None:
            after = tl.where(steps, step, momentum)
        finish_loads(BLOCK_M * BLOCK_N)
        tl.store(momenta[I] + at, after, mask=inside)
    if sources is not None:
        source = (row % source_rows).to(tl.int64)[:, None] * COLUMNS + column[None, :]
        old = tl.load(sources[I] + source, mask=inside, other=0.0).to(tl.float32)
    else:
        old = tl.load(weights[I] + at, mask=inside, other=0.0)
    new = old - step
    if initial is not None:
        own = (row % initial_rows).to(tl.int64)[:, None] * COLUMNS + column[None, :]
        moved = old - tl.load(initial[I] + own, mask=inside, other=0.0).to(tl.float32)
        new -= (1 - tl.load(retention[I])) * moved
    if norms is not None:
        wanted = tl.load(norms[I] + row % norm_rows, mask=row < rows, other=0.0)
        # A product fused with the sum of two lanes would be rounded in one of them and not in the other.
        length = tl.sqrt(tl.sum(tl.fma(new, new, 0.0), 1))
        new *= (wanted / tl.where(length > 0, length, 1.0))[:, None]
    if where is not None:
        new = tl.where(steps, new, old)
    finish_loads(BLOCK_M * BLOCK_N)
    tl.store(weights[I] + at, new, mask=inside)
    if copies is not None:
        tl.store(copies[I] + at, new.to(copies[I].dtype.element_ty), mask=inside)


@triton.jit
def update_kernel(
    weights,
    gradients,
    momenta,
    norms,
    copies,
    sources,
    where,
    initial,
    retention,
    rows,
    norm_rows,
    source_rows,
    initial_rows,
    sequence_rows,
    decay,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS_M: tl.constexpr,
    BLOCKS_N: tl.constexpr,
):
    """One step of COUNT matrices [rows, COLUMNS], each argument a tuple of them; absent ones are None.

    Grid: blocks of rows of all matrices, one matrix after the other.
    """
    program = tl.program_id(0)
    first = 0
    for i in tl.static_range(COUNT):
        blocks = (rows[i] + BLOCKS_M[i] - 1) // BLOCKS_M[i]
        if (program >= first) & (program < first + blocks):
            _update_rows(
                weights,
                gradients,
                momenta,
                norms,
                copies,
                sources,
                where,
                initial,
                retention,
                program - first,
                rows[i],
                norm_rows[i],
                source_rows[i],
                initial_rows[i],
                sequence_rows[i],
                decay,
                i,
                COLUMNS[i],
                BLOCKS_M[i],
                BLOCKS_N[i],
            )
        first += blocks


def plan_update(*parts: Sequence[torch.Tensor] | float | None) -> list[KernelCall]:
    """The calls that take an :class:`Update` of these parts, all contiguous; runs nothing."""
    calls, update = [], Update(*parts)
    for start in range(0, len(update.weights), launch.MAX_MATRICES):
        own, part = slice(start, start + launch.MAX_MATRICES), update._asdict()
        decay = float(part.pop("decay"))
        part = {name: None if tensors is None else tuple(tensors[own]) for name, tensors in part.items()}
        if part["where"] is not None:
            part["where"] = tuple(steps.view(torch.uint8) for steps in part["where"])
        weights = part["weights"]
        rows = tuple(w.numel() // w.shape[-1] for w in weights)
        tiles = [launch.update_tile(w.shape[-1]) for w in weights]
        sequence_rows = tuple(w.shape[-2] for w in weights)
        norm_rows = source_rows = initial_rows = sequence_rows
        if part["norms"] is not None:
            norm_rows = tuple(n.numel() for n in part["norms"])
        if part["sources"] is not None:
            source_rows = tuple(w.numel() // w.shape[-1] for w in part["sources"])
        if part["initial"] is not None:
            initial_rows = tuple(w.numel() // w.shape[-1] for w in part["initial"])
        arguments = {
            **part,
            "rows": rows,
            "norm_rows": norm_rows,
            "source_rows": source_rows,
            "initial_rows": initial_rows,
            "sequence_rows": sequence_rows,
            "decay": decay,
        }
        constants = {
            "COUNT": len(weights),
            "COLUMNS": tuple(w.shape[-1] for w in weights),
            "BLOCKS_M": tuple(tile.block_m for tile in tiles),
            "BLOCKS_N": tuple(tile.block_n for tile in tiles),
        }
        programs = sum(triton.cdiv(r, tile.block_m) for r, tile in zip(rows, tiles))
        warps = max(tile.num_warps for tile in tiles)
        calls.append(KernelCall(update_kernel, (programs,), arguments, constants, warps, 1))
    return calls


def update_in_place(update: Update) -> None:
    """See :func:`nl_kernels.continuum_update_`."""
    read_only = ("gradients", "norms", "sources", "where", "initial")
    given = {name: getattr(update, name) for name in read_only}
    update = update._replace(
        **{name: part and [x.contiguous() for x in part] for name, part in given.items()}
    )
    run_calls(plan_update(*update), update.weights[0].device)
