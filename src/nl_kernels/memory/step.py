"""One layer of a memory over one token, without gradients: what the one-token steps on the CPU are built on.

At one token the arithmetic is small, so each function takes as few operations as it can. Tokens are rows
[.., 1, width]: a product of a row with ``W.mT`` is several times as fast as that of ``W`` with a column. Any
leading dimensions do, as long as they broadcast.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

from nl_kernels.memory.hidden import row_dot
from nl_kernels.memory_rule import MemoryRule

Weights = TypeVar("Weights", bound=tuple)
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

    @classmethod
    def of(
        cls,
        rate: torch.Tensor,
        decay: torch.Tensor,
        momentum: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> Gates:
        """From η, α and μ [B, H] and the mask [B] of a token, for B · H layers."""
        applied = None
        if mask is not None:
            padding = ~mask[:, None]
            rate, decay = rate.masked_fill(padding, 0), decay.masked_fill(padding, 1)
            momentum = None if momentum is None else momentum.masked_fill(padding, 1)
            applied = mask[:, None].expand(rate.shape).to(rate.dtype)
        parts = (rate, decay, momentum, applied)
        return cls(*(None if x is None else x.reshape(-1, 1, 1) for x in parts))

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


def refreshed(met: Met | tuple, running: Weights, snapshot: Weights, inplace: bool) -> Weights:
    """The snapshot after a token, of ``running`` where a boundary is met; written into it if ``inplace``.

    Args:
        met: for all layers, or a tuple with that of each, which broadcasts from the left.
    """
    if met is False:
        return snapshot
    if met is True and not inplace:
        return running

    def layer(new: torch.Tensor, old: torch.Tensor, met: Met) -> torch.Tensor:
        if met is not True:
            new = torch.where(met.view(met.shape + (1,) * (new.ndim - met.ndim)), new, old)
        return old.copy_(new) if inplace else new

    parts = zip(running, snapshot, met if isinstance(met, tuple) else (met,) * len(snapshot))
    return type(snapshot)(*(None if new is None else layer(new, old, where) for new, old, where in parts))
