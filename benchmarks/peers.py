"""Other projects as providers, each as near to ours as it allows; every remaining difference is in the note.

Peers are optional and never imported unless asked for: a missing one raises
:class:`~benchmarks.measure.Unavailable` with the remedy. ``python -m benchmarks.peers_env`` makes an
environment that has the ones for the CPU. Only public interfaces are used.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Provider
from benchmarks.measure import Unavailable, random_tensors

CPU_REMEDY = "python -m benchmarks.peers_env runs the benchmarks where it is installed"


def load(module: str, package: str, remedy: str) -> ModuleType:
    """Import an optional package.

    Raises:
        Unavailable: it is not installed, or does not import here.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise Unavailable(f"{package} is not installed; {remedy}") from None
    except Exception as error:
        raise Unavailable(f"{package} does not import: {type(error).__name__}: {error}") from None


def _layer_inputs(tokens: int, width: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (batch, tokens, width)
    made = random_tensors(0, {"x": shape, "cotangent": shape}, device, torch.float32)
    return made["x"].requires_grad_(), made["cotangent"]


def titans_pytorch(
    *,
    tokens: int,
    width: int,
    heads: int,
    hidden: int,
    chunk: int,
    fresh_gradients: bool,
    momentum: bool,
    device: torch.device,
    batch: int = 1,
) -> Provider:
    """``NeuralMemory`` of titans-pytorch, forward and backward of the whole layer.

    Equal: width, heads, head width, hidden width of the two-layer GELU memory, residual, chunk size,
    projections from the stream, per-head output gate and output projection, momentum or not. Different: one
    rate, momentum and decay a *chunk* (of its mean token) where ours has one a token, one state a chunk as
    with ours at ``read="snapshot"``; plain decay instead of delta gradient descent; a LayerNorm on the
    memory's output; RMSNorm on queries and keys instead of unit length. ``hidden = 0`` is a linear memory.

    Args:
        fresh_gradients: take gradients at each chunk's first state (its option ``batch_size = chunk``), as
        Titans,
            TTT and we do. Its own default takes every gradient of the sequence at the initial weights: one
            parallel pass, but no write ever sees what was written before.
    """
    module = load("titans_pytorch", "titans-pytorch", CPU_REMEDY)
    torch.manual_seed(0)
    layer = module.NeuralMemory(
        dim=width,
        dim_head=width // heads,
        heads=heads,
        chunk_size=chunk,
        batch_size=chunk if fresh_gradients else None,
        momentum=momentum,
        qk_rmsnorm=True,
        default_model_kwargs=(
            {"depth": 2, "expansion_factor": hidden / (width // heads)} if hidden else {"depth": 1}
        ),
    ).to(device)
    x, cotangent = _layer_inputs(tokens, width, batch, device)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> tuple[Tensor, ...]:
        out, _ = layer(x)
        return out.detach(), *_gradients(out, leaves, cotangent)

    if fresh_gradients:
        note = "one rate, momentum and decay a chunk; plain decay, no delta rule"
    else:
        note = "takes every gradient at the initial weights, so no write sees an earlier one: less than ours"
    return Provider(run, role="peer", headline=fresh_gradients, note=note)


def ttt_linear(*, tokens: int, width: int, heads: int, chunk: int, device: torch.device) -> Provider:
    """TTT-Linear in flash-linear-attention's plain PyTorch, in a layer of the same parts; CPU only.

    Equal: width, heads, chunk size, projections from the stream, a rate a token, learned initial weights,
    per-head output gate and output projection, gradients at each chunk's first state and through the writes,
    running reads. Different: plain gradient steps (no decay, no erase, no bound), a LayerNorm inside the loss
    and after the read, a bias beside the matrix.
    """
    if device.type != "cpu":
        raise Unavailable("the plain form of TTT-Linear is compared on the CPU")
    module = load("fla.ops.ttt.naive", "fla-core", CPU_REMEDY)
    inner = width // heads
    sizes = {
        "project": (3 * width, width),
        "rates": (2 * heads, width),
        "out": (width, width),
        "initial": (heads, inner, inner),
    }
    made = random_tensors(1, sizes, device, torch.float32)
    weights = {name: (x * width**-0.5).requires_grad_() for name, x in made.items()}
    scale, shift = (make(heads, inner).requires_grad_() for make in (torch.ones, torch.zeros))
    x, cotangent = _layer_inputs(tokens, width, 1, device)
    leaves = [x, *weights.values(), scale, shift]

    def run() -> tuple[Tensor, ...]:
        normed = F.rms_norm(x, x.shape[-1:])
        q, k, v = F.linear(normed, weights["project"]).unflatten(-1, (3, heads, inner)).unbind(2)
        rate, gate = F.linear(normed, weights["rates"]).unflatten(-1, (2, heads)).unbind(2)
        read, _, _ = module.chunk_ttt_linear_ref(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            scale,
            shift,
            rate.sigmoid()[..., None],
            scale=1.0,
            mini_batch_size=chunk,
            initial_state=weights["initial"][None],
        )
        out = F.linear((read * gate.sigmoid()[..., None]).flatten(2), weights["out"])
        return out.detach(), *_gradients(out, leaves, cotangent)

    return Provider(
        run, role="peer", note="plain gradient steps: no decay, no delta rule; LayerNorm in the loss"
    )


def nested_learning(
    *, tokens: int, width: int, memories: int, chunk: int, device: torch.device, batch: int = 1
) -> Provider:
    """The training step of ``SelfModifyingTitans`` of nested-learning: read, backward, then the update pass.

    Its layer reads at the initial weights with autograd, and writes afterwards in a second pass under
    ``no_grad`` (as its own training loop does). So no gradient flows through a write: less work than ours.
    It has no heads and its hidden width is its width. ``memories = 1`` is the layer as it comes, one memory
    as wide as the stream; ``memories = heads`` runs the heads as batch elements of a layer of the head's
    width: the same memories as ours (but one set of initial weights for all heads, and no mixing between
    them).
    """
    module = load("nested_learning.titan.self_modifying", "nested-learning", CPU_REMEDY)
    torch.manual_seed(0)
    inner = width // memories
    layer = module.SelfModifyingTitans(
        module.SelfModifyingTitansConfig(dim=inner, chunk_size_other=chunk, local_conv_window=4)
    ).to(device)
    x, cotangent = _layer_inputs(tokens, inner, batch * memories, device)
    leaves = [x, *layer.parameters()]

    def run() -> tuple[Tensor, ...]:
        out = layer(x)
        gradients = _gradients(out, leaves, cotangent)
        with torch.no_grad():
            layer.apply_updates_inplace(x)
        return out.detach(), *gradients

    return Provider(
        run,
        role="peer",
        note="no gradient through the writes; reads at the initial weights, writes in a second pass",
    )


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cotangent: Tensor | None
) -> Provider:
    """``chunk_gated_delta_rule`` of flash-linear-attention on the same tensors ``[B, T, H, D]``; CUDA only.

    ``beta`` both erases and scales the write there, so ours is given ``erase = β·exp(g)`` and ``v·β``.
    With a ``cotangent`` the run includes the backward.
    """
    if q.device.type != "cuda":
        raise Unavailable("flash-linear-attention's kernels need a CUDA device")
    module = load(
        "fla.ops.gated_delta_rule",
        "flash-linear-attention",
        "pip install --no-deps flash-linear-attention fla-core",
    )
    leaves = [q, k, v, log_decay, beta]

    def run() -> tuple[Tensor, ...]:
        out, _ = module.chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta, scale=1.0)
        if cotangent is None:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, leaves, cotangent)

    return Provider(run, role="peer", comparable=True)


def _gradients(out: Tensor, leaves: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the leaves that the output depends on."""
    found = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    return tuple(gradient for gradient in found if gradient is not None)
