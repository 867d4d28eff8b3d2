"""One layer of a memory over one token, without gradients: what the one-token steps on the CPU are built on.

At one token the arithmetic is small, so each function takes as few operations as it can. Tokens are rows
[.., 1, width]: a product of a row with ``W.mT`` is several times as fast as that of ``W`` with a column. Any
leading dimensions do, as long as they broadcast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nl_kernels.memory.hidden import row_dot
from nl_kernels.memory_rule import MemoryRule

Met = bool | torch.Tensor
"""Whether a boundary is met: by all sequences, by none, or by those of a bool tensor [B]."""


class Gates(NamedTuple):
    """What scales one token's write, each [.., 1, 1].

    Attributes:
        rate: η; 0 where there is no token.
        decay: α; 1 where there is no token.
        momentum: μ, 1 where there is no token; ``None`` without momentum.
        applied: 0 where there is no token, else 1; ``None`` when every sequence has one.
    """

    rate: torch.Tensor
    decay: torch.Tensor
    momentum: torch.Tensor | None
    applied: torch.Tensor | None

    def broadcast(self) -> Gates:
        """The same for layers with one more leading dimension, behind the first."""
        return Gates(*(None if x is None else x.unsqueeze(1) for x in self))


def write_token(
    state: torch.Tensor,
    velocity: torch.Tensor | None,
    x: torch.Tensor,
    signal: torch.Tensor,
    gates: Gates,
    rule: MemoryRule,
    *,
    first_layer: bool,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``U ← μU − sη δxᵀ``, ``S ← αS − η (Sx)xᵀ + U``: both after the token.

    The share s of a write is 1 − μ where the rule averages writes, else 1.

    Args:
        state, velocity: S and U [.., out, in]; U ``None`` without momentum.
        x: the layer's input [.., 1, in].
        signal: δ [.., 1, out].
        first_layer: whether the layer is its memory's first, for ``rule.erase``.
        inplace: write into ``state`` and ``velocity``; otherwise they stay and the results are new.
    """
    rate, decay, momentum, applied = gates
    erases = rule.erases(first_layer)
    if erases and rule.proximal:
        rate = rate / (1 + rate * row_dot(x, x))
    recalled = torch.matmul(x, state.mT) if erases else None
    after = state.mul_(decay) if inplace else state * decay
    if velocity is None:
        # Without momentum what is erased and what is written are one product.
        target, erased = after, None
        signal = signal if recalled is None else recalled.add_(signal)
    else:
        velocity = velocity.mul_(momentum) if inplace else velocity * momentum
        target, erased = velocity, recalled
    share = rule.share(momentum)
    write_rate = rate if share is None else rate * share
    target.addcmul_((signal * write_rate).mT, x, value=-1)
    if erased is not None:
        after.addcmul_(erased.mul_(rate).mT, x, value=-1)
    if velocity is not None and applied is None:
        after.add_(velocity)
    elif velocity is not None:
        after.addcmul_(velocity, applied)  # an empty place must not add U again
    return after, velocity


def advance(
    position: torch.Tensor, mask: torch.Tensor | None, period: int, clocks: tuple[int, ...]
) -> tuple[torch.Tensor, list[Met]]:
    """The positions [B] after one token, and which sequences meet a boundary of each clock.

    Positions are read on the CPU alone: elsewhere that would wait for the device.
    """
    after = position + 1 if mask is None else position + mask
    if mask is None and position.device.type == "cpu" and not torch.compiler.is_compiling():
        seen = after.tolist()
        met = [[place % clock == 0 for place in seen] for clock in clocks]
        decided = [True if all(m) else torch.tensor(m) if any(m) else False for m in met]
        return (after if max(seen) < period else after % period), decided
    met = [after % clock == 0 for clock in clocks]
    return after % period, met if mask is None else [m & mask for m in met]


def where_met(met: torch.Tensor, new: torch.Tensor, old: torch.Tensor, inplace: bool) -> torch.Tensor:
    """``new`` where ``met`` (broadcast from the left), else ``old``; written into ``old`` if ``inplace``."""
    picked = torch.where(met.view(met.shape + (1,) * (new.ndim - met.ndim)), new, old)
    return old.copy_(picked) if inplace else picked
