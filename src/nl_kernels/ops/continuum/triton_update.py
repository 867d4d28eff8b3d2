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
            row = (program - first) * BLOCKS_M[i] + tl.arange(0, BLOCKS_M[i])
            column = tl.arange(0, BLOCKS_N[i])
            inside = (row < rows[i])[:, None] & (column < COLUMNS[i])[None, :]
            at = row.to(tl.int64)[:, None] * COLUMNS[i] + column[None, :]
            if where is not None:
                steps = tl.load(where[i] + row // sequence_rows[i], mask=row < rows[i], other=0)[:, None] != 0
            step = tl.load(gradients[i] + at, mask=inside, other=0.0).to(tl.float32)
            if momenta is not None:
                momentum = tl.load(momenta[i] + at, mask=inside, other=0.0)
                step += decay * momentum
                after = step
                if where is not None:
                    after = tl.where(steps, step, momentum)
                finish_loads(BLOCKS_M[i] * BLOCKS_N[i])
                tl.store(momenta[i] + at, after, mask=inside)
            if sources is not None:
                source = (row % source_rows[i]).to(tl.int64)[:, None] * COLUMNS[i] + column[None, :]
                old = tl.load(sources[i] + source, mask=inside, other=0.0).to(tl.float32)
            else:
                old = tl.load(weights[i] + at, mask=inside, other=0.0)
            new = old - step
            if initial is not None:
                own = (row % initial_rows[i]).to(tl.int64)[:, None] * COLUMNS[i] + column[None, :]
                moved = old - tl.load(initial[i] + own, mask=inside, other=0.0).to(tl.float32)
                new -= (1 - tl.load(retention[i])) * moved
            if norms is not None:
                wanted = tl.load(norms[i] + row % norm_rows[i], mask=row < rows[i], other=0.0)
                # A product fused with the sum of two lanes would be rounded in one of them alone.
                length = tl.sqrt(tl.sum(tl.fma(new, new, 0.0), 1))
                new *= (wanted / tl.where(length > 0, length, 1.0))[:, None]
            if where is not None:
                new = tl.where(steps, new, old)
            finish_loads(BLOCKS_M[i] * BLOCKS_N[i])
            tl.store(weights[i] + at, new, mask=inside)
            if copies is not None:
                tl.store(copies[i] + at, new.to(copies[i].dtype.element_ty), mask=inside)
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
        arguments = {**part, "rows": rows, "sequence_rows": sequence_rows, "decay": decay}
        arguments["norm_rows"] = tuple(x.numel() for x in part["norms"] or ()) or sequence_rows
        for name, of in (("source_rows", "sources"), ("initial_rows", "initial")):
            arguments[name] = tuple(x.numel() // x.shape[-1] for x in part[of] or ()) or sequence_rows
        blocks_m, blocks_n, warps = zip(*tiles)
        columns = tuple(w.shape[-1] for w in weights)
        constants = {"COUNT": len(weights), "COLUMNS": columns, "BLOCKS_M": blocks_m, "BLOCKS_N": blocks_n}
        programs, warps = sum(-(-r // m) for r, m in zip(rows, blocks_m)), max(warps)
        calls.append(KernelCall(update_kernel, (programs,), arguments, constants, warps, 1))
    return calls


def update_in_place(update: Update) -> None:
    """Take the steps of an :class:`Update`."""
    read_only = ("gradients", "norms", "sources", "where", "initial")
    given = {name: getattr(update, name) for name in read_only}
    update = update._replace(
        **{name: part and [x.contiguous() for x in part] for name, part in given.items()}
    )
    run_calls(plan_update(*update), update.weights[0].device)
