"""Layers over ranks that each have a piece of every sequence: what each waits for, and what it passes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from nl_kernels import delta_memory
from nl_models.layers.attention import Attention
from nl_models.layers.continuum import ContinuumMemory
from nl_models.layers.gated_delta_net import GatedDeltaNet
from nl_models.layers.short_convolution import ShortConvolution
from nl_models.layers.state import AttentionState, State
from nl_models.parallel.exchange import Agreement, SequenceRanks


def over_ranks(
    layer: nn.Module,
    x: torch.Tensor,
    ranks: SequenceRanks,
    state: State = None,
    mask: torch.Tensor | None = None,
    output_state: bool = False,
    *,
    agreement: Agreement | None = None,
    checkpoint: bool = False,
) -> tuple[torch.Tensor, State]:
    """``layer(x, state, mask, output_state)`` where each rank has the next piece of every sequence.

    All ranks make the same calls in the same order, and the same backward passes.

    Args:
        layer: any of :mod:`nl_models.layers`, or a module that is called like them.
        x: ``[B, T, d]``, this rank's piece; T may differ by rank.
        state: before the first piece, on the first rank alone.
        mask: ``[B, T]`` bool, True at this rank's real tokens.
        output_state: whether to return the state after the last piece, on the last rank.
        agreement: of a call that the ranks have agreed on already; by default they do so here.
        checkpoint: whether the backward pass computes activations anew; what was received is kept.

    Returns:
        ``y`` like ``x``; on the last rank the state or ``None``, on others ``None``.

    Raises:
        ValueError: batches differ, a piece is empty, or a later rank has a state of its own.
    """
    if agreement is None:
        agreement = ranks.agree(x.shape[0], x.shape[1], mask is not None, state is not None)
    if agreement.padded and mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    call = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False) if checkpoint else _call
    output_state = output_state or not ranks.is_last
    y, state = form_of(layer, agreement)(layer, x, ranks, state, mask, output_state, agreement, call)
    return y, state if ranks.is_last else None


def form_of(layer: nn.Module, agreement: Agreement) -> Callable:
    """Which of the forms below serves a layer."""
    if isinstance(layer, ContinuumMemory) and all(level.config.chunk_size is None for level in layer.levels):
        return stateless
    if isinstance(layer, GatedDeltaNet):
        return affine
    if isinstance(layer, Attention) and not (agreement.padded or agreement.resumed):
        return gathered
    if isinstance(layer, ShortConvolution) and not agreement.padded:
        return tail if min(agreement.lengths) >= layer.window - 1 else relayed
    return relayed


def stateless(layer, x, ranks, state, mask, output_state, agreement, call):
    """A layer that knows nothing of other tokens."""
    return call(layer, x, state, mask, output_state)


def relayed(layer, x, ranks, state, mask, output_state, agreement, call):
    """Any layer: it starts when the rank before has its state after its piece."""
    name = type(layer).__name__
    if ranks.rank:
        x, state = ranks.receive(x, ranks.rank - 1, name)
    y, state = call(layer, x, state, mask, output_state)
    if not ranks.is_last:
        y = ranks.send(y, state, [ranks.rank + 1], name)
    return y, state


def tail(layer: ShortConvolution, x, ranks, state, mask, output_state, agreement, call):
    """The last inputs of the piece before are all that a convolution sees of it: nobody waits."""
    name = type(layer).__name__
    last = x[:, x.shape[1] - layer.window + 1 :]
    if not ranks.is_last:
        x = ranks.send(x, last, [ranks.rank + 1], name)
    if ranks.rank:
        x, state = ranks.receive(x, ranks.rank - 1, name)
    return call(layer, x, state, mask, output_state)


def gathered(layer: Attention, x, ranks, state, mask, output_state, agreement, call):
    """Every rank sends its keys and values to all later ones; their gradients come back and are summed."""
    name = type(layer).__name__
    start = sum(agreement.lengths[: ranks.rank])
    positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
    q, k, v = call(layer.queries_keys_values, x, positions)
    if not ranks.is_last:
        q = ranks.send(q, (k, v), range(ranks.rank + 1, ranks.size), name)
    pieces = []
    for source in range(ranks.rank):
        q, piece = ranks.receive(q, source, name)
        pieces.append(piece)
    keys, values = (torch.cat(parts, 2) for parts in zip(*pieces, (k, v)))
    o = call(layer.attend, q, keys, values)
    y = call(layer.output, o.transpose(1, 2), x)
    position = torch.full((x.shape[0],), start + x.shape[1], device=x.device)
    return y, AttentionState(keys, values, None, position) if output_state else None


def affine(layer: GatedDeltaNet, x, ranks, state, mask, output_state, agreement, call):
    """The memory is an affine map of the one before the piece: all but one product goes on without it."""
    name = type(layer).__name__
    if ranks.rank == 0:
        o, state = call(_delta_memory, layer, x, state, mask, output_state)
    else:
        o, kept, written, decay = call(_piece_map, layer, x, mask)
        o, state = ranks.receive(o, ranks.rank - 1, name)
        with torch.autocast(x.device.type, enabled=False):  # which would round the memory
            o = (o + torch.einsum("bthk,bhvk->bthv", kept.to(state.dtype), state)).to(o.dtype)
            state = state @ decay + written
    if not ranks.is_last:
        o = ranks.send(o, state, [ranks.rank + 1], name)
    if mask is not None:
        o = o * mask[..., None, None]
    return call(layer.output, o, x), state if output_state else None


def _delta_memory(layer: GatedDeltaNet, x, state, mask, output_state):
    tokens = layer.memory_inputs(x, mask)
    return delta_memory(*tokens, initial_state=state, output_final_state=output_state, impl=layer.impl)


def _piece_map(layer: GatedDeltaNet, x, mask):
    """What a piece does to any memory S ``[B, H, D, D]`` before it.

    ``S_t = S A_t + B_t`` with ``A_t = Π (α I − β k kᵀ)``, so ``o_t = B_t q_t + S (A_t q_t)``. One call gives
    all of it: a memory of twice as many rows that begins as ``[0; I]`` and writes zeros in the lower half is
    ``[B_t; A_t]``.

    Returns:
        B_t q_t and A_t q_t, ``[B, T, H, D]``; B_T and A_T, ``[B, H, D, D]``.
    """
    q, k, v, log_decay, erase = layer.memory_inputs(x, mask)
    B, d = x.shape[0], layer.head_dim
    identity = torch.eye(d, dtype=log_decay.dtype, device=x.device).expand(B, layer.num_heads, d, d)
    o, state = delta_memory(
        q,
        k,
        F.pad(v, (0, d)),
        log_decay,
        erase,
        initial_state=torch.cat([torch.zeros_like(identity), identity], 2),
        output_final_state=True,
        impl=layer.impl,
    )
    return *o.split(d, -1), *state.split(d, 2)


def _call(function: Callable, *arguments):
    return function(*arguments)
