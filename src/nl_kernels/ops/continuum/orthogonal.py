"""Newton–Schulz with a derivative, for steps that gradients flow through."""

from __future__ import annotations

import torch

from nl_kernels.dispatch import without_autocast
from nl_kernels.ops.newton_schulz import newton_schulz
from nl_kernels.ops.newton_schulz.coefficients import MUON_COEFFICIENTS
from nl_kernels.ops.newton_schulz.stack import normalised, restored, wide_stack

STEPS = 5


def orthogonalised(matrix: torch.Tensor, impl: str | None = None) -> torch.Tensor:
    """:func:`nl_kernels.newton_schulz` with Muon's coefficients on [.., m, n], at any scale; zero gives zero.

    ``impl`` is that of the forward pass; the backward pass recomputes the steps. It cannot be differentiated
    again.
    """
    return _Orthogonalised.apply(matrix, impl)


class _Orthogonalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, impl):
        ctx.save_for_backward(matrix)
        # no norm is too small: the result's scale is the caller's to set
        return newton_schulz(matrix.detach(), steps=STEPS, eps=torch.finfo(matrix.dtype).tiny, impl=impl)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (matrix,) = ctx.saved_tensors
        with without_autocast(matrix.device.type):
            return restored(_adjoint(wide_stack(matrix), wide_stack(grad)), matrix), None


def _adjoint(stack: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    a, b, c = MUON_COEFFICIENTS
    first = normalised(stack, torch.finfo(stack.dtype).tiny, stack.dtype)
    x, made = first, []
    for _ in range(STEPS):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        made.append((x, gram, factor))
        x = factor @ x
    for x, gram, factor in reversed(made):
        # X ← PX with P = aI + bA + cA², A = XXᵀ; twice the symmetric part of P's gradient
        both = grad @ x.mT
        both = both + both.mT
        crossed = gram @ both
        grad = factor @ grad + (b * both + c * (crossed + crossed.mT)) @ x
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
    along = (first * grad).sum((-2, -1), keepdim=True)
    return torch.where(norm > 0, (grad - first * along) / torch.where(norm > 0, norm, 1.0), 0.0)
