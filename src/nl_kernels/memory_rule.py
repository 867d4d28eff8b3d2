"""What a neural memory is and how it learns: the options, the weights, and their elementary functions.

Source: Nested Learning (arXiv 2512.24695), Eqs. 57 (delta gradient descent), 88-91 (the memories).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from nl_kernels.checks import check_bool, check_choice

ACTIVATIONS = ("silu", "gelu")
ERASES = ("per_layer", "input", "none")
MOMENTA = ("average", "sum")
ERROR_WEIGHTS = ("anchor", "snapshot")
NORM_EPS = 1e-6  # added to squared norms, so that the zero vector has a finite Jacobian


class DeepMemoryWeights(NamedTuple):
    """The weights of one memory per head: ``f(x) = outer n(σ(inner x))``, or ``f(x) = inner x``.

    Attributes:
        inner: [H, h, D] shared by all sequences, or [B, H, h, D]. For a linear memory [.., Dv, D].
        outer: [H, Dv, h] or [B, H, Dv, h]; ``None`` makes the memory linear.
    """

    inner: torch.Tensor
    outer: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class MemoryRule:
    """How a memory is applied and how one token writes to it.

    The default is built to stay finite and useful for ever; :meth:`literal` has the printed formulas, which
    diverge on long inputs. A memory applies ``f(x) = W1 n(σ(W2 x))``, and its objective for one token is
    ``½‖M(k) − v‖²`` with ``M(x) = f(x)`` or ``x + f(x)``.

    Attributes:
        activation: σ, one of :data:`ACTIVATIONS`.
        normalize_hidden: ``n`` is the l2 norm of the hidden layer (then one rate suits both layers);
            otherwise ``n`` is the identity.
        residual: ``M(x) = x + f(x)`` for the memory that is read, in its read and in its objective.
            The memories that make keys and values always have it, gates never; a self-made target is
            ``v + f(v)``, of gates ``f(v)``.
        erase: which layers forget along the input they write to (delta gradient descent): all of them
            with their own input ("per_layer"), the first ("input"), or none ("none": decay alone, as Titans).
        proximal: the effective rate of a layer that erases is ``η/(1 + η‖x‖²)``, the exact proximal step
            for its input x; otherwise η itself, meant for inputs of unit norm (stable below 2).
        anchored: the weights are ``W_0 + Δ_t`` and decay and erase act on Δ alone, so that the initial
            state is never forgotten.
        error_at: the weights of a linear memory at which its error f(k) − v is taken: those of the
            "snapshot", as printed, or of the "anchor", which no write changes. The erase takes out what the
            memory has changed at k, and the snapshot's error takes it out again: a key that comes back in
            each chunk is answered with half of its value at a rate of 1/2, with all and with nothing in turn
            at 1. With the anchor's the memory learns by the delta rule at the weights of the moment,
            ``Δ_t = Δ_{t-1}(α − η k kᵀ) + η (v − W_0 k) kᵀ``, and without an erase as linear attention does.
            ``None``: the anchor for linear memories that erase and have one, else the snapshot. Memories of
            two layers have always that: their first layer learns from what is still wrong.
        error_bound: both local error signals, that of the output and that of the hidden layer, are scaled
            down to this length when longer (a Huber objective); ``None`` leaves them alone.
        momentum: what momentum with decay μ makes of the writes, for calls that have it: their "average",
            ``U ← μU + (1 − μ) write``, or their "sum", ``U ← μU + write``, as Titans prints it. The sum of
            a lasting error is 1/(1 − μ) times as long as one write. Self-modifying memories feed on what
            they write, and are chaotic at that gain.

    Raises:
        TypeError: what is True or False is given as something else.
        ValueError: an unknown ``activation``, ``erase``, ``error_at`` or ``momentum``; an ``error_bound``
            that is not positive; or an error at an anchor where there is none.
    """

    activation: str = "silu"
    normalize_hidden: bool = True
    residual: bool = False
    erase: str = "per_layer"
    proximal: bool = False
    anchored: bool = True
    error_at: str | None = None
    error_bound: float | None = 1.0
    momentum: str = "average"

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("erase", self.erase, ERASES)
        check_choice("error_at", self.error_at, (*ERROR_WEIGHTS, None))
        check_choice("momentum", self.momentum, MOMENTA)
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                check_bool(field.name, getattr(self, field.name))
        if self.error_at == "anchor" and not self.anchored:
            raise ValueError("error_at: 'anchor' needs anchored=True; use 'snapshot'")
        bound = self.error_bound
        if bound is not None and not (isinstance(bound, (int, float)) and 0 < bound < math.inf):
            raise ValueError(f"error_bound: expected a positive finite number or None, got {bound!r}")

    @classmethod
    def literal(cls) -> MemoryRule:
        """The printed formulas: residuals, raw hidden layer, exact proximal rates, no safeguards."""
        return cls(
            normalize_hidden=False,
            residual=True,
            proximal=True,
            anchored=False,
            error_at="snapshot",
            error_bound=None,
            momentum="sum",
        )

    def errs_at_anchor(self, linear: bool) -> bool:
        """Whether errors are taken at the anchor: what ``error_at`` says, or leaves to the other options."""
        if self.error_at is not None or not linear:
            return self.error_at == "anchor"
        return self.anchored and self.erase != "none"

    def share(self, momentum: torch.Tensor | None) -> torch.Tensor | None:
        """What momentum leaves of each write: 1 − μ of an average; ``None`` stands for all of it."""
        return None if momentum is None or self.momentum == "sum" else 1 - momentum

    def erases(self, first_layer: bool) -> bool:
        """Whether the first (input) layer, or a later one, erases."""
        return self.erase == "per_layer" or (self.erase == "input" and first_layer)


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """``x`` scaled to unit length along its last dimension (zero stays zero)."""
    return x * inverse_norm(x)


def inverse_norm(x: torch.Tensor) -> torch.Tensor:
    """1/‖x‖ along the last dimension, which is kept."""
    return x.square().sum(-1, keepdim=True).add_(NORM_EPS).rsqrt_()


def bound_length(x: torch.Tensor, bound: float | None) -> torch.Tensor:
    """``x`` scaled down to length ``bound`` along its last dimension where it is longer."""
    if bound is None:
        return x
    return x * (bound * x.square().sum(-1, keepdim=True).clamp(min=bound * bound).rsqrt())


def activate(z: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """σ(z) and its slope σ'(z)."""
    if activation == "silu":
        s = torch.sigmoid(z)
        value = z * s
        return value, s + value * (1 - s)
    cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return z * cdf, cdf + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
