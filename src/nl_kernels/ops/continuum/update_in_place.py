"""The steps of many weights at once, in place: for states that no gradient flows through."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nl_kernels.checks import FLOAT_DTYPES, check_tensor
from nl_kernels.dispatch import choose_implementation
from nl_kernels.ops.continuum import launch, registration
from nl_kernels.ops.continuum.update import check_retention

AVAILABLE = ("triton", "eager", "reference")
_Tensors = Sequence[torch.Tensor]


def continuum_update_(
    weights: _Tensors,
    gradients: _Tensors,
    *,
    momenta: _Tensors | None = None,
    momentum_decay: float = 0.9,
    norms: _Tensors | None = None,
    copies: _Tensors | None = None,
    sources: _Tensors | None = None,
    where: _Tensors | None = None,
    initial: _Tensors | None = None,
    retention: _Tensors | None = None,
    impl: str | None = None,
) -> None:
    """:func:`nl_kernels.continuum_update` by ``sgd``, or with ``momenta`` by ``momentum``, in place.

    All matrices of a level, or of several, take one launch and one pass over memory. A step that another
    rule made (muon's direction, dgd's difference) is applied by giving it as the gradient.

    Args:
        weights: each [.., out, in], fp32 or fp64, contiguous; overwritten.
        gradients: G of each weight, in its shape and dtype, rates included.
        momenta: M of each weight, in its shape and dtype, contiguous; overwritten.
        momentum_decay: in [0, 1).
        norms: [out] or [.., out] of each weight: the norm that every row gets back after the step.
        copies: of each weight, in its shape, fp16, bf16 or fp32, contiguous: filled with the new weight.
        sources: of each weight, [out, in] or in its shape, of any dtype: what is stepped in the place of what
            ``weights`` hold, which are then only written.
        where: of each weight, bool [..]: the sequences that step. The others keep momentum and weight (of
            ``sources``, where given); their copies are filled all the same.
        initial: of each weight W_0, [out, in] or in its shape, of any dtype; together with
        retention: of each weight α in [0, 1], a tensor of one number in the weights' dtype: the step takes
            ``(1 − α) (W − W_0)`` away, too. None: nothing.
        impl: ``"triton"`` (fp32, rows of at most 16,384), ``"eager"``, ``"reference"`` or None: by device.

    Raises:
        TypeError, ValueError: a bad argument, named; nothing has changed.
        NotImplementedError: ``impl="triton"`` with fp64 or longer rows.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    _check(weights, gradients, momenta, momentum_decay, norms, copies, sources, where, initial, retention)
    if not weights:
        return
    refused = _unserved(weights)
    available = AVAILABLE if impl is not None or refused is None else AVAILABLE[1:]
    chosen = choose_implementation("continuum_update_", impl, weights[0].device, available)
    if chosen == "triton":
        if refused is not None:
            raise NotImplementedError(refused)
        gradients = [g.contiguous() for g in gradients]
        norms, sources, where, initial = (
            None if part is None else [x.contiguous() for x in part]
            for part in (norms, sources, where, initial)
        )
    registration.update_in_place(
        weights, gradients, momenta, momentum_decay, norms, copies, sources, where, initial, retention, chosen
    )


def _unserved(weights: _Tensors) -> str | None:
    """Why the kernel cannot serve these weights; None: it can."""
    for i, weight in enumerate(weights):
        if weight.dtype != torch.float32:
            return f"weights[{i}]: the Triton kernel updates float32, got {weight.dtype}; use impl='eager'"
        if weight.shape[-1] > launch.MAX_WIDTH:
            return (
                f"weights[{i}]: the Triton kernel has rows of at most {launch.MAX_WIDTH}, got "
                f"{weight.shape[-1]}; use impl='eager'"
            )
    return None


def _check(
    weights, gradients, momenta, momentum_decay, norms, copies, sources, where, initial, retention
) -> None:
    parts = {
        "weights": weights,
        "gradients": gradients,
        "momenta": momenta,
        "norms": norms,
        "copies": copies,
        "sources": sources,
        "where": where,
        "initial": initial,
        "retention": retention,
    }
    parts = {name: part for name, part in parts.items() if part is not None}
    for name, part in parts.items():
        if not isinstance(part, Sequence):
            raise TypeError(f"{name}: expected a sequence of tensors, got {type(part).__name__}")
        if len(part) != len(weights):
            raise ValueError(f"{name}: expected one for each of {len(weights)} weights, got {len(part)}")
    if (initial is None) != (retention is None):
        raise ValueError("retention: expected together with initial, the weights that it pulls back to")
    for i, weight in enumerate(weights):
        _check_weight(f"weights[{i}]", weight, weights[0])
        for name, part in parts.items():
            _check_part(f"{name}[{i}]", name, part[i], weight)
    if not 0 <= momentum_decay < 1:
        raise ValueError(f"momentum_decay: expected a number in [0, 1), got {momentum_decay!r}")
    if torch.is_grad_enabled():
        for name, part in parts.items():
            if any(x.requires_grad for x in part):
                raise ValueError(
                    f"{name}: an update in place has no derivative; use continuum_update or torch.no_grad()"
                )


def _check_weight(name: str, weight: object, first: torch.Tensor) -> None:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(weight).__name__}")
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, in which steps add up, got {weight.dtype}")
    if weight.ndim < 2 or not weight.numel():
        raise ValueError(f"{name}: expected shape [.., out, in], not empty, got {tuple(weight.shape)}")
    if weight.device != first.device:
        raise ValueError(f"{name}: expected a tensor on {first.device}, got one on {weight.device}")


def _check_part(name: str, kind: str, value: object, weight: torch.Tensor) -> None:
    shape = weight.shape
    if kind == "retention":
        check_retention(name, value, weight)
        if value.dtype != weight.dtype:
            raise TypeError(f"{name}: expected {weight.dtype}, the weight's, got {value.dtype}")
        return
    if kind == "where":
        _check_where(name, value, weight)
        return
    if kind == "norms":
        shape = shape[-2:-1] if getattr(value, "ndim", 0) == 1 else shape[:-1]
    if kind in ("sources", "initial") and getattr(value, "ndim", 0) == 2:
        shape = shape[-2:]
    check_tensor(name, value, shape, like=weight)
    accepted = {"copies": FLOAT_DTYPES[:3], "sources": FLOAT_DTYPES, "initial": FLOAT_DTYPES}.get(
        kind, (weight.dtype,)
    )
    if value.dtype not in accepted:
        raise TypeError(f"{name}: expected one of {[str(d) for d in accepted]}, got {value.dtype}")
    if kind in ("weights", "momenta", "copies") and not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, which is written in place")


def _check_where(name: str, value: object, weight: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a tensor of torch.bool, got {got}")
    leading = weight.shape[:-2]
    if value.shape != leading or value.device != weight.device:
        raise ValueError(
            f"{name}: expected shape {tuple(leading)} on {weight.device}, got {tuple(value.shape)} on "
            f"{value.device}"
        )
