"""What of ``delta_memory`` is compiled ahead of time: its launchers' calls, planned on no device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tools.catalogue.entry import CatalogueEntry, unallocated


def catalogue(architecture: str) -> Iterator[CatalogueEntry]:
    """Every kernel at the widths models use, in each dtype; the rarer options at one width.

    The calls are those of the launchers themselves, planned on meta tensors.
    """
    widths = {torch.bfloat16: (64, 128, 256), torch.float16: (128, 256), torch.float32: (128, 256)}
    for dtype, dims in widths.items():
        for dim in dims:
            for has_momentum in (False, True):
                yield from _entries(architecture, dtype, dim, dim, has_momentum=has_momentum)
    # Of few states, for which a scan takes smaller tiles.
    options = {"read": "before", "packed": True, "heads": 4}
    yield from _entries(architecture, torch.bfloat16, 64, 128, has_momentum=True, **options)
    yield from _entries(architecture, torch.float32, 40, 24, has_momentum=False, **options)
    # Two heads of values to one of keys.
    yield from _entries(architecture, torch.bfloat16, 128, 128, has_momentum=False, key_heads=80)
    # Long sequences of few heads: the scan goes by segments.
    for dim in (64, 128):
        for entry in _entries(
            architecture, torch.bfloat16, dim, dim, has_momentum=False, heads=2, tokens=2**17
        ):
            if entry.kernel in ("scan_chunks", "join_segments"):
                yield entry


def _entries(
    architecture: str,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    *,
    has_momentum: bool,
    read: str = "after",
    packed: bool = False,
    heads: int = 160,
    key_heads: int | None = None,
    tokens: int = 512,
) -> Iterator[CatalogueEntry]:
    from nl_kernels.ops.delta_memory.triton_backward import plan_backward
    from nl_kernels.ops.delta_memory.triton_forward import plan_forward
    from nl_kernels.ops.delta_memory.triton_step import plan_step

    batch = 1 if packed else 2

    def inputs(*leading: int) -> list[torch.Tensor | None]:
        q = k = unallocated(*leading[:-1], key_heads or heads, key_dim, dtype=dtype)
        v = unallocated(*leading, value_dim, dtype=dtype)
        rates = [unallocated(*leading) for _ in range(3 if has_momentum else 2)]
        return [q, k, v, *rates, *([] if has_momentum else [None])]

    def states(count: int) -> list[torch.Tensor | None]:
        state = unallocated(count, heads, value_dim, key_dim)
        return [state, state if has_momentum else None]

    cu_seqlens = unallocated(4, dtype=torch.int64) if packed else None
    sequence = [*inputs(batch, tokens, heads), *states(3 if packed else batch), cu_seqlens]
    options = {"scale": 1.0, "read": read, "architecture": architecture}
    forward, (o, final_state, final_momentum) = plan_forward(*sequence, chunk_size=64, **options)
    backward, _ = plan_backward(o, final_state, final_momentum, *sequence, chunk_size=64, **options)
    step, _ = plan_step(*inputs(batch, heads), *states(batch), **options)

    words = [str(dtype).removeprefix("torch."), f"{key_dim}x{value_dim}"]
    given = {
        "momentum": has_momentum,
        read: True,
        "packed": packed,
        "shared": key_heads,
        "long": tokens > 512,
    }
    words += [word for word, on in given.items() if on]
    # Of the recomputed forward, only the solve differs (it keeps the inverse).
    for call in (*forward, backward[0], *backward[len(forward) - 1 :], step):
        yield CatalogueEntry("delta_memory", " ".join(words), call)
