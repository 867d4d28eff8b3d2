"""Which implementation serves a call: by what was asked for, else by the device of the tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from nl_kernels.renamed import check_renamed_value

logger = logging.getLogger("nl_kernels")

IMPLEMENTATIONS = ("triton", "eager", "reference")
WITH_COMPILED = ("triton", "compiled", "eager", "reference")
"""Of the continuum; in the order of the default."""


_planning = False
_plain = False


@contextlib.contextmanager
def kernels_planned() -> Iterator[None]:
    """Calls on fake and meta tensors, which have no data, get the implementation that they would get on CUDA.

    Nothing is launched, nor compiled: what a step allocates there can be followed on any machine.
    """
    global _planning
    before, _planning = _planning, True
    try:
        yield
    finally:
        _planning = before


def planning() -> bool:
    """Whether within :func:`kernels_planned`."""
    return _planning


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """Calls run eager that kernels or compiled code would serve, whatever was asked for."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def check_implementation(impl: object, accepted: Sequence[str] = IMPLEMENTATIONS) -> None:
    """Check that ``impl`` is one of ``accepted`` or ``None``, which was called "auto"."""
    check_renamed_value("impl", impl, {"auto": None})
    if impl is not None and impl not in accepted:
        raise ValueError(f"impl: expected one of {accepted} or None, got {impl!r}")


def choose_implementation(
    op: str,
    impl: str | None,
    device: torch.device,
    available: Sequence[str] = IMPLEMENTATIONS,
    unsupported: Callable[[], str | None] | None = None,
) -> str:
    """The implementation that serves ``op`` on ``device``.

    Args:
        op: the public name of the op, for messages.
        impl: what the caller asked for; ``None`` picks Triton on CUDA from sm_80 on where the op has it, or
            what is compiled, else eager, else the reference. An explicit choice is never replaced by another.
        device: where the op's tensors live.
        available: the implementations that the op has, of :data:`WITH_COMPILED`.
        unsupported: why its kernels do not take this call, or ``None``; asked where they would be picked. By
            default such a call runs eager, and says so once on CUDA.

    Raises:
        ValueError: ``impl`` is no implementation, or one that this op does not have.
        NotImplementedError: ``impl="triton"`` for a call that the kernels do not take.
        RuntimeError: ``impl="triton"`` cannot run here; the message names the remedy.
    """
    if _plain and impl != "reference" and "eager" in available:
        return "eager"
    if impl is None:
        chosen, reason = next(x for x in WITH_COMPILED if x in available), None
        if chosen == "triton":
            served = WITH_COMPILED[1:]
            if not kernels_run_on(device):
                reason = "the Triton kernels need a CUDA device of compute capability 8.0 or later"
                served = IMPLEMENTATIONS[1:]
            elif unsupported:
                reason = unsupported()
            chosen = chosen if reason is None else next(x for x in served if x in available)
        if not torch.compiler.is_compiling():
            _say_once(op, chosen, device.type, None if chosen == "compiled" else reason)
        return chosen
    check_implementation(impl, WITH_COMPILED)
    if impl not in available:
        raise ValueError(f"impl: {op} has no {impl!r} implementation; it has {tuple(available)}")
    if impl == "triton":
        _require_triton(op, device)
        reason = unsupported() if unsupported else None
        if reason is not None:
            raise NotImplementedError(f"{reason}; use impl='eager'")
    return impl


def kernels_run_on(device: torch.device) -> bool:
    """Whether the default is kernels: on CUDA, from compute capability 8.0 on, which has their products."""
    if device.type != "cuda":
        return planning()
    if torch.version.hip is not None or not torch.cuda.is_available():
        return True  # without a GPU such tensors have no data, as while tracing
    return torch.cuda.get_device_capability(device)[0] >= 8


def compiler_at_work() -> bool:
    """Whether ``torch.compile`` may look into this call."""
    return torch.compiler.is_compiling() or "torch._dynamo" in sys.modules


def interpreting() -> bool:
    """Whether Triton kernels run under its interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a call with these tensors may be differentiated."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return True  # a transform may differentiate what does not say that it requires a gradient
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def autocasting(device_type: str) -> bool:
    """Whether products on such a device are rounded to a shorter dtype."""
    # Of a device that autocast does not know (meta), torch would raise for the question, too.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast off: it would round products of fp32 states and rates to half precision."""
    if autocasting(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def below_autograd() -> contextlib.AbstractContextManager:
    """Calls in here have no gradient and no part in autograd: small ones take a tenth less time so."""
    return (
        contextlib.nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()
    )


@contextlib.contextmanager
def products_for(operands: torch.dtype, device_type: str) -> Iterator[None]:
    """Products of fp32 tensors on CUDA with tf32 operands for callers of 16-bit ones, as in the kernels.

    Such callers have given up more digits than tf32 does; sums stay fp32. fp32 callers have what they set.
    """
    if device_type != "cuda" or operands not in (torch.bfloat16, torch.float16):
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _require_triton(op: str, device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"impl='triton' for {op}: Triton is not installed; pip install triton")
    if device.type != "cuda" and not interpreting() and not planning():
        raise RuntimeError(
            f"impl='triton' for {op}: the tensors are on {device.type!r}; move them to a CUDA device, use "
            "impl='eager', or set TRITON_INTERPRET=1 before importing triton to interpret the kernels"
        )


@functools.cache
def _say_once(op: str, chosen: str, device_type: str, reason: str | None) -> None:
    logger.debug("%s on %s: using the %s implementation", op, device_type, chosen)
    if reason is not None and device_type == "cuda":
        warnings.warn(f"{op} on {device_type} runs in plain PyTorch: {reason}", stacklevel=3)
