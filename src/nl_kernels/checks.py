"""Argument checks shared by the ops: each error names the argument, what came and what is accepted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, shape: Sequence[int], *, like: torch.Tensor | None = None) -> None:
    """Check that ``value`` is a floating tensor of ``shape`` on the device of ``like``.

    Raises:
        TypeError: not a tensor, or not of a floating dtype in :data:`FLOAT_DTYPES`.
        ValueError: another shape or device.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected one of {[str(d) for d in FLOAT_DTYPES]}, got {value.dtype}")
    if value.shape != shape and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {value.device}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Check that ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_positive_int(name: str, value: object) -> None:
    """Check that ``value`` is an ``int`` of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_range(name: str, value: torch.Tensor, low: float, high: float, *, closed_high: bool = True) -> None:
    """Check that every element is in [low, high] (or [low, high)); NaN never is.

    On the CPU alone, as reading values elsewhere waits for the device; not of tensors without data (fake or
    functorch tensors).
    """
    if value.device.type != "cpu" or not has_readable_data(value) or value.numel() == 0:
        return
    if value.numel() <= 16:  # one pass in Python costs less than two kernels
        values = value.flatten().tolist()
        if all(low <= x <= high and (closed_high or x < high) for x in values):
            return
    data = value.detach()
    lowest, highest = (x.item() for x in torch.aminmax(data))  # NaN if any element is
    if low <= lowest and (highest <= high if closed_high else highest < high):
        return
    inside = (data >= low) & ((data <= high) if closed_high else (data < high))
    bad = data[~inside].flatten()[0].item()
    closing = "]" if closed_high else ")"
    raise ValueError(f"{name}: expected values in [{low}, {high}{closing}, got {bad}")


def check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int, like: torch.Tensor) -> None:
    """Check cumulative lengths ``[0, …, tokens]``: strictly increasing integers, on ``like``'s device."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: expected shape [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens: expected a tensor on {like.device}, got one on {cu_seqlens.device}")
    if not has_readable_data(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != tokens or any(b <= a for a, b in itertools.pairwise(values)):
        raise ValueError(f"cu_seqlens: expected 0 < … < {tokens} strictly increasing from 0, got {values}")


def check_tokens(name: str, x: object, axes: str) -> None:
    """Check the first of a call's tensors, which says the sizes of the others: its kind and its axes."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.ndim != axes.count(",") + 1 or 0 in x.shape:
        raise ValueError(f"{name}: expected {axes} with no empty axis, got shape {tuple(x.shape)}")
    check_tensor(name, x, x.shape)


def check_mask(mask: object, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Check that ``mask`` is bool, of ``shape`` ([B, T], or [B] for one token), on the device of ``like``."""
    check_exact("mask", mask, "a bool tensor (True = real token)", torch.bool, shape, like)


def check_exact(
    name: str, value: object, kind: str, dtype: torch.dtype, shape: Sequence[int], like: torch.Tensor
) -> None:
    """Check that ``value`` is a tensor of no other ``dtype``; ``kind``: what messages call that."""
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        came = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected {kind}, got {came}")
    if value.shape != tuple(shape) or value.device != like.device:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} on {like.device}, "
            f"got {tuple(value.shape)} on {value.device}"
        )


def check_sequences(mask: object, cu_seqlens: object, like: torch.Tensor, *, one: bool = False) -> int:
    """Check how the tokens of ``like`` [B, T, ..] are sequences, or ``one`` token of each, [B, ..].

    Returns the number of sequences.
    """
    batch, *length = like.shape[: 1 if one else 2]
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens: packed input needs B = 1, got {batch}")
        if mask is not None:
            raise ValueError("mask: not together with cu_seqlens; packed input has no padding")
        check_cu_seqlens(cu_seqlens, *length, like)
        return len(cu_seqlens) - 1
    if mask is not None:
        check_mask(mask, (batch, *length), like)
    return batch


def check_position(name: str, position: object, batch: int, period: int, like: torch.Tensor) -> None:
    """Check the tokens since the last boundary: [B] int64, below ``period``."""
    check_exact(name, position, "an int64 tensor", torch.int64, (batch,), like)
    if position.device.type != "cpu" or not has_readable_data(position):
        return
    for place in position.tolist():
        if not 0 <= place < period:
            raise ValueError(
                f"{name}: expected values in [0, {period}), got {place}: "
                "was the state made with another chunk size?"
            )


def state_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Of states, and of what changes them: fp64 when any of the tensors is, else fp32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def has_readable_data(value: torch.Tensor) -> bool:
    """Whether the host can read the values.

    Not while tracing or capturing a CUDA graph, nor of fake, functorch or meta tensors.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta
